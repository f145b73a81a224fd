"""Look at this machine: what is installed, how much of everything there is, and what of Espalier will work."""

import contextlib
import os
import platform
import re
import shutil
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Literal

from espalier import conf
from espalier.artefacts.provenance import device_name, git_state
from espalier.errors import UserError
from espalier.machine import processor

State = Literal["ok", "note", "missing"]
RUN = ("torch", "transformers", "safetensors", "lm_eval", "datasets", "snakemake")


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    what: str
    found: str
    state: State = "ok"


def examine(results: Path) -> list[Finding]:
    """Return what is found; asks no other machine and writes nothing."""
    findings = [
        Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        *_packages(),
        *_torch(),
        *_machine(results),
        *_optional(),
        _hub(),
        _project(),
    ]
    return findings


def verdict(findings: list[Finding]) -> list[Finding]:
    """Return what of Espalier will work, from what was found."""
    missing = {finding.what for finding in findings if finding.state == "missing"}
    launcher: list[str] = [name for name in ("snakemake", "hydra-core") if name in missing]
    models: list[str] = [name for name in ("torch", "transformers", "safetensors") if name in missing]
    scoring: list[str] = [*models, *(name for name in ("lm_eval", "datasets") if name in missing)]
    whats: list[tuple[str, list[str]]] = [
        ("plan, show, diff, estimate, gc", []),
        ("compress, collect, apply", models),
        ("score", scoring),
        ("run", [*launcher, *([] if "project" not in missing else ["the project's folder"])]),
        ("run --profile slurm", [*launcher, *([] if shutil.which("sbatch") else ["sbatch"])]),
        ("hub models", ["HF_HUB_OFFLINE is set"] if _offline() else []),
    ]
    return [
        Finding(what, f"needs {', '.join(dict.fromkeys(lacks))}" if lacks else "works", "missing" if lacks else "ok")
        for what, lacks in whats
    ]


def render(findings: list[Finding], works: list[Finding]) -> None:
    """Print both lists as tables."""
    from rich.console import Console
    from rich.table import Table

    colour = {"ok": "green", "note": "yellow", "missing": "red"}
    console = Console()
    for title, rows in (("This machine", findings), ("What will work", works)):
        table = Table(title=title, title_justify="left", show_header=False)
        for row in rows:
            table.add_row(row.what, f"[{colour[row.state]}]{row.state}[/]", row.found)
        console.print(table)


def _packages() -> list[Finding]:
    """The packages that results depend on, against requirements.lock where there is one."""
    lock = _lock()
    findings = []
    for name in (*RUN, "hydra-core", "huggingface_hub", "numpy", "scipy"):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            findings.append(Finding(name, "not installed", "missing"))
            continue
        locked = lock.get(name.replace("_", "-").lower())
        same = locked is None or version.split("+")[0] == locked
        findings.append(
            Finding(name, version if same else f"{version}, the lock says {locked}", "ok" if same else "note")
        )
    return findings


def _lock() -> dict[str, str]:
    with contextlib.suppress(UserError):
        path = conf.directory().parent / "requirements.lock"
        if path.is_file():
            pins = re.findall(r"(?m)^([A-Za-z0-9._-]+)==(\S+)", path.read_text())
            return {name.replace("_", "-").lower(): version for name, version in pins}
    return {}


def _torch() -> list[Finding]:
    if util.find_spec("torch") is None:
        return []
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "processor only"
    if getattr(torch.version, "hip", None):
        build = f"ROCm {torch.version.hip}"
    findings = [Finding("torch build", build)]
    if torch.cuda.is_available():
        for n in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(n)
            memory = f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free"
            findings.append(Finding(f"GPU {n}", f"{torch.cuda.get_device_name(n)}, {memory}"))
        findings.append(Finding("bfloat16", "yes" if torch.cuda.is_bf16_supported() else "emulated: use float16 or 32"))
    else:
        fast, slow = sorted(processor.flags() & processor.BFLOAT16), processor.lacks_bfloat16()
        findings.append(Finding("device", device_name()))
        found = f"in hardware ({', '.join(fast)})" if fast else "works, but no faster than float32 on this processor"
        found = "works, but several times as slow as float32 on this processor" if slow else found
        findings.append(Finding("bfloat16", found, "ok" if fast else "note"))
    findings.append(
        Finding("threads", f"{torch.get_num_threads()} for torch, {len(os.sched_getaffinity(0))} processors")
    )
    return findings


def _machine(results: Path) -> list[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    available, total = memory.available, memory.total
    limit = _memory_limit()
    if limit is not None and limit < total:
        available, total = min(available, limit), limit
    existing = next(parent for parent in (results.resolve(), *results.resolve().parents) if parent.exists())
    disk = shutil.disk_usage(existing)
    return [
        Finding("memory", f"{available / 1e9:.1f} of {total / 1e9:.1f} GB available"),
        Finding("disk", f"{disk.free / 1e9:.1f} of {disk.total / 1e9:.1f} GB free at {existing}"),
    ]


def _memory_limit() -> int | None:
    """The container's memory limit in bytes (control groups version 2 or 1), which psutil does not know."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            return int(Path(path).read_text())
    return None


def _optional() -> list[Finding]:
    triton = util.find_spec("triton") is not None
    sbatch = shutil.which("sbatch")
    findings = [
        Finding("triton", metadata.version("triton") if triton else "not installed", "ok" if triton else "note"),
        Finding("wandb", "installed" if util.find_spec("wandb") else "not installed: tracking stays off", "note"),
        Finding("slurm", sbatch or "no sbatch here", "ok" if sbatch else "note"),
    ]
    if sbatch and util.find_spec("snakemake_executor_plugin_slurm") is None:
        findings.append(Finding("slurm plugin", "pip install snakemake-executor-plugin-slurm", "missing"))
    return findings


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _hub() -> Finding:
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    token = "HF_TOKEN set" if os.environ.get("HF_TOKEN") else "no HF_TOKEN"
    if _offline():
        return Finding("hub", f"{endpoint}, HF_HUB_OFFLINE set: downloads are refused", "note")
    return Finding("hub", f"{endpoint}, {token} (not asked)")


def _project() -> Finding:
    from espalier.workflow.launch import project

    try:
        root = project()
    except UserError as error:
        return Finding("project", str(error), "missing")
    state = git_state()
    commit = f", commit {state['commit'][:12]}{' with changes' if state['dirty'] else ''}" if state["commit"] else ""
    return Finding("project", f"{root}{commit}")
