"""Machines that costs are computed for (conf/hardware): speed, memory, disk; imports no torch."""

import os
import subprocess
import tempfile
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from espalier import conf
from espalier.errors import UserError, nearest
from espalier.machine import limits

HERE = "here"
TEST_BYTES = 2**26  # written and read to measure a disk
EFFICIENCY = 0.4  # of a large matrix product's FLOP/s, that a forward pass reaches


@dataclass(frozen=True)
class Hardware:
    """One node. FLOP/s are of a large matrix product, of all processor cores together or of one GPU.

    `memory` and `gpu_memory` in bytes, `disk` in bytes a second, `startup` in seconds a job. Without a GPU its
    numbers are None.
    """

    name: str
    cores: int
    flops: float
    memory: float
    disk: float
    startup: float
    gpu_flops: float | None = None
    gpu_memory: float | None = None

    @classmethod
    def load(cls, name: str) -> "Hardware":
        """Return conf/hardware/NAME.yaml; what is null there is looked up on this machine.

        UserError for an unknown name or key, or a value that is no number.
        """
        values: dict[str, Any] = conf.load("hardware", name)
        known = [field.name for field in fields(cls)]
        for key, value in values.items():
            if key not in known:
                raise UserError(f"conf/hardware/{name}.yaml: unknown key {key!r}; {nearest(key, known)}.")
            if key != "name" and value is not None and not _number(value):
                raise UserError(f"conf/hardware/{name}.yaml: {key}={value!r} is no number. Write it like 1e12.")
        if values.get("cores") is None:
            values["cores"] = len(os.sched_getaffinity(0))
        if values.get("memory") is None:
            values["memory"] = limits.free_memory()
        if name == HERE and values.get("gpu_memory") is None:
            values["gpu_memory"] = _gpu_memory()
        numbers: dict[str, Any] = {key: value and float(value) for key, value in values.items() if key != "name"}
        return cls(**numbers | {"name": name, "cores": int(values["cores"])})

    def measured(self, folder: Path) -> "Hardware":
        """Return this machine with its processor's speed by a matrix product and its disk's below `folder`."""
        return replace(self, flops=_product_flops(), disk=_disk_speed(folder))

    def gpu(self, device: str) -> bool:
        """Whether a job with the runtime setting `device` runs on a GPU of this machine."""
        return device.startswith("cuda") or (device == "auto" and self.gpu_memory is not None)

    def seconds(self, flops: float, moved: float, *, gpu: bool = False, threads: int | None = None) -> float:
        """Seconds of a job that computes, then moves bytes; `threads` of the cores, all of them by default."""
        if gpu:
            speed = self.gpu_flops or self.flops
        else:
            speed = self.flops * min(threads or self.cores, self.cores) / self.cores
        return flops / (EFFICIENCY * speed) + moved / self.disk + self.startup


def _number(value: Any) -> bool:
    try:
        return float(value) > 0
    except (TypeError, ValueError):
        return False


def _product_flops() -> float:
    """FLOP/s of a product of two float32 matrices."""
    import numpy as np

    n, best = 1024, float("inf")
    a = np.ones((n, n), dtype=np.float32)
    for _ in range(5):  # the fastest: others may be using the machine
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def _disk_speed(folder: Path) -> float:
    """Bytes a second of the slower of writing and reading a file below `folder`, which is removed again."""
    parent = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    block = os.urandom(TEST_BYTES)
    try:
        with tempfile.TemporaryFile(dir=parent) as file:
            start = time.perf_counter()
            file.write(block)
            file.flush()
            os.fsync(file.fileno())
            written = time.perf_counter() - start
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # or memory would be measured
            start = time.perf_counter()
            file.seek(0)
            file.read()
            return TEST_BYTES / max(written, time.perf_counter() - start)
    except OSError as error:
        raise UserError(f"{parent}: cannot be written ({error.strerror}). Give --disk BYTES_PER_SECOND.") from None


def _gpu_memory() -> float | None:
    """Bytes of the first GPU's memory, None without one."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10)
        return float(run.stdout.split()[0]) * 2**20
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return None
