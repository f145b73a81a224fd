"""The demo, cut down, on a real Slurm of one node: out of memory, killed, cancelled, resumed; `make slurm` runs it.

    python tests/slurm_demo.py [--seed N] [--keep] [DIR]

Its table must be that of a local run. Leave the source tree alone meanwhile: a table says whether it was clean.
Exits with 3 where no Slurm can be brought up (tests/slurm_up.sh says why).
"""

import argparse
import csv
import difflib
import io
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
UP = ROOT / "tests" / "slurm_up.sh"
OVERRIDES = [
    "evaluation.limit=10",
    "evaluation.tasks=[perplexity_maths,maths_choice]",
    "calibration.samples=8",
    "sweep=[{method: none},{method: reap, method.ratio: 0.5},{method: naee_skip}]",
]
# What the runs say of themselves: their commands, the seconds that plans took, the commit, which may change meanwhile.
RECORDED = ("runs", "command", "plan_seconds", "commit", "commits", "dirty")


class Demo:
    """One walk through Slurm, in a folder of its own."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.project, self.draw = folder, folder / "project", random.Random(seed)
        self.scratch = folder / "scratch"
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm/slurm.conf")}
        self.begun = time.monotonic()

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.begun:5.0f} s] {text}", flush=True)

    def prepare(self) -> None:
        """Copy what a run reads, and cut the profile to this node: two cores, no accounting, and a look every 3 s."""
        for name in ("conf", "workflow"):
            shutil.copytree(ROOT / name, self.project / name, dirs_exist_ok=True)
        for name in ("Snakefile", "environment.yml"):
            shutil.copy(ROOT / name, self.project)
        path = self.project / "workflow/profiles/slurm/config.yaml"
        profile = yaml.safe_load(path.read_text())
        profile["set-threads"] = dict.fromkeys(profile["set-threads"], 1)
        profile["group-components"] = ["small_plan=20", "small_apply=20", "small_score=2"]
        profile |= {"latency-wait": 10, "slurm-status-command": "squeue", "slurm-init-seconds-before-status-checks": 3}
        path.write_text(yaml.safe_dump(profile))

    def machine(self, memory: float) -> None:
        """Say what the nodes are, with GPUs to ask for, and how much of the memory that jobs need they ask for."""
        path = self.project / "workflow/profiles/slurm/machine.yaml"
        path.write_text(f"hardware: a100_80gb\nmemory: {memory}\n")

    def run(self, results: str, *options: str) -> subprocess.Popen[bytes]:
        """Start `espalier run demo`; what it says goes to a file beside its results."""
        command = [sys.executable, "-m", "espalier", "run", "demo", *OVERRIDES, "--results", results, *options]
        log = (self.folder / f"{results}.log").open("ab")
        return subprocess.Popen(
            command, cwd=self.project, env=self.environment, stdout=log, stderr=log, start_new_session=True
        )

    def on_slurm(self) -> subprocess.Popen[bytes]:
        return self.run(
            "slurm", "--profile", "slurm", "runtime.checkpoints=temporary", f"runtime.scratch={self.scratch}"
        )

    def log(self, results: str) -> str:
        """What a run has said so far."""
        return (self.folder / f"{results}.log").read_text()

    def finish(self, run: subprocess.Popen[bytes], results: str) -> None:
        code = run.wait(900)
        check(code == 0, f"the {results} run ended with {code}:\n{self.log(results)[-6000:]}")

    def squeue(self, state: str, rule: str = "") -> list[str]:
        """The ids of the jobs in a state, or of those of a rule."""
        command = ["squeue", "--noheader", f"--states={state}", "--format=%A %k"]
        lines = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=True).stdout
        return [line.split()[0] for line in lines.splitlines() if rule in line]

    def wait_for(self, what: str, run: subprocess.Popen[bytes], done) -> None:
        """Wait until `done()` is true while the run is at work."""
        for _ in range(1200):
            if done():
                return
            check(run.poll() is None, f"the run ended before {what}:\n{self.log('slurm')[-6000:]}")
            time.sleep(0.25)
        check(False, f"waited five minutes for {what}:\n{self.log('slurm')[-6000:]}")

    def walk(self) -> None:
        self.prepare()
        self.say("a local run, whose table is the one to reach")
        self.machine(1.0)
        self.finish(self.run("local", "--cores", str(len(os.sched_getaffinity(0)))), "local")

        self.say("on Slurm, where jobs ask for too little memory at first")
        self.machine(0.17)
        run = self.on_slurm()
        self.wait_for("the calibration pass", run, lambda: any((self.project / "slurm/stats").glob("*.safetensors")))
        before = self.squeue("RUNNING")
        asked = [int(mb) for mb in re.findall(r"collect \w+: .*\((\d+) MB", self.log("slurm"))]
        self.say(f"the calibration pass asked for {asked} MB, attempt by attempt")
        check(len(asked) > 1 and asked == sorted(set(asked)), f"no attempt was killed for memory: {asked}")

        shown = subprocess.run(["scontrol", "show", "job"], env=self.environment, capture_output=True, text=True).stdout
        check(re.search(r"gres[:/]gpu[:=]1", shown) is not None, f"no job asked for a GPU:\n{shown}")

        second = subprocess.run(
            [sys.executable, "-m", "espalier", "run", "demo", *OVERRIDES, "--results", "slurm", "--profile", "slurm"],
            cwd=self.project, env=self.environment, capture_output=True, text=True,
        )  # fmt: skip
        check(second.returncode == 2 and len(second.stderr.splitlines()) == 1, f"two runs at once: {second.stderr}")
        self.say(f"a second run is refused: {second.stderr.strip()[:110]} ...")

        self.wait_for("a job after it", run, lambda: bool(set(self.squeue("RUNNING")) - set(before)))
        time.sleep(self.draw.uniform(0, 2))
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        left = self.squeue("PENDING,RUNNING")
        self.say(f"the main process is killed; in the queue stay {left}")

        self.machine(1.0)
        run = self.on_slurm()
        cancelled: list[str] = []
        while not cancelled:
            self.wait_for("a job that scores", run, lambda: bool(self.squeue("RUNNING", "score")))
            time.sleep(self.draw.uniform(0, 4))
            cancelled = self.squeue("RUNNING", "score")[:1]
        subprocess.run(["scancel", *cancelled], env=self.environment, check=True)
        self.say(f"resumed; job {cancelled} is cancelled")
        self.finish(run, "slurm")
        check(not left or "cancelling" in self.log("slurm"), "the killed run's jobs were not cancelled")
        check(
            "Trying to restart" in self.log("slurm").rpartition("Building DAG")[2],
            "the cancelled job was not tried again",
        )
        self.compare()

    def compare(self) -> None:
        """The tables of both runs, byte by byte, but for what time and place change."""
        local, slurm = (self.project / results / "refs/demo" for results in ("local", "slurm"))
        for name in ("table.csv", "table.tex", "table.md", "table.json"):
            one, other = ((folder / name).read_text() for folder in (local, slurm))
            difference = "\n".join(difflib.unified_diff(one.splitlines(), other.splitlines(), "local", "slurm"))
            check(timeless(name, one) == timeless(name, other), f"{name} differs:\n{difference}")
        jobs = [json.loads(path.read_text()) for path in (self.project / "slurm").glob("*/*.run.json")]
        ids = {record["slurm_job"] for record in jobs} - {None}
        check(len(ids) >= 3, f"jobs of Slurm made what there is: {ids}")
        check(not list((self.project / "slurm/checkpoints").glob("*")), "checkpoints were to be temporary")
        check(not any(self.scratch.iterdir()), f"left in scratch: {list(self.scratch.iterdir())}")
        self.say(f"the tables are the same, byte by byte; {len(ids)} jobs of Slurm made {len(jobs)} artefacts")
        starts = [s for record in jobs if (s := self.start_up(record)) is not None]
        if starts:
            self.say(f"from the start of a job to that of its first stage: {statistics.median(starts):.0f} s (median)")
        print((slurm / "table.md").read_text().split("\n## ")[0])

    def start_up(self, record: dict) -> float | None:
        """Seconds from the start of a record's Slurm job to that of its stage; None where Slurm has forgotten it."""
        command = ["scontrol", "show", "job", str(record["slurm_job"])]
        shown = subprocess.run(command, env=self.environment | {"TZ": "UTC"}, capture_output=True, text=True).stdout
        started = re.search(r"StartTime=(\S+)", shown)
        if started is None:
            return None
        begin = datetime.fromisoformat(record["start"].rstrip("Z"))
        return (begin - datetime.fromisoformat(started[1])).total_seconds()


