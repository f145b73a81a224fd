"""The tensors of a plan: read one at a time, from memory or from a safetensors file beside the plan."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from espalier.errors import UserError

Array = NDArray[Any]
DTYPES = {"F32": np.dtype(np.float32), "I32": np.dtype(np.int32)}


@dataclass(frozen=True)
class PlanTensor:
    """A tensor whose values are made or read when they are asked for: all of them, or one row of the first dimension.

    `read` and `row` may be slow: they read a file, or a method computes the values only then.
    """

    dtype: str  # F32 or I32
    shape: tuple[int, ...]
    read: Callable[[], Array]
    row: Callable[[int], Array]

    @classmethod
    def of(cls, array: Array) -> "PlanTensor":
        """Wrap an array in memory: float64 and float32 become F32, integers I32."""
        array = np.ascontiguousarray(array, np.float32 if array.dtype.kind == "f" else np.int32)
        return cls("F32" if array.dtype.kind == "f" else "I32", array.shape, lambda: array, lambda index: array[index])

    @classmethod
    def later(cls, dtype: str, shape: tuple[int, ...], make: Callable[[], Array]) -> "PlanTensor":
        """Return a tensor that `make` computes each time it is read, so that a plan need not fit into memory."""

        def read() -> Array:
            array = np.ascontiguousarray(make(), DTYPES[dtype])
            if array.shape != shape:
                raise ValueError(f"made {array.shape}, announced {shape}")
            return array

        return cls(dtype, shape, read, lambda index: read()[index])


def fingerprint(tensors: Mapping[str, PlanTensor]) -> str:
    """Return a hash of all values, hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        digest.update(np.ascontiguousarray(tensor.read()).data)
    return digest.hexdigest()


def save_tensors(path: Path, tensors: Mapping[str, PlanTensor]) -> None:
    """Write the file, one tensor in memory at a time."""
    import torch

    from espalier.checkpoints.shards import OutputTensor, write_file

    def output(name: str, tensor: PlanTensor) -> OutputTensor:
        return OutputTensor(name, tensor.dtype, tensor.shape, lambda: [torch.from_numpy(tensor.read())])

    write_file(path, [output(name, tensor) for name, tensor in sorted(tensors.items())])


def load_tensors(path: Path) -> dict[str, PlanTensor]:
    """Return the tensors of a file, which is read when they are; UserError when it is not there or damaged."""
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (safe_open is no mapping)
            headers = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot read the plan's tensors ({error}). Make the plan again.") from None

    def read(name: str) -> Array:
        with safe_open(path, framework="numpy") as file:
            array: Array = file.get_tensor(name)
        return array

    def row(name: str, index: int) -> Array:
        with safe_open(path, framework="numpy") as file:
            array: Array = file.get_slice(name)[index]
        return array

    return {
        name: PlanTensor(dtype, shape, lambda name=name: read(name), lambda index, name=name: row(name, index))  # type: ignore[misc]
        for name, (dtype, shape) in headers.items()
    }
