"""Triton where it is installed; without it kernels cannot be launched, and their references run.

Kernels run on a GPU, or anywhere under Triton's interpreter (TRITON_INTERPRET=1 before this module is imported).
"""

import importlib.util
import os
from types import SimpleNamespace
from typing import Any

import torch

INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETED = INSTALLED and os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")

if INSTALLED:
    import triton
    import triton.language as tl

    jit: Any = triton.jit
else:
    tl = SimpleNamespace(constexpr=None)  # what annotations of kernels name

    class _Refuse:
        """Stands for a kernel: asked to run, it says what is missing."""

        def __init__(self, function: Any) -> None:
            self.name = function.__name__

        def __getitem__(self, grid: Any) -> Any:
            raise RuntimeError(f"{self.name} needs triton, which is not installed: pip install triton")

    jit = _Refuse

__all__ = ["INSTALLED", "INTERPRETED", "jit", "power_of_2", "runs_on", "tl"]


def runs_on(device: torch.device) -> bool:
    """Whether Triton kernels run on tensors of `device`."""
    return INSTALLED and (INTERPRETED or device.type == "cuda")  # ROCm's devices are called cuda, too


def power_of_2(number: int) -> int:
    """Return the smallest power of 2 that is not below `number` >= 1."""
    return 1 << (number - 1).bit_length()
