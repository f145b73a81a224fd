"""One run at a time in a results folder: under races, from other hosts, and with what a killed one left in Slurm."""

import os
import socket
import stat
import time

import pytest

from children import context
from espalier import stages
from espalier.artefacts.store import Node, Store
from espalier.errors import UserError
from espalier.workflow import launch, orphans
from espalier.workflow.prefetch import prefetch


def _race(folder, barrier, inside, overlaps, refused):
    barrier.wait()
    try:
        with launch.run_lock(folder, "mine"):
            with inside.get_lock():
                inside.value += 1
                overlaps.value += inside.value > 1
            time.sleep(0.3)
            with inside.get_lock():
                inside.value -= 1
    except UserError:
        with refused.get_lock():
            refused.value += 1


def test_of_runs_that_start_at_once_one_gets_the_folder(tmp_path):
    count = 6
    barrier = context().Barrier(count)
    inside, overlaps, refused = (context().Value("i", 0) for _ in range(3))
    arguments = (tmp_path / "results", barrier, inside, overlaps, refused)
    children = [context().Process(target=_race, args=arguments) for _ in range(count)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert overlaps.value == 0
    assert refused.value == count - 1


def lock_of(folder, host, age):
    """The lock's file as a run on `host` left it `age` seconds ago, where locks do not reach other hosts."""
    folder.mkdir(exist_ok=True)
    path = folder / launch.LOCK
    path.write_text(f"mine, process 1 on {host}, since 2026-01-01 00:00:00\n")
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def test_a_run_on_another_host_counts_while_it_renews_its_lock(tmp_path):
    lock_of(tmp_path, "elsewhere", age=5)
    with pytest.raises(UserError, match="on elsewhere"), launch.run_lock(tmp_path, "mine"):
        pass
    lock_of(tmp_path, "elsewhere", age=launch.LIFE + 5)
    with launch.run_lock(tmp_path, "mine"):
        assert f"process {os.getpid()} on {socket.gethostname()}" in (tmp_path / launch.LOCK).read_text()
    assert (tmp_path / launch.LOCK).read_text() == ""  # one that ended does not make anyone wait
    lock_of(tmp_path, socket.gethostname(), age=0)  # killed here: the kernel has dropped its lock
    with launch.run_lock(tmp_path, "mine"):
        pass


def test_a_run_renews_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "LIFE", 0.12)
    with launch.run_lock(tmp_path, "mine"):
        path = tmp_path / launch.LOCK
        os.utime(path, (0, 0))
        end = time.monotonic() + 10
        while path.stat().st_mtime < 1e9:
            assert time.monotonic() < end
            time.sleep(0.02)


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A queue that is a file of `id|name` lines, with programs that list it and take from it."""
    queue, programs = tmp_path / "queue", tmp_path / "bin"
    programs.mkdir()
    (programs / "squeue").write_text(f"#!/bin/sh\ncat {queue}\n")
    (programs / "scancel").write_text(
        f'#!/bin/sh\nfor id in "$@"; do grep -v "^$id|" {queue} > {queue}.new; mv {queue}.new {queue}; done\n'
    )
    for program in programs.iterdir():
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return queue


def test_only_the_folders_own_orphans_are_cancelled(slurm, tmp_path, capsys):
    own, other = (orphans.job_prefix(tmp_path / name) for name in ("results", "others"))
    assert own != other
    slurm.write_text(f"1|{own}_a\n2|{other}_b\n3|{own}_c\n4|bash\n")
    assert orphans.cancel_orphans(tmp_path / "results") == 2
    assert slurm.read_text().split() == [f"2|{other}_b", "4|bash"]
    assert "2 jobs" in capsys.readouterr().err
    assert orphans.cancel_orphans(tmp_path / "results") == 0


def test_slurm_that_does_not_answer_is_one_line(slurm, tmp_path, monkeypatch):
    (tmp_path / "bin/squeue").write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2; exit 1\n")
    with pytest.raises(UserError, match="Unable to contact"):
        orphans.cancel_orphans(tmp_path / "results")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="squeue: not found"):
        orphans.cancel_orphans(tmp_path / "results")


def test_prefetch_brings_models_texts_and_tasks(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("espalier.inputs.hub.data_file", lambda *names: asked.append(names) or tmp_path)
    monkeypatch.setattr("espalier.scoring.score._load", lambda name: asked.append(name))
    commit = "0" * 40
    overrides = [
        "calibration=c4_32x2048",
        f"calibration.revision={commit}",
        "evaluation.tasks=[perplexity_wiki,boolq,boolq_local]",
        "sweep=[{method: none},{method: reap, method.ratio: 0.5}]",
    ]
    said = []
    prefetch("demo", overrides, tmp_path / "results", said.append)
    assert ("allenai/c4", commit, "en/c4-train.00000-of-01024.json.gz") in asked
    assert {"boolq", "boolq_local"} <= set(asked)
    assert "perplexity_wiki" not in asked  # its text is in the package
    assert [line.split()[0] for line in said] == ["model", "text", "task", "task", "task"]
    assert not (tmp_path / "results/nodes").exists()


def test_jobs_of_slurm_stay_offline_and_downloads_do_not(tmp_path, monkeypatch):
    store, seen = Store(tmp_path), {}
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for stage in ("fetch", "tokens", "score"):
        node = Node(stage, {"of": stage})
        store.write_node(node)
        monkeypatch.setitem(
            stages.STAGES, stage, lambda n, *_: seen.update({n["stage"]: os.environ.get("HF_HUB_OFFLINE")})
        )
        stages.run(node.id, store)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    assert seen == {"fetch": None, "tokens": None, "score": "1"}
