"""Hidden states of all calibration tokens between two decoder layers, in memory or in a scratch file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from espalier.artefacts.store import atomic_file, stable_header
from espalier.errors import UserError


class Activations:
    """The hidden states [B, L, D] of each micro-batch, in the dtype that the model computes in.

    With more than `memory` bytes in all they lie in a nameless file below `scratch`, whose pages the system
    writes out when memory is short; else in memory. UserError when the disk of `scratch` has no room.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        hidden: int,
        dtype: torch.dtype,
        memory: float = float("inf"),
        scratch: Path | None = None,
    ) -> None:
        self.shapes = [(*shape, hidden) for shape in shapes]
        numbers = sum(map(prod, self.shapes))
        self.nbytes = numbers * dtype.itemsize
        self._file = None
        if self.nbytes > memory:
            self._file = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115 - lives as long as its mapping
            self._reserve(scratch)
            flat = torch.from_file(f"/proc/self/fd/{self._file.fileno()}", shared=True, size=numbers, dtype=dtype)
        else:
            flat = torch.empty(numbers, dtype=dtype)
        self._flat = flat
        self._batches = []
        for shape in self.shapes:
            part, flat = flat[: prod(shape)], flat[prod(shape) :]
            self._batches.append(part.view(shape))

    def _reserve(self, scratch: Path | None) -> None:
        assert self._file is not None
        try:
            # Now and not page by page: a full disk would kill the process at some later write.
            os.posix_fallocate(self._file.fileno(), 0, self.nbytes)
        except OSError as error:
            raise UserError(
                f"{scratch or tempfile.gettempdir()}: no room for {self.nbytes / 1e9:.2f} GB of activations "
                f"({error.strerror}). Raise runtime.activation_memory, set runtime.scratch, or use fewer tokens."
            ) from None

    def __getitem__(self, batch: int) -> Tensor:
        return self._batches[batch]

    def __setitem__(self, batch: int, hidden: Tensor) -> None:
        self._batches[batch].copy_(hidden)

    def save(self, path: Path, metadata: dict[str, str]) -> None:
        """Write all of them to a safetensors file, whole or not at all."""
        with atomic_file(path) as temporary:
            save_file({"hidden": self._flat}, temporary, metadata)
            stable_header(temporary)

    def load(self, path: Path) -> None:
        """Read what `save` wrote."""
        with safe_open(path, "pt") as file:
            self._flat.copy_(file.get_tensor("hidden"))
