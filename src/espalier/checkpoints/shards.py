"""Safetensors shards, written as a stream of tensors."""

from __future__ import annotations

import json
import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier.checkpoints.checkpoint import INDEX, SINGLE, Checkpoint
from espalier.checkpoints.dtypes import ITEM_BYTES, TORCH_NAMES, torch_shape
from espalier.machine import heap

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 5_000_000_000
LARGE = 2**24  # bytes of a tensor after which freed memory is given back
MOST_WORKERS = 4  # more do not write faster, and each holds a few tensors


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
        return prod(torch_shape(self.dtype, self.shape)) * ITEM_BYTES[self.dtype]


class ShardWriter:
    """Writes safetensors shards of at most `limit` bytes and their index, one tensor in memory at a time and thread.

    `shards` are those of the source; an empty one is left out, one over the limit is divided.
    """

    def __init__(self, shards: Iterable[list[OutputTensor]], limit: int = SHARD_BYTES) -> None:
        self.shards = [part for shard in shards for part in _divide(shard, limit)]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, without the headers."""
        return sum(tensor.nbytes for shard in self.shards for tensor in shard)

    def write(
        self,
        directory: Path,
        progress: Callable[[int, int], None] | None = None,
        workers: int = 1,
        resume: bool = False,
    ) -> list[str]:
        """Write the files into `directory` and return their names; the bytes do not depend on `workers`.

        Each of `workers` threads writes a shard at a time under a hidden name and renames it when it is whole. With
        `resume`, a shard that has its name already is kept: the caller answers for its contents. `progress` hears
        (bytes done, bytes in all), from one thread at a time.
        """
        n = len(self.shards)
        names = [SINGLE] if n == 1 else [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
        named = dict(zip(names, map(_aligned, self.shards), strict=True))
        kept = [name for name, shard in named.items() if resume and _is_whole(directory / name, shard)]
        meter = _Meter(self.nbytes, progress)
        meter.add(sum(tensor.nbytes for name in kept for tensor in named[name]))
        waiting = [(directory / name, shard) for name, shard in named.items() if name not in kept]
        _write_all(waiting, meter, workers)
        if n > 1:
            weight_map = {tensor.name: name for name, shard in named.items() for tensor in shard}
            index = {"metadata": {"total_size": self.nbytes}, "weight_map": dict(sorted(weight_map.items()))}
            (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        return names

    def check(self, directory: Path) -> Checkpoint:
        """Read the headers back and return them; RuntimeError unless they hold every tensor announced and no other."""
        written = Checkpoint(directory)
        announced = {tensor.name: (tensor.dtype, tensor.shape) for shard in self.shards for tensor in shard}
        found = {name: (entry.dtype, entry.shape) for name, entry in written.entries.items()}
        if announced != found:
            raise RuntimeError(f"{directory}: wrote other tensors than announced: {set(announced) ^ set(found)}")
        return written

    def layout(self) -> list[list[tuple[str, str, tuple[int, ...]]]]:
        """Return name, dtype and shape of the tensors of each shard."""
        return [[(tensor.name, tensor.dtype, tensor.shape) for tensor in shard] for shard in self.shards]


def write_file(path: Path, tensors: list[OutputTensor]) -> None:
    """Write one safetensors file under a hidden name and rename it when it is whole."""
    _write(path, _aligned(tensors), _Meter(0, None), threading.Event())


class _Meter:
    """Counts bytes over threads; the function that hears of them is never called by two at once."""

    def __init__(self, total: int, progress: Callable[[int, int], None] | None) -> None:
        self.done, self.total, self.progress = 0, total, progress
        self.lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        with self.lock:
            self.done += nbytes
            if self.progress is not None and nbytes:
                self.progress(self.done, self.total)


def _write_all(shards: list[tuple[Path, list[OutputTensor]]], meter: _Meter, workers: int) -> None:
    """Write shards in `workers` threads; the first error stops all of them and is raised."""
    stop = threading.Event()

    def job(path: Path, shard: list[OutputTensor]) -> None:
        try:
            _write(path, shard, meter, stop)
        except BaseException:
            stop.set()
            raise

    # Threads suffice: reading, checking, adding and writing tensors all release the interpreter's lock.
    with ThreadPoolExecutor(max(1, workers)) as pool:
        futures = [pool.submit(job, *shard) for shard in shards]
        try:
            for future in futures:
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _write(path: Path, shard: list[OutputTensor], meter: _Meter, stop: threading.Event) -> None:
    """Write one shard; leave nothing behind after an error, nor when `stop` is set meanwhile."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(_header(shard))
            for tensor in shard:
                for part in _parts(tensor):
                    if stop.is_set():
                        return
                    file.write(part)
                    meter.add(len(part))
                if tensor.nbytes > LARGE:
                    heap.trim()
            file.flush()
            # A resumed run trusts the name, so the bytes come first; network disks say only here that they are full.
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
        heap.trim()


def _aligned(shard: list[OutputTensor]) -> list[OutputTensor]:
    """Order tensors as the safetensors library does, wide numbers first, so that each is aligned."""
    return sorted(shard, key=lambda tensor: -ITEM_BYTES[tensor.dtype])


def _is_whole(path: Path, shard: list[OutputTensor]) -> bool:
    header = _header(shard)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            return size == len(header) + sum(t.nbytes for t in shard) and file.read(len(header)) == header
    except FileNotFoundError:
        return False


def default_workers() -> int:
    """Return how many threads write shards when nobody says: one for each core, at most 4."""
    return min(MOST_WORKERS, len(os.sched_getaffinity(0)))


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
    import torch

    written = 0
    shape = torch_shape(tensor.dtype, tensor.shape)
    for part in tensor.make():
        same = part.shape[1:] == shape[1:] and part.dim() == len(shape)
        if str(part.dtype) != f"torch.{TORCH_NAMES[tensor.dtype]}" or not same:
            raise ValueError(f"{tensor.name}: made {part.dtype} {part.shape}, announced {tensor.dtype} {tensor.shape}")
        raw = part.contiguous().reshape(-1).view(torch.uint8).numpy().data
        written += len(raw)
        yield raw
    if written != tensor.nbytes:
        raise ValueError(f"{tensor.name}: made {written} bytes, announced {tensor.dtype} {tensor.shape}")
