"""How models are run (conf/runtime): device, batch sizes, and whether a model is loaded whole or layer by layer."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier import conf
from espalier.errors import UserError, nearest
from espalier.machine import heap, limits

if TYPE_CHECKING:
    from espalier.checkpoints.checkpoint import Checkpoint

WHERE = "conf/runtime"
STREAM = ("auto", "always", "never")
CHECKPOINTS = ("keep", "temporary")
DEVICES = ("cpu", "cuda", "mps", "xpu")
COUNTS = ("collect_batch_size", "score_batch_size", "apply_workers")
EXPERTS = ("auto", "eager", "grouped_mm", "batched_mm", "espalier")
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
WORKING_BYTES = 1.5e9  # of activations, probes and libraries beside a loaded model


@dataclass(frozen=True)
class Running:
    """The settings of conf/runtime, checked.

    `experts`: how MoE blocks compute where a model scores or is timed; `auto` is Espalier's kernels on a processor and
    transformers' own choice on a GPU. `stream`: `auto` loads a model whole where it fits, else one decoder layer at a
    time. `activation_memory`, in bytes, bounds the hidden states that streaming keeps in memory; more go to a file
    below `scratch` (default: the system's temporary directory). `checkpoints`: `temporary` ones are made by the job
    that scores them, below `scratch` too. UserError for an unknown key or value.
    """

    device: str
    experts: str
    stream: str
    activation_memory: float
    scratch: Path | None
    checkpoints: str
    collect_batch_size: int
    score_batch_size: int
    apply_workers: int

    @classmethod
    def of(cls, config: dict[str, Any] | None = None, **changes: Any) -> Running:
        """Return the settings of a composed `runtime` (default: conf/runtime/default.yaml), some replaced."""
        values = (conf.load("runtime", "default") if config is None else dict(config)) | changes
        values.pop("name", None)
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise UserError(f"{WHERE}: unknown key {key!r}; {nearest(key, known)}.")
        for key, allowed in (("stream", STREAM), ("experts", EXPERTS), ("checkpoints", CHECKPOINTS)):
            if values[key] not in allowed:
                raise UserError(f"{WHERE}: {key}={values[key]!r}; {nearest(str(values[key]), list(allowed))}.")
        if not re.fullmatch(rf"auto|({'|'.join(DEVICES)})(:\d+)?", str(values["device"])):
            hint = nearest(str(values["device"]), ["auto", *DEVICES])
            raise UserError(f"{WHERE}: device={values['device']!r}; {hint}, or with a number: cuda:1.")
        for key in COUNTS:
            if isinstance(values[key], bool) or not isinstance(values[key], int) or values[key] < 1:
                raise UserError(f"{WHERE}: {key}={values[key]!r}, expected a whole number >= 1.")
        values["activation_memory"] = byte_count(values["activation_memory"], "activation_memory")
        values["scratch"] = Path(os.path.expandvars(values["scratch"])) if values["scratch"] else None
        return cls(**values)

    def torch_device(self) -> str:
        """Return the torch device, `auto` is the first GPU, else the processor; what libraries cache is bounded."""
        import torch

        heap.bound_primitives()
        if self.device != "auto":
            return self.device
        return "cuda" if torch.cuda.is_available() else "cpu"

    def experts_implementation(self) -> str | None:
        """Return the experts implementation to ask transformers for, None to leave it to choose."""
        if self.experts != "auto":
            return self.experts
        return "espalier" if self.torch_device() == "cpu" else None

    def streams(self, checkpoint: Checkpoint, dtype: str) -> bool:
        """Whether the model of `checkpoint` is to be run layer by layer when it computes in `dtype`."""
        if self.stream != "auto":
            return self.stream == "always"
        return exceeds(loaded_bytes(checkpoint, dtype), free_bytes(self.torch_device()))


def check_dtype(dtype: Any) -> None:
    """Raise UserError where models cannot compute in `dtype`, the value of model.dtype."""
    known = ["auto", *DTYPE_BYTES]
    if dtype not in known:
        raise UserError(f"model.dtype={dtype}; {nearest(str(dtype), known)}.")


def exceeds(loaded: float, free: float) -> bool:
    """Whether a model of `loaded` bytes is too large to be run whole in `free` bytes of memory."""
    return loaded + WORKING_BYTES > free


def loaded_bytes(checkpoint: Checkpoint, dtype: str) -> float:
    """Return the memory that the whole model takes in `dtype` (`auto`: as stored), in bytes."""
    if dtype in DTYPE_BYTES:
        return float(checkpoint.parameters * DTYPE_BYTES[dtype])
    return float(sum(entry.nbytes for entry in checkpoint.entries.values()))


def free_bytes(device: str) -> float:
    """Return the free memory of a device in bytes, of the processor's as control groups and Slurm limit it."""
    import torch

    if torch.device(device).type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return limits.free_memory()


def byte_count(value: Any, key: str) -> float:
    """Return the bytes that `4GB`, `512MB` or a plain number mean; UserError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([KMGT]?B)?\s*", str(value), re.IGNORECASE)
    if match is None:
        raise UserError(f"{WHERE}: {key}={value!r} is no number of bytes. Write it like 4GB or 512MB.")
    return float(match[1]) * UNITS[(match[2] or "B").upper()]
