"""Predicted and measured memory, bytes and disk of the embedded model's jobs, in float32 and bf16, whole and streamed.

    python benchmarks/jobs.py [--dtype float32 bfloat16] [--stream never always]

Runs each job of a small experiment (three methods, nine tasks of 50 items) by its own command in a fresh process, as
Snakemake does, and compares it with what `espalier estimate` says and with the memory that the job asks a cluster for
(`asked`, which must not be under the peak of all resident pages). A row is the largest of its stage's jobs; only the
uncompressed model is scored.
Measured as in benchmarks/memory.py. One JSON line a stage on standard output, and a table at the end.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from espalier.artefacts.store import Store, read_json, run_record_path
from espalier.machine.hardware import Hardware
from espalier.workflow import graph
from espalier.workflow.job_requests import Requests
from memory import LEAST, measure

SWEEP = "[{method: none}, {method: [reap, hc_smoe], method.ratio: 0.5}, {method: naee, method.ratio: 0.25}]"
# In this order each job's parents are made before it.
ORDER = ("fetch", "tokens", "collect", "plan", "apply", "score")


def run(dtype: str, stream: str, folder: Path) -> list[dict[str, Any]]:
    """Run all jobs and return one row a stage, sizes in GB."""
    store = Store(folder)
    overrides = [f"sweep={SWEEP}", f"model.dtype={dtype}", f"runtime.stream={stream}", "runtime.device=cpu"]
    overrides += ["evaluation.limit=50", "runtime.score_batch_size=32"]
    expanded = graph.expand("demo", overrides, store)
    graph.save(expanded, store)
    os.environ["ESPALIER_RUNTIME"] = graph.save_run(expanded, store)
    jobs = {store.read_node(node.id)["made_by"] or node.id for node in expanded.nodes}
    requests = Requests(store, Hardware.load("here"), expanded.run["runtime"])
    rows = []
    for stage in ORDER:
        found = []
        for job in (job for job in map(store.read_node, sorted(jobs)) if job["stage"] == stage):
            if stage == "score" and store.parent(job, "fetch", "apply")["stage"] == "apply":
                continue
            command = [sys.executable, "-m", "espalier", stage, job["id"], "--results", str(folder)]
            cost, real = requests.reckoner.cost(job), measure(command, store.path(job).parent)
            resident = read_json(run_record_path(store.path(job)), "espalier.run/1")["peak_rss_bytes"]
            row = {"dtype": dtype, "stream": stream, "stage": stage}
            for key in ("memory", "disk"):
                said = getattr(cost, key)
                row[key], row[f"{key}_predicted"] = round(real[key] / 1e9, 4), round(said / 1e9, 4)
                row[f"{key}_ratio"] = round(said / real[key], 3) if real[key] > LEAST[key] / 10 else None
            asked = requests.of(job["id"])["mem_mb"] * 1e6
            row |= {"resident": round(resident / 1e9, 4), "asked": round(asked / 1e9, 4), "enough": asked > resident}
            found.append(row)
        if stage == "fetch":  # nothing is reckoned for a model that lies in the package
            continue
        rows.append(max(found, key=lambda row: row["memory"]))
        print(json.dumps(rows[-1]), flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown: predicted, measured and their ratio, then what is resident and asked for."""
    lines = [
        "| dtype | stream | job | memory | disk | resident | asked |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        cells = [row["dtype"], row["stream"], row["stage"]]
        for key in ("memory", "disk"):
            said, real, ratio = (row[key + ending] for ending in ("_predicted", "", "_ratio"))
            cells.append("" if ratio is None else f"{said:.3g}, {real:.3g}: {ratio:.2f}")
        lines.append("| " + " | ".join([*cells, f"{row['resident']:.2f}", f"{row['asked']:.2f}"]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--stream", nargs="+", default=["never", "always"])
    options = parser.parse_args()
    rows = []
    for dtype in options.dtype:
        for stream in options.stream:
            with tempfile.TemporaryDirectory() as folder:
                rows += run(dtype, stream, Path(folder))
    print(table(rows))


if __name__ == "__main__":
    main()
