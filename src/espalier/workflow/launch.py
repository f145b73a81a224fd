"""Run an experiment: hand it to Snakemake, one run at a time in a results folder."""

import contextlib
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TextIO

from espalier.artefacts.partial import NO_LOCKS
from espalier.errors import UserError, nearest
from espalier.workflow.orphans import cancel_orphans, job_prefix

LOCK = ".run.lock"
MACHINE = "machine.yaml"  # of a profile: what its nodes are
LIFE = 120.0  # seconds after which a run on another host that no longer renews its lock counts as gone


def run(
    experiment: str,
    overrides: list[str],
    *,
    results: Path = Path("results"),
    dry: bool = False,
    cores: int | None = None,
    profile: str = "default",
    tracking: str | None = None,
) -> int:
    """Run Snakemake on the project's Snakefile and return its exit code.

    `cores`: processors to use at once (default: those this process may use; a cluster profile sets its own number
    of jobs). `tracking`: a name of conf/tracking. A dry run writes nothing and needs no lock. UserError before
    anything starts: unknown names or keys, no Snakefile, another run at work in `results`, no key for tracking=online.
    """
    from espalier import tracking as service
    from espalier.artefacts.store import Store
    from espalier.machine.hardware import HERE, Hardware
    from espalier.workflow.graph import expand
    from espalier.workflow.slow_dtype import slow_dtype

    overrides = [*overrides, f"tracking={tracking}"] if tracking else list(overrides)
    root = project()
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(root / "Snakefile")]
    folder = _profile(root, profile)
    command += ["--profile", str(folder)]
    if (folder / MACHINE).is_file():
        command += ["--configfile", str(folder / MACHINE)]
    slurm = executor(folder) == "slurm"
    if slurm:
        command += ["--slurm-jobname-prefix", job_prefix(results)]
    if profile == "default" or cores is not None:
        command += ["--cores", str(cores or len(os.sched_getaffinity(0)))]
    # Quoted: Snakemake reads a folder called 2026 as a number.
    settings = {"experiments": [experiment], "overrides": overrides, "results": str(results)}
    config = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    # A user's mistake is one line here, not a traceback there.
    expanded = expand(experiment, overrides, Store(results, dry=True))
    if dry:
        return _call([*command, "--dry-run", "--config", *config])
    service.check(expanded.run["tracking"])
    slow = None if slurm else slow_dtype(expanded, Hardware.load(HERE))
    if slow:
        print(f"espalier: {slow}", file=sys.stderr)
    with run_lock(results, experiment) as descriptor:
        if slurm:
            cancel_orphans(results)
        if stale_lock(Path.cwd()):
            print("espalier: removing the lock that a killed run left behind", file=sys.stderr)
            _call([*command, "--unlock", "--config", *config], descriptor)
        return _call([*command, "--config", *config], descriptor)


def project() -> Path:
    """Return the folder of the Snakefile: the working directory, else the source tree; UserError without one."""
    for root in (Path.cwd(), Path(__file__).resolve().parents[3]):
        if (root / "Snakefile").is_file():
            return root
    raise UserError(
        "Snakefile: not found here. Run `espalier run` in the project's folder, or use `espalier compress`."
    )


def _profile(root: Path, name: str) -> Path:
    folder = root / "workflow" / "profiles"
    path = folder / name if "/" not in name else Path(name)
    if not (path / "config.yaml").is_file():
        known = [p.parent.name for p in folder.glob("*/config.yaml")]
        raise UserError(f"profile={name}: no {path}/config.yaml; {nearest(name, known)}.")
    return path


def executor(profile: Path) -> str:
    """Return what runs the jobs of a profile's folder: `local`, `slurm` or another of Snakemake's executors."""
    import yaml

    settings = yaml.safe_load((profile / "config.yaml").read_text()) or {}
    return str(settings.get("executor", "local"))


def tell_jobs(source: Path, runtime: str) -> None:
    """Set what jobs inherit from the main process, on this machine and through sbatch --export=ALL.

    They run this Python, find the package in `source` and the run's settings under the hash `runtime`.
    """
    python, search = str(Path(sys.executable).parent), str(source.resolve())
    os.environ["PATH"] = os.pathsep.join([python, os.environ.get("PATH", os.defpath)])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [search, os.environ.get("PYTHONPATH")]))
    os.environ["ESPALIER_RUNTIME"] = runtime


@contextlib.contextmanager
def run_lock(results: Path, experiment: str) -> Iterator[int]:
    """Hold the lock of a results folder and yield its file descriptor, which Snakemake inherits.

    The kernel drops it when the last process that holds it ends: no kill leaves it behind, and a Snakemake that
    outlives its parent still has it. Some shared file systems lock for one host only: there the file's time, which a
    run renews, says that one on another host is alive. UserError when another run holds it.
    """
    results.mkdir(parents=True, exist_ok=True)
    path = results / LOCK
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            refused = _alive_elsewhere(file)
        except BlockingIOError:
            refused = True
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            refused = _alive_elsewhere(file)
        if refused:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise UserError(
                f"{path}: another run is at work in {results} ({owner}). Wait for it, or give --results another "
                f"folder; one that was killed on another host counts as gone after {LIFE:.0f} s."
            )
        file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"{experiment}, process {os.getpid()} on {socket.gethostname()}, since {since}\n")
        file.flush()
        os.set_inheritable(file.fileno(), True)
        done = threading.Event()
        threading.Thread(target=_renew, args=(file.fileno(), done), daemon=True).start()
        try:
            yield file.fileno()
        finally:
            done.set()
            file.truncate(0)


def _alive_elsewhere(file: TextIO) -> bool:
    """Whether the lock's file names a run on another host that renewed it lately, by the file system's clock."""
    file.seek(0)
    owner = re.search(r" on (\S+), since ", file.read())
    if owner is None or owner[1] == socket.gethostname():
        return False
    renewed = os.fstat(file.fileno()).st_mtime
    with tempfile.TemporaryFile(dir=Path(file.name).parent) as now:
        return os.fstat(now.fileno()).st_mtime - renewed < LIFE


def _renew(descriptor: int, done: threading.Event) -> None:
    while not done.wait(LIFE / 6):
        with contextlib.suppress(OSError):
            os.utime(descriptor)


def stale_lock(directory: Path) -> bool:
    """Whether Snakemake's own lock lies in `directory` and no Snakemake works there on this machine.

    Call it while holding the run lock: what remains to be looked for is a `snakemake` started by hand. Jobs of a
    cluster are processes of Snakemake too, but do without the lock.
    """
    locks = directory / ".snakemake" / "locks"
    if not locks.is_dir() or not any(locks.iterdir()):
        return False
    import psutil

    for process in psutil.process_iter(["cmdline", "cwd"]):
        words = [Path(word).name for word in process.info["cmdline"] or [] if word]
        here = process.info["cwd"] and Path(process.info["cwd"]) == directory.resolve()
        holds = "snakemake" in words and "--nolock" not in words
        if here and holds and process.pid != os.getpid():
            return False
    return True


def _call(command: list[str], lock: int | None = None) -> int:
    """Run a command and return its exit code; an interrupt or a SIGTERM waits until it has stopped its jobs."""
    process = subprocess.Popen(command, pass_fds=[] if lock is None else [lock])

    def forward(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    before = signal.signal(signal.SIGTERM, forward)
    try:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                # The terminal sent the interrupt to Snakemake too, which ends its jobs.
                process.wait()
                raise
    finally:
        signal.signal(signal.SIGTERM, before)
