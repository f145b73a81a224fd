"""The workflow: which jobs a change schedules, and runs that are killed, edited under, or repeated."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas
import pytest

from espalier.artefacts.store import Store
from espalier.workflow import graph, launch

ROOT = Path(__file__).resolve().parents[1]
BASE = "{method: [reap, hc_smoe], method.ratio: [0.25, 0.5]}"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of the project's configuration and workflow, as the working directory."""
    for name in ("conf", "workflow"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("Snakefile", "environment.yml"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_experiment(project, *sweep, tasks=("perplexity_maths", "maths_choice"), limit=4, calibration=1):
    lines = "".join(f"  - {line}\n" for line in ("method: none", *sweep))
    (project / "conf/experiment/mine.yaml").write_text(
        "# @package _global_\n"
        f"calibration: {{samples: {calibration}, length: 64}}\n"
        f"evaluation: {{tasks: [{', '.join(tasks)}], limit: {limit}}}\n"
        f"sweep:\n{lines}"
    )


def jobs(project, *arguments):
    """The jobs that a dry run would start, by rule."""
    command = [sys.executable, "-m", "espalier", "run", "mine", "--dry-run", "--cores", "1", *arguments]
    run = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    stats = re.search(r"^job +count\n-+ +-+\n(.*?)^total", run.stdout + run.stderr, re.M | re.S)
    if stats is None:
        return {}
    found = dict(line.split() for line in stats.group(1).splitlines())
    return {rule: int(count) for rule, count in found.items() if rule != "all"}


def pretend_done(project):
    """Write empty artefacts for every node, parents first, so that nothing is left to do."""
    store = Store(project / "results")
    experiment = graph.expand("mine", [], store)
    graph.save(experiment, store)
    start = time.time() - 1000
    order = ["fetch", "tokens", "collect", "plan", "apply", "score", "table", "report"]
    nodes = [store.read_node(p.stem) for p in (project / "results/nodes").glob("*.json") if len(p.stem) == 12]
    depth = {}

    def deep(node):
        if node["id"] not in depth:
            makers = [store.read_node(node["made_by"])] if node["made_by"] else []
            parents = makers + [store.read_node(parent) for parent in node["parents"]]
            depth[node["id"]] = 1 + max(map(deep, parents), default=0)
        return depth[node["id"]]

    for node in sorted(nodes, key=deep):
        if node["stage"] not in order:
            continue
        path = store.path(node)
        path.parent.mkdir(parents=True, exist_ok=True)
        if node["stage"] == "apply":
            path.mkdir(exist_ok=True)
            path = path / ".snakemake_timestamp"
        path.touch()
        stamp = start + deep(node)
        os.utime(path, (stamp, stamp))
        if node["stage"] == "table":
            path.with_suffix(".csv").touch()
        if node["stage"] == "report":
            path.with_suffix("").mkdir(exist_ok=True)
            (path.with_suffix("") / ".snakemake_timestamp").touch()
        if node["stage"] == "apply":
            os.utime(path.parent, (stamp, stamp))


@pytest.mark.slow
def test_a_change_schedules_what_it_must(project):
    write_experiment(project, BASE)
    assert jobs(project) == {
        "fetch": 1, "tokens": 1, "collect": 1, "plan": 4, "apply": 4, "score": 5, "table": 1, "report": 1,
    }  # fmt: skip
    assert not (project / "results/nodes").exists()  # a dry run writes no node
    pretend_done(project)
    assert jobs(project) == {}

    write_experiment(project, BASE.replace("0.5]", "0.5, 0.375]"))  # a third ratio
    assert jobs(project) == {"plan": 2, "apply": 2, "score": 2, "table": 1, "report": 1}

    write_experiment(project, BASE.replace("reap,", "reap, ean,"))  # a method whose probe is there already
    assert jobs(project)["plan"] == 2
    write_experiment(project, BASE, "method: naee_skip")  # a method with a new probe
    assert jobs(project) == {"collect": 1, "plan": 1, "apply": 1, "score": 1, "table": 1, "report": 1}

    write_experiment(project, BASE, tasks=("perplexity_maths", "maths_choice", "perplexity_code"))  # a task
    assert jobs(project) == {"score": 5, "table": 1, "report": 1}

    write_experiment(project, BASE, calibration=2)
    assert jobs(project) == {
        "tokens": 1, "collect": 1, "plan": 4, "apply": 4, "score": 4, "table": 1, "report": 1,
    }  # fmt: skip

    write_experiment(project, BASE)
    assert jobs(project, "runtime.score_batch_size=1", "tracking=offline") == {}

    # What is there stays, whatever became of what it was made from: a third ratio needs statistics, for itself alone.
    collected = [path.stem for path in (project / "results/stats").glob("*.safetensors")]
    for folder in ("stats", "checkpoints", "plans"):
        shutil.rmtree(project / "results" / folder)
    assert jobs(project) == {}
    write_experiment(project, BASE.replace("0.5]", "0.5, 0.375]"))
    assert jobs(project) == {"collect": 1, "plan": 6, "apply": 2, "score": 2, "table": 1, "report": 1}
    for node in map(Store("results").read_node, collected):  # made anew, for whatever reason
        Store("results").path(node).parent.mkdir(exist_ok=True)
        Store("results").path(node).touch()
    assert jobs(project) == {"plan": 6, "apply": 2, "score": 2, "table": 1, "report": 1}


def test_a_folder_of_results_may_have_any_name(project, monkeypatch):
    write_experiment(project)
    commands = []
    monkeypatch.setattr(launch, "_call", lambda command, lock=None: commands.append(command) or 0)
    for name in ("2026", "my results"):
        launch.run("mine", [], results=Path(name), dry=True, cores=1)
        run = subprocess.run([*commands.pop(), "--printshellcmds"], cwd=project, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
        printed = (run.stdout + run.stderr).splitlines()
        shells = [shlex.split(line) for line in printed if "python -m espalier" in line]
        assert len(shells) == 4, printed  # fetch, score, table, report
        for words in shells:
            assert words[words.index("--results") + 1] == name
            assert words[words.index("--results") + 2].startswith(f">{name}/logs/")


def start(project, results="results", *overrides):
    command = [sys.executable, "-m", "espalier", "run", "mine", *overrides, "--cores", "2", "--results", results]
    output = (project / f"{results}.log").open("w")
    return subprocess.Popen(command, cwd=project, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)


def finish(run, project, results="results"):
    assert run.wait(600) == 0, (project / f"{results}.log").read_text()[-4000:]


def table(project, results="results"):
    """The tidy table as text, without the columns that a commit made meanwhile would change."""
    frame = pandas.read_csv(project / results / "refs/mine/table.csv", dtype=str)
    return frame.drop(columns=["commit", "dirty"]).to_csv()


def wait_for(project, pattern, run):
    for _ in range(2400):
        if list(project.glob(pattern)):
            return
        assert run.poll() is None, "the run ended before the file appeared"
        time.sleep(0.05)
    raise AssertionError(f"{pattern} did not appear in two minutes")


@pytest.mark.slow
@pytest.mark.xdist_group("workflow")
def test_killed_and_edited_runs_end_with_the_same_table(project):
    sweep = "{method: [reap, hc_smoe], method.ratio: 0.5}"
    write_experiment(project, sweep)
    begun = time.monotonic()
    run = start(project, "clean")
    wait_for(project, "clean/plans/*.json", run)
    # While it runs: conf/ is edited and a dry run of something else starts.
    write_experiment(project, "{method: reap, method.ratio: 0.25}", calibration=3)
    assert jobs(project, "--results", "clean")["plan"] == 1
    finish(run, project, "clean")
    seconds = time.monotonic() - begun
    write_experiment(project, sweep)
    assert jobs(project, "--results", "clean") == {}
    rows = table(project, "clean").splitlines()
    assert len(rows) > 3

    # The same with checkpoints in scratch, killed with all of its jobs at random moments, three times.
    draw, scratch, kills = random.Random(0), project / "scratch", 0
    options = ("runtime.checkpoints=temporary", f"runtime.scratch={scratch}")
    for _ in range(3):
        run = start(project, "results", *options)
        try:
            run.wait(draw.uniform(0.05, 0.3) * seconds)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            kills += 1
        run.wait()
    assert kills >= 2
    done = {path: path.stat().st_mtime_ns for path in (project / "results/plans").glob("*.json")}
    run = start(project, "results", *options)
    finish(run, project)
    assert table(project) == table(project, "clean")
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in done.items() if ".run" not in path.name)
    assert not list((project / "results/checkpoints").glob("*"))
    assert not list(scratch.iterdir())  # those of the jobs that were killed too
    refs = project / "results/refs/mine"
    assert not (refs / "checkpoints").exists()
    assert (refs / "report.html").exists()

    # Every artefact has its run record, and names lead to artefacts.
    store = Store(project / "clean")
    for stage in ("stats", "plans", "checkpoints", "scores", "tables", "reports"):
        for record in (store.root / stage).glob("*.run.json"):
            facts = json.loads(record.read_text())
            assert facts["seconds"] > 0
            assert facts["versions"]["torch"]
            assert facts["peak_rss_bytes"] > 1e6
    assert (project / "clean/refs/mine/checkpoints/reap-50%/config.json").exists()
    page = (project / "clean/refs/mine/report.html").read_text()
    assert "espalier run mine &#x27;sweep=[{method:none},{method:reap,method.ratio:0.5}]&#x27;" in page
    assert "Dendrograms and heat maps of the layers for hc_smoe 50 %." in page

    # Snakemake's own report collects them, and asks nobody for anything.
    made = snakemake_report(project)
    text = made.read_text()
    for name in ("reports/", "tables/", "quality.svg"):
        assert name in text
    assert not re.search(r"""<(script|link|img)[^>]*(src|href)=["']?(https?:)?//""", text)


def snakemake_report(project):
    """Snakemake's report of the finished run, made where no host can be reached."""
    command = [sys.executable, "-m", "snakemake", "--profile", "workflow/profiles/default", "--cores", "1", "--report",
               "run.html", "--config", "experiments=[mine]", "results=clean"]  # fmt: skip
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    run = subprocess.run(command, cwd=project, capture_output=True, text=True, env=os.environ | nowhere)
    assert run.returncode == 0, run.stdout + run.stderr
    return project / "run.html"


def test_a_second_run_on_the_same_results_is_refused(project):
    import fcntl

    write_experiment(project)
    (project / "results").mkdir()
    with (project / "results/.run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [sys.executable, "-m", "espalier", "run", "mine", "--cores", "1"]
        run = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert run.returncode == 2
    assert len(run.stderr.strip().splitlines()) == 1


def test_a_run_in_another_folder_takes_the_projects_workflow(tmp_path):
    """As in a container, where the project lies elsewhere."""
    command = [sys.executable, "-m", "espalier", "run", "demo", "sweep=[{method: none}]", "-n", "--profile", "slurm"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "score" in run.stdout + run.stderr
    assert not (tmp_path / "results").exists()


def test_workflow_lints():
    command = [sys.executable, "-m", "snakemake", "--lint"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
