"""Tracking: off imports nothing, offline writes files and speaks to nobody, and a failure stops no stage."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from espalier import stages, tracking
from espalier.artefacts.store import Node, Store
from espalier.errors import UserError
from espalier.tracking import Silent, Wandb, check, track
from espalier.workflow import graph, launch

ID = "0123456789ab"
OFFLINE = """
import sys
from pathlib import Path
from espalier.tracking import track
with track({"mode": "offline", "project": "p", "directory": sys.argv[1]}, "0123456789ab", "naee 25 %") as tracker:
    tracker.log({"perplexity_wiki": 21.5}, step=0)
    tracker.table("scores", ["task", "value"], [["wiki", 21.5]])
# Packets that had nowhere to go: what this process and wandb's own sent to anywhere but this machine.
for line in Path("/proc/net/snmp").read_text().splitlines() + Path("/proc/net/snmp6").read_text().splitlines():
    words = line.split()
    if words[0] == "Ip:" and "OutNoRoutes" in words:
        column = words.index("OutNoRoutes")
    elif words[0] == "Ip:":
        print("lost", words[column])
    elif words[0] == "Ip6OutNoRoutes":
        print("lost", words[1])
"""
# Runs a stage whose training saves its state every second step and is killed in the fifth, which is then not saved.
KILLED = """
import os, signal, sys, time
from espalier import cli
from espalier.training import train
def due(state, steps=iter(range(1, 100))):
    step = next(steps)
    if step == 5:
        time.sleep(2.5)  # what wandb has been told is in its file within a second
        os.kill(os.getpid(), signal.SIGKILL)
    return step % 2 == 0
train.TrainingState.due = due
cli.main(sys.argv[1:])
"""


def environment(**more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    return kept | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)} | more


def read_back(file: Path) -> list[dict[str, Any]]:
    """The records of a .wandb file, by wandb's own reader."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    run = subprocess.run(command, env=environment(WANDB_MODE="offline"), capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


def history(file: Path) -> list[tuple[int, dict[str, float]]]:
    """The steps of a .wandb file with what was logged of each."""
    items = [record["history"]["item"] for record in read_back(file) if record["type"] == "history"]
    return [(item["_step"], {key: value for key, value in item.items() if key[0] != "_"}) for item in items]


