"""Safetensors shards, written as a stream of tensors."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from espalier.checkpoint import INDEX, ITEM_BYTES, SINGLE, TORCH_NAMES

SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to be written: what the header says, and the function that makes it when its turn comes.

    `make` yields the tensor's consecutive parts along its first dimension, so that stacked experts need not be in
    memory together.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], Iterable[torch.Tensor]]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]


class ShardWriter:
    """Writes safetensors shards of at most `limit` bytes and their index, one tensor in memory at a time.

    `shards` are those of the source; an empty one is left out, one over the limit is divided.
    """

    def __init__(self, shards: Iterable[list[OutputTensor]], limit: int = SHARD_BYTES) -> None:
        self.shards = [part for shard in shards for part in _divide(shard, limit)]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, without the headers."""
        return sum(tensor.nbytes for shard in self.shards for tensor in shard)

    def write(self, directory: Path, progress: Callable[[int, int], None] | None = None) -> list[str]:
        """Write the files into `directory` and return their names; `progress` hears (bytes done, bytes in all)."""
        n = len(self.shards)
        names = [SINGLE] if n == 1 else [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
        done, total = 0, self.nbytes
        for name, shard in zip(names, self.shards, strict=True):
            # Aligned as the safetensors library does it: wide numbers first.
            ordered = sorted(shard, key=lambda tensor: -ITEM_BYTES[tensor.dtype])
            with (directory / name).open("wb") as file:
                file.write(_header(ordered))
                for tensor in ordered:
                    for part in _parts(tensor):
                        file.write(part)
                        done += len(part)
                        if progress is not None:
                            progress(done, total)
        if n > 1:
            weight_map = {tensor.name: name for name, shard in zip(names, self.shards, strict=True) for tensor in shard}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        return names


def _divide(shard: list[OutputTensor], limit: int) -> list[list[OutputTensor]]:
    parts: list[list[OutputTensor]] = []
    room = 0
    for tensor in shard:
        if not parts or tensor.nbytes > room:
            parts.append([])
            room = limit
        parts[-1].append(tensor)
        room -= tensor.nbytes
    return parts


def _header(tensors: list[OutputTensor]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without it
    offset = 0
    for tensor in tensors:
        stop = offset + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, stop]}
        offset = stop
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def _parts(tensor: OutputTensor) -> Iterator[memoryview]:
    """Yield the bytes of a tensor's parts; ValueError when they are not what the header says."""
    written = 0
    for part in tensor.make():
        same = part.shape[1:] == tensor.shape[1:] and part.dim() == len(tensor.shape)
        if str(part.dtype) != f"torch.{TORCH_NAMES[tensor.dtype]}" or not same:
            raise ValueError(f"{tensor.name}: made {part.dtype} {part.shape}, announced {tensor.dtype} {tensor.shape}")
        raw = part.contiguous().reshape(-1).view(torch.uint8).numpy().data
        written += len(raw)
        yield raw
    if written != tensor.nbytes:
        raise ValueError(f"{tensor.name}: made {written} bytes, announced {tensor.dtype} {tensor.shape}")
