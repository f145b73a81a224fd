"""How long a thousand points take until their first job starts, and a job until its stage does.

    python benchmarks/sweep.py [--experiment benchmarks/thousand.yaml] [--cores 2]

In a copy of conf/ and workflow/ with the experiment, it times the parts of a dry run in this process, then the commands
as a user types them: `espalier run -n` with nothing done, `espalier estimate`, and `espalier run` with everything done
(empty artefacts, newer than their parents). Then the jobs of a small experiment on the embedded model, one process each
as Snakemake starts them: seconds until the stage's function is called, seconds of the whole job, and whether it loaded
torch. One JSON line a measurement. CPU seconds are those of all processes, and the ones to compare where others use the
machine.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from espalier.artefacts.store import Store
from espalier.machine.hardware import Hardware
from espalier.workflow import graph
from espalier.workflow.job_requests import Requests
from espalier.workflow.sweep import Composer, points

ROOT = Path(__file__).resolve().parents[1]
NAME = "thousand"
SMALL = """# @package _global_
evaluation: {limit: 4, tasks: [maths_choice]}
calibration: {samples: 1, length: 64}
sweep:
  - method: none
  - {method: [random, reap, naee, hc_smoe], method.ratio: 0.5}
"""
# Run by `python -c` in place of `python -m espalier`: tells when the stage's function is called, and what it loaded.
TOLD = """
import sys, time, psutil
from espalier import cli, stages
began = psutil.Process().create_time()
def told(function):
    def call(*arguments):
        entered, spent = time.time() - began, time.process_time()
        function(*arguments)
        print(f"told {entered} {spent} {time.time() - began} {time.process_time()} {'torch' in sys.modules}")
    return call
stages.STAGES = {name: told(function) for name, function in stages.STAGES.items()}
cli.main(sys.argv[1:])
"""


def cpu() -> float:
    """CPU seconds of this process and of those that it waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


@contextmanager
def measured(part: str, **facts: Any) -> Iterator[dict[str, Any]]:
    """Time the block and print a line; what is put into the yielded dictionary is printed too."""
    start, spent = time.monotonic(), cpu()
    yield facts
    line = {"part": part, "seconds": round(time.monotonic() - start, 2), "cpu_seconds": round(cpu() - spent, 2)}
    print(json.dumps(line | facts), flush=True)


def round2(text: str) -> float:
    return round(float(text), 2)


def espalier(*arguments: str) -> str:
    """Run the command line and return what it printed."""
    run = subprocess.run([sys.executable, "-m", "espalier", *arguments], capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(run.stdout + run.stderr)
    return run.stdout + run.stderr


def pretend_done(experiment: graph.Experiment, store: Store) -> None:
    """Write an empty artefact for every job, each newer than its parents."""
    nodes = [store.read_node(node.id) for node in experiment.nodes]
    documents = {node["made_by"] or node["id"]: store.read_node(node["made_by"] or node["id"]) for node in nodes}
    depths: dict[str, int] = {}

    def depth(id: str) -> int:
        if id not in depths:
            node = store.read_node(id)
            depths[id] = 1 + max(map(depth, [*node["parents"], *filter(None, [node["made_by"]])]), default=0)
        return depths[id]

    start = time.time() - 10_000
    for id, document in documents.items():
        path = store.path(document)
        folder = document["stage"] in ("apply", "tune")
        path.parent.mkdir(parents=True, exist_ok=True)
        stamp = path / ".snakemake_timestamp" if folder else path  # how Snakemake dates a folder
        stamp.parent.mkdir(exist_ok=True)
        stamp.touch()
        os.utime(stamp, (start + depth(id),) * 2)


def sweep(cores: str) -> None:
    """Time the sweep's parts in this process, then whole commands."""
    with measured("points") as facts:
        composer = Composer(NAME, [])
        found = list(points(composer.sweep()))
        facts["points"] = len(found)
    with measured("composition"):
        for point in found:
            composer.compose(point)
    store = Store("results", dry=True)
    with measured("expansion, with composition") as facts:
        experiment = graph.expand(NAME, [], store)
        facts["nodes"] = len(experiment.nodes)
    with measured("bundles"):
        graph.save(experiment, store)
    jobs = {store.read_node(node.id)["made_by"] or node.id for node in experiment.nodes}
    with measured("requests of jobs") as facts:
        requests = Requests(store, Hardware.load("here"), experiment.run["runtime"])
        for id in jobs:
            requests.of(id)
        facts |= Counter(store.read_node(id)["stage"] for id in jobs)
    with measured("espalier run -n, nothing done"):
        espalier("run", NAME, "-n", "--cores", cores)
    with measured("espalier estimate"):
        espalier("estimate", NAME, "--flops", "1e11", "--disk", "1e9")
    store = Store("results")
    with measured("nodes written"):
        graph.save(experiment, store)
    pretend_done(experiment, store)
    with measured("espalier run, everything done") as facts:
        facts["nothing to be done"] = "Nothing to be done" in espalier("run", NAME, "--cores", cores)


def starts() -> None:
    """Time the start of each job of a small experiment, and the whole job."""
    (Path("conf/experiment") / "small.yaml").write_text(SMALL)
    store = Store("small")
    experiment = graph.expand("small", [], store)
    graph.save(experiment, store)
    jobs = dict.fromkeys(store.read_node(node.id)["made_by"] or node.id for node in experiment.nodes)
    for id in jobs:
        node = store.read_node(id)
        command = [sys.executable, "-c", TOLD, node["stage"], id, "--results", "small"]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        told = next(line for line in run.stdout.splitlines() if line.startswith("told ")).split()[1:]
        seconds = dict(
            zip(("until", "cpu_until", "whole", "cpu_whole"), [round(float(t), 2) for t in told[:4]], strict=True)
        )
        print(
            json.dumps({"job": f"{node['stage']} {node['label']}"} | seconds | {"torch": told[4] == "True"}), flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experiment", type=Path, default=ROOT / "benchmarks" / "thousand.yaml")
    parser.add_argument("--cores", default="2")
    options = parser.parse_args()
    yaml = options.experiment.read_text()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for name in ("conf", "workflow"):
            shutil.copytree(ROOT / name, name)
        for name in ("Snakefile", "environment.yml"):
            shutil.copy(ROOT / name, name)
        (Path("conf/experiment") / f"{NAME}.yaml").write_text(yaml)
        sweep(options.cores)
        starts()


if __name__ == "__main__":
    main()
