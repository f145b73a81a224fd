"""The record of how an artefact was made: commit, versions, machine, time and memory; imports no torch."""

import contextlib
import os
import platform
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from espalier.artefacts.store import run_record_path, write_json


@contextlib.contextmanager
def run_record(artefact: Path, node: dict[str, Any] | None = None, **facts: Any) -> Iterator[dict[str, Any]]:
    """Measure the enclosed block, then write `{artefact}.run.json` (provenance; design section 4).

    The yielded dictionary may be filled with further facts. Seconds are wall time; peak memory is in bytes.
    """
    record: dict[str, Any] = dict(facts)
    start = time.time()
    yield record
    usage = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    record = {
        "format": "espalier.run/1",
        "node": node["id"] if node else None,
        "parents": node["parents"] if node else [],
        **git_state(),
        "argv": sys.argv,
        "versions": versions(),
        "host": socket.gethostname(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "device": device_name(),
        "start": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(start)),
        "seconds": round(time.time() - start, 3),
        "peak_rss_bytes": usage * 1024,
        "peak_gpu_bytes": peak_gpu_bytes(),
        **record,
    }
    write_json(run_record_path(artefact), record)


def git_state() -> dict[str, Any]:
    """Return the commit of the source tree and whether it is dirty; None for an installed package, or without git."""
    tree = Path(__file__).resolve().parents[3]
    if not (tree / ".git").exists():
        return {"commit": None, "dirty": None}
    commit = _git(tree, "rev-parse", "HEAD")
    dirty = bool(_git(tree, "status", "--porcelain", "--untracked-files=no")) if commit else None
    return {"commit": commit or None, "dirty": dirty}


def _git(tree: Path, *argv: str) -> str:
    try:
        return subprocess.run(["git", "-C", str(tree), *argv], capture_output=True, text=True).stdout.strip()
    except OSError:  # not installed: the artefact is made and must not be lost for want of it
        return ""


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that results depend on, as installed."""
    found = {"python": platform.python_version()}
    for name in ("espalier", "torch", "transformers", "safetensors", "lm_eval", "triton", "numpy", "scipy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def device_name() -> str:
    """Return the GPU's name when torch is loaded and sees one, else the processor's."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def peak_gpu_bytes() -> int | None:
    """Return the peak of torch's GPU memory in bytes, or None without a GPU."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return None