def test_off_yields_a_silent_tracker_and_never_imports_wandb() -> None:
    code = (
        "import sys\nfrom espalier.tracking import track\n"
        "with track({'mode': 'off'}, 'a', 'b') as t:\n    t.log({'x': 1.0}, 0); t.table('t', ['a'], [[1]])\n"
        "assert 'wandb' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())


def test_unknown_mode_names_the_known_ones() -> None:
    for use in (lambda config: track(config, "a", "b").__enter__(), check):
        with pytest.raises(UserError, match=r"did you mean offline\?.*known: off, offline, online"):
            use({"mode": "ofline"})


def run_offline(directory: Path, *prefix: str) -> subprocess.CompletedProcess[str]:
    command = [*prefix, sys.executable, "-c", OFFLINE, str(directory)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)


def test_offline_sends_nothing_to_anybody(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    # A network name space of its own with the loopback up, which wandb's local service needs, and nothing else.
    inside = ["unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    if not (shutil.which("unshare") and shutil.which("ip")):
        pytest.skip("needs unshare and ip")
    if subprocess.run([*inside, "true"], capture_output=True).returncode != 0:
        pytest.skip("this machine does not allow network name spaces")
    done = run_offline(tmp_path, *inside)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["lost 0", "lost 0"]
    (file,) = tmp_path.glob(f"wandb/offline-run-*-{ID}/run-{ID}.wandb")
    score, (_, table) = history(file)
    assert score == (0, {"perplexity_wiki": 21.5})
    assert table["scores._type"] == "table-file"
    assert list(file.parent.glob("files/media/table/scores*.json"))


def test_a_killed_fit_goes_on_in_the_same_run_and_tells_no_step_twice(tmp_path, monkeypatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    store = Store(tmp_path / "results")
    sweep = "sweep=[{method: diep, method.ratio: 0.5, method.epochs: 6, method.batch: 4}]"
    overrides = [sweep, "calibration.samples=1", "calibration.length=32", "tracking=offline"]
    experiment = graph.expand("demo", overrides, store)
    graph.save(experiment, store)
    nodes = {node.stage: node for node in experiment.nodes}
    for stage in ("fetch", "tokens"):
        stages.run(nodes[stage].id, store)
    learnt = nodes["fit"]
    own = environment(ESPALIER_RUNTIME=graph.save_run(experiment, store))
    arguments = ["fit", learnt.id, "--results", str(store.root)]
    first = subprocess.run([sys.executable, "-c", KILLED, *arguments], env=own, capture_output=True, text=True)
    assert first.returncode == -9, first.stderr
    assert not store.path(learnt.id).exists()
    second = subprocess.run([sys.executable, "-m", "espalier", *arguments], env=own, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    files = sorted(store.root.glob(f"wandb/offline-run-*-{learnt.id}/run-{learnt.id}.wandb"))
    parts = [history(file) for file in files]
    assert [[step for step, _ in part] for part in parts] == [[1, 2, 3, 4], [5, 6]]
    with safe_open(store.path(learnt.id), "numpy") as artefact:
        curve = json.loads(artefact.metadata()["curve"])
    told = [values for part in parts for _, values in part]
    assert [values | {"loss": None} for values in told] == [terms | {"loss": None} for terms in curve]
    assert [values["loss"] for values in told] == pytest.approx([sum(terms.values()) for terms in curve])
    (run,) = [record["run"] for record in read_back(files[1]) if record["type"] == "run"]
    assert (run["run_id"], run["job_type"]) == (learnt.id, "fit")


def test_scores_are_told_when_they_are_saved(tmp_path, monkeypatch) -> None:
    store, heard = Store(tmp_path), []
    fetch = Node("fetch", {"id": "embedded:moe", "revision": "sha256:0"})
    node = Node("score", {"tasks": [], "dtype": "float32"}, (fetch.id,), "full")
    for each in (fetch, node):
        store.write_node(each)

    class Recorder(Silent):
        def log(self, values: Any, step: int) -> None:
            heard.append((dict(values), step, store.path(node.id).exists()))

    @contextmanager
    def recorder(config: Any, run_id: str, name: str, stage: str, facts: Any) -> Iterator[Recorder]:
        heard.append((run_id, name, stage))
        yield Recorder()

    document = {"format": "espalier.score/1", "tasks": {"maths_choice": {"value": 0.25}}}
    monkeypatch.setattr(stages, "weights", lambda node, store: tmp_path)
    monkeypatch.setattr("espalier.scoring.score.score", lambda *arguments, **named: (document, None))
    monkeypatch.setattr("espalier.scoring.score.save_scores", lambda path, *_: path.touch())
    monkeypatch.setattr(tracking, "track", recorder)
    stages.run(node.id, store)
    assert heard == [(node.id, "full", "score"), ({"maths_choice": 0.25}, 0, True)]


class Broken:
    """A run whose server has gone."""

    calls = 0

    def log(self, *arguments: Any, **named: Any) -> None:
        self.calls += 1
        raise ConnectionError("cannot reach the server\nnor anybody")

    def finish(self, *arguments: Any, **named: Any) -> None:
        raise AssertionError("a run that failed is left alone")


def test_a_server_that_goes_away_is_one_line_and_stops_nothing(capsys, monkeypatch) -> None:
    run = Broken()
    monkeypatch.setattr(tracking, "_begin", lambda *arguments, **named: run)
    with track({"mode": "online"}, ID, "x") as tracker:
        for step in range(3):
            tracker.log({"loss": 1.0}, step)
    assert run.calls == 1
    assert isinstance(tracker, Wandb)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "espalier: tracking stopped: nor anybody. The stage goes on without it."


def test_online_without_a_key_is_told_before_anything_runs_and_loses_no_result(tmp_path, monkeypatch) -> None:
    pytest.importorskip("wandb")
    for key in [key for key in os.environ if key.startswith("WANDB")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    calls: list[Any] = []
    monkeypatch.setattr(launch, "_call", lambda *arguments: calls.append(arguments) or 0)
    with pytest.raises(UserError, match=r"^tracking=online: No API key configured\. .*Run `wandb login`") as caught:
        launch.run("demo", [], results=tmp_path / "results", tracking="online")
    assert "\n" not in str(caught.value)
    assert calls == []
    code = (
        "from espalier.tracking import track\n"
        f"with track({{'mode': 'online', 'directory': {str(tmp_path)!r}}}, 'a', 'b') as t:\n"
        "    t.log({'x': 1.0}, 0); print('done')"
    )
    command = [sys.executable, "-c", code]
    own = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    run = subprocess.run(command, env=environment(**own), stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "done\n")
    (line,) = run.stderr.splitlines()
    assert line.startswith("espalier: tracking is not recorded: No API key configured")