def timeless(name: str, text: str) -> object:
    """What of a rendering does not depend on when and where it was made."""
    if name == "table.json":

        def strip(value):
            if isinstance(value, dict):
                return {key: strip(part) for key, part in value.items() if key not in RECORDED}
            return [strip(part) for part in value] if isinstance(value, list) else value

        return json.dumps(strip(json.loads(text)))
    if name == "table.csv":
        rows = list(csv.reader(io.StringIO(text)))
        kept = [n for n, column in enumerate(rows[0]) if column not in RECORDED]
        return [[row[n] for n in kept] for row in rows]
    if name != "table.md":
        return text
    lines = [line.split("|") for line in text.splitlines()]
    drop = next(n for cells in lines for n, cell in enumerate(cells) if cell.strip() == "plan s")
    head = next(n for n, cells in enumerate(lines) if any(cell.strip() == "plan s" for cell in cells))
    for cells in lines[head:]:
        if len(cells) <= drop:
            break
        del cells[drop]
    return "\n".join("|".join(cells) for cells in lines)


def check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise SystemExit(f"slurm_demo: {otherwise}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which it kills")
    parser.add_argument("--keep", action="store_true", help="do not delete the folder")
    options = parser.parse_args()
    folder = (options.folder or Path(tempfile.mkdtemp(prefix="espalier-slurm-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    up = subprocess.run([str(UP), "up", str(folder / "slurm")], env=os.environ | {"GPUS": "2"})
    if up.returncode:
        print("slurm_demo: NOT TRIED, there is no Slurm here", file=sys.stderr)
        raise SystemExit(up.returncode)
    demo = Demo(folder, options.seed)
    try:
        demo.walk()
    finally:
        everything = ["scancel", "--state=PENDING"], ["scancel", "--state=RUNNING"]
        for command in everything:
            subprocess.run(command, env=demo.environment)
        time.sleep(1)
        subprocess.run([str(UP), "down", str(folder / "slurm")])
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
