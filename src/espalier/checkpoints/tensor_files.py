"""Safetensors files: what their headers say, checked, and bytes read from them."""

import io
import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

from espalier.checkpoints.dtypes import ITEM_BYTES, torch_shape
from espalier.errors import UserError

MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: its shard's name, the safetensors dtype (`BF16`), its shape, bytes and place in the file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int

    @property
    def size(self) -> int:
        return prod(self.shape)


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Return the tensors of one safetensors file in the order of their bytes.

    UserError when the file cannot be read, is cut short, holds more than its header says, is no safetensors file,
    or has a dtype that torch has not.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            raw = file.read(length) if 2 <= length <= MAX_HEADER_BYTES else b""
    except OSError as error:
        raise unreadable(path, error) from error
    if start.startswith(b"version "):
        raise UserError(f"{path}: a Git LFS pointer, not the weights. Run `git lfs pull` in {path.parent}.")
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise UserError(f"{path}: not a safetensors file or a truncated shard ({size} bytes). Download it again.")
    if len(raw) < length:
        raise UserError(f"{path}: truncated shard, {size} bytes of at least {8 + length}. Download it again.")
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        spans = sorted((*values["data_offsets"], name) for name, values in header.items())
        entries = {
            name: TensorEntry(
                path.name, header[name]["dtype"], tuple(header[name]["shape"]), stop - start, 8 + length + start
            )
            for start, stop, name in spans
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a safetensors header ({error!r}). Download it again.") from None
    for name, entry in entries.items():
        if entry.dtype not in ITEM_BYTES:
            raise UserError(f"{path}: tensor {name} has dtype {entry.dtype}, which is quantised. Dequantise the model.")
        meant = prod(torch_shape(entry.dtype, entry.shape)) * ITEM_BYTES[entry.dtype]
        if entry.nbytes != meant:
            raise UserError(
                f"{path}: tensor {name} has {entry.nbytes} bytes, but {entry.dtype} {list(entry.shape)} means {meant}. "
                "Download it again."
            )
    expected = 8 + length + max((stop for _, stop, _ in spans), default=0)
    if size != expected:
        what = "truncated shard" if size < expected else "longer than its header says"
        raise UserError(f"{path}: {what}, {size} bytes instead of {expected}. Download it again.")
    return entries


def unreadable(path: Path, error: OSError) -> UserError:
    """Return the UserError for a file that the system does not let be read."""
    return UserError(f"{path}: cannot be read ({error.strerror or error}). Make it readable or download it again.")


def fill(file: io.FileIO, view: memoryview) -> None:
    """Read until `view` is full: one call reads at most 2 GB."""
    done = 0
    while done < len(view):
        read = file.readinto(view[done:])
        if not read:
            raise UserError(f"{file.name}: truncated while it was read. Download it again.")
        done += read
