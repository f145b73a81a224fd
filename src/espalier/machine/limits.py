"""How much memory this process may still take: what is free, its control groups and its Slurm job; imports no torch."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

# By version of control groups: below their mount, a level's limit and use, and the page cache in that use.
FILES = {
    2: ("memory.max", "memory.current", ("inactive_file", "active_file")),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
}


def free_memory(root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> float:
    """Return the least of the machine's available memory and what each limit leaves, in bytes.

    `root` holds `proc` and `sys`.
    """
    import psutil

    bounds = [float(psutil.virtual_memory().available), *group_bounds(root)]
    job = slurm_bytes(environ)
    if job is not None:
        bounds.append(job - psutil.Process().memory_info().rss)
    return max(min(bounds), 0.0)


def group_bounds(root: Path = Path("/")) -> Iterator[float]:
    """Yield what this process's memory control group and each one above it leave, in bytes; cached files are free."""
    mount = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield from _levels(mount / "unified" if (mount / "unified").is_dir() else mount, path, 2)
        elif "memory" in controllers.split(","):
            yield from _levels(mount / "memory", path, 1)


def _levels(mount: Path, path: str, version: int) -> Iterator[float]:
    """Walk from a group up to the mount; in a container `path` may be the host's, and only its upper end there."""
    limit_name, used_name, cached = FILES[version]
    group = mount / path.lstrip("/")
    for level in (group, *group.parents):
        try:
            limit, used = (int((level / name).read_text()) for name in (limit_name, used_name))
            stat = dict(line.split() for line in (level / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # no limit (`max`), or no such level here
            pass
        else:
            yield float(limit - used + sum(int(stat.get(name, 0)) for name in cached))
        if level == mount:
            return


def slurm_bytes(environ: Mapping[str, str] = os.environ) -> float | None:
    """Return the memory of this Slurm job on its node in bytes; None outside of one, or where it has the whole node."""
    try:
        megabytes = int(environ.get("SLURM_MEM_PER_NODE") or 0)
        if not megabytes and environ.get("SLURM_MEM_PER_CPU"):
            megabytes = int(environ["SLURM_MEM_PER_CPU"]) * int(environ["SLURM_CPUS_ON_NODE"])
    except (KeyError, ValueError):
        return None
    return megabytes * 2.0**20 or None
