"""Slurm jobs of a run whose main process is gone: found by their name, cancelled before the next run starts."""

import hashlib
import subprocess
import sys
import time
from pathlib import Path

from espalier.errors import UserError

WAIT = 180.0  # seconds: Slurm kills what a cancelled job leaves after KillWait, 30 by default


def job_prefix(results: Path) -> str:
    """Return what the names of a results folder's jobs start with: no two folders of a cluster share it."""
    return f"espalier-{hashlib.sha256(str(results.resolve()).encode()).hexdigest()[:12]}"


def cancel_orphans(results: Path) -> int:
    """Cancel the jobs of `results` that are in the queue, wait until they are gone, and return how many there were.

    Call it while holding the run lock: whoever submitted them is dead, and two jobs would write one artefact.
    UserError when Slurm does not answer, or some are still there after three minutes.
    """
    prefix = job_prefix(results)
    found = _queued(prefix)
    if not found:
        return 0
    print(f"espalier: cancelling {len(found)} jobs that a killed run left in the queue", file=sys.stderr)
    _slurm("scancel", *found)
    end = time.monotonic() + WAIT
    while left := _queued(prefix):
        if time.monotonic() > end:
            raise UserError(
                f"{results}: jobs {', '.join(left)} of a killed run are still in Slurm's queue. Wait until "
                "`squeue --me` no longer shows them, then run again."
            )
        time.sleep(1)
    return len(found)


def _queued(prefix: str) -> list[str]:
    lines = _slurm("squeue", "--me", "--noheader", "--format=%A|%j").splitlines()
    jobs = (line.strip().partition("|") for line in lines)
    return sorted({id for id, _, name in jobs if name.startswith(prefix)})


def _slurm(*command: str) -> str:
    try:
        run = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(f"{command[0]}: not found. Run on a login node of the cluster, or without --profile.") from None
    if run.returncode:
        raise UserError(f"{command[0]}: {' '.join(run.stderr.split()) or run.returncode}. Slurm has to answer first.")
    return run.stdout
