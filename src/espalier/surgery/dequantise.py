"""Rewrite a checkpoint of block-scaled fp8 or of mxfp4 weights in bf16, tensor by tensor.

fp8: weight[i, j] * weight_scale_inv[i // rows, j // columns] in fp32, rounded once. mxfp4: two 4-bit numbers in a
byte, the low half first, 32 of them times 2 ** (scale - 127); the last two dimensions are then transposed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from espalier.artefacts.partial import check_disk, code_version, resumable_directory
from espalier.checkpoints.checkpoint import Checkpoint
from espalier.checkpoints.quantised import OURS, quantisation, refuse_quantised, without_quantisation
from espalier.checkpoints.shards import OutputTensor, ShardWriter, default_workers
from espalier.errors import UserError
from espalier.surgery.apply import copy_beside, side_files

SCALE, BLOCKS, SCALES = "_scale_inv", "_blocks", "_scales"
DROPPED = ("activation_scale", "input_scale")  # of the quantised product; plain weights need none
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
GROUP_BYTES = 16  # that share one scale
EXPONENT_BIAS = 127


def dequantise(
    source: Path,
    out: Path,
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write the checkpoint `source` with bf16 weights to the directory `out`; other tensors stay as they are.

    Memory holds a quantised tensor and a part of the result in each of `workers` threads (default: as many as
    cores, at most 4). `progress` hears (bytes done, bytes in all). A killed run is continued by the same call.

    Returns `method`, `tensors` (dequantised, copied, dropped), `bytes`, `shards` and `seconds`. UserError when the
    model is not quantised or in another way, a scale is missing or of the wrong shape, a weight is NaN or infinite,
    `out` exists, or the disk has no room.
    """
    start = time.monotonic()
    checkpoint = Checkpoint(source)
    settings = quantisation(checkpoint.config)
    if settings is None:
        raise UserError(f"{source / 'config.json'}: no quantization_config: nothing to dequantise. Use it as it is.")
    if settings["quant_method"] not in OURS:
        refuse_quantised(source, checkpoint.config)
    shards, counts = _outputs(checkpoint, settings)
    writer = ShardWriter(shards)
    beside = [*side_files(source), *(p for p in (source / "README.md",) if p.is_file())]
    check_disk(out, writer.nbytes + sum(path.stat().st_size for path in beside))
    identity = [str(source.resolve()), checkpoint.fingerprint, writer.layout(), code_version()]
    with resumable_directory(out, identity) as directory:
        files = writer.write(directory, progress, workers or default_workers(), resume=True)
        copy_beside(source, beside, directory)
        config = without_quantisation(checkpoint.config)
        (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        writer.check(directory)
    return {
        "method": settings["quant_method"],
        "tensors": counts,
        "bytes": writer.nbytes,
        "shards": len(files),
        "seconds": round(time.monotonic() - start, 3),
    }


def _outputs(checkpoint: Checkpoint, settings: dict[str, Any]) -> tuple[list[list[OutputTensor]], dict[str, int]]:
    """Return the tensors to write, by source shard, and how many of the source's had which fate."""
    names = checkpoint.entries
    counts = {"dequantised": 0, "copied": 0, "dropped": 0}
    shards: list[list[OutputTensor]] = []
    for file in checkpoint.files:
        shard: list[OutputTensor] = []
        for name in checkpoint.tensors_of(file):
            scaled, packed = name.removesuffix(SCALE), name.removesuffix(SCALES)
            is_scale = (scaled != name and scaled in names) or (packed != name and packed + BLOCKS in names)
            if is_scale or name.endswith(DROPPED):
                counts["dropped"] += 1
            elif names[name].dtype.startswith("F8"):
                shard.append(_fp8(checkpoint, name, settings.get("weight_block_size")))
                counts["dequantised"] += 1
            elif name.endswith(BLOCKS) and names[name].dtype == "U8":
                shard.append(_mxfp4(checkpoint, name))
                counts["dequantised"] += 1
            else:
                entry = names[name]
                make = partial(_finite, checkpoint, name)
                shard.append(OutputTensor(name, entry.dtype, entry.shape, make))
                counts["copied"] += 1
        shards.append(shard)
    return shards, counts


def _finite(checkpoint: Checkpoint, name: str) -> list[torch.Tensor]:
    return [checkpoint.finite_tensor(name)]


def _fp8(checkpoint: Checkpoint, name: str, block: list[int] | None) -> OutputTensor:
    """Return the bf16 tensor of an fp8 one [..., N, K] with scales [..., N / rows, K / columns], rounded up.

    `block` is (rows, columns); None means one scale for the whole matrix.
    """
    weight, scale = checkpoint.entries[name], checkpoint.entries.get(name + SCALE)
    if scale is None:
        raise UserError(f"{checkpoint.directory}: tensor {name} is {weight.dtype} without {name + SCALE}. "
                        "Download the model again.")  # fmt: skip
    if len(weight.shape) < 2:
        raise UserError(f"{checkpoint.directory}: tensor {name} {list(weight.shape)} of {weight.dtype} is no matrix.")
    *leading, n, k = weight.shape
    rows, columns = block or (n, k)
    expected = (*leading, -(-n // rows), -(-k // columns))
    if scale.shape != expected and not (block is None and not leading and scale.size == 1):
        raise UserError(
            f"{checkpoint.directory}: {name + SCALE} is {list(scale.shape)}, but {list(weight.shape)} in blocks of "
            f"{[rows, columns]} needs {list(expected)}. Correct weight_block_size in config.json."
        )
    return OutputTensor(name, "BF16", weight.shape, partial(_fp8_parts, checkpoint, name, rows, columns))


def _fp8_parts(checkpoint: Checkpoint, name: str, rows: int, columns: int) -> Iterator[torch.Tensor]:
    """Yield the bf16 tensor: a matrix by rows of blocks, stacked matrices one by one."""
    weight = checkpoint.tensor(name)
    n, k = weight.shape[-2:]
    scale = checkpoint.tensor(name + SCALE).float().reshape(*weight.shape[:-2], -(-n // rows), -(-k // columns))
    wide = scale.repeat_interleave(columns, dim=-1)[..., :k]  # [..., N / rows, K]
    for matrix, factors in zip(weight.reshape(-1, n, k), wide.reshape(-1, wide.shape[-2], k), strict=True):
        parts = [
            (matrix[i * rows : (i + 1) * rows].float() * factor).bfloat16() for i, factor in enumerate(factors)
        ]  # [rows, K] each
        for part in parts:
            _check_finite(checkpoint, name, part)
        if weight.dim() == 2:
            yield from parts
        else:
            yield torch.cat(parts).reshape(*(1,) * (weight.dim() - 2), n, k)


def _mxfp4(checkpoint: Checkpoint, name: str) -> OutputTensor:
    """Return the bf16 tensor [E, G * 32, R] of `name` [E, R, G, 16] and its scales [E, R, G]."""
    blocks = checkpoint.entries[name]
    plain = name.removesuffix(BLOCKS)
    scales = checkpoint.entries.get(plain + SCALES)
    if scales is None or blocks.shape != (*scales.shape, GROUP_BYTES) or len(scales.shape) != 3 or scales.dtype != "U8":
        found = "missing" if scales is None else f"{scales.dtype} {list(scales.shape)}"
        raise UserError(
            f"{checkpoint.directory}: {plain + SCALES} is {found}, but {name} is {list(blocks.shape)}. "
            "Download the model again."
        )
    experts, rows, groups = scales.shape
    make = partial(_mxfp4_parts, checkpoint, plain)
    return OutputTensor(plain, "BF16", (experts, groups * 2 * GROUP_BYTES, rows), make)


def _mxfp4_parts(checkpoint: Checkpoint, name: str) -> Iterator[torch.Tensor]:
    """Yield the bf16 tensor [1, G * 32, R] of each expert."""
    pairs, powers = _tables()
    for expert in range(checkpoint.entries[name + BLOCKS].shape[0]):
        blocks = checkpoint.rows(name + BLOCKS, expert)[0]  # [R, G, 16]
        scales = checkpoint.rows(name + SCALES, expert)[0]  # [R, G]
        values = pairs[blocks.int()].flatten(-2) * powers[scales.int()].unsqueeze(-1)  # [R, G, 32]
        part = values.bfloat16().flatten(-2).T.contiguous().unsqueeze(0)
        _check_finite(checkpoint, name + BLOCKS, part)
        yield part


@cache
def _tables() -> tuple[torch.Tensor, torch.Tensor]:
    """The two numbers [256, 2] of each byte and the factor [256] of each scale, in fp32; the last scale means NaN."""
    pairs = [(FP4_VALUES[byte & 15], FP4_VALUES[byte >> 4]) for byte in range(256)]
    powers = [2.0 ** (scale - EXPONENT_BIAS) for scale in range(255)] + [float("nan")]
    return torch.tensor(pairs), torch.tensor(powers)


def _check_finite(checkpoint: Checkpoint, name: str, part: torch.Tensor) -> None:
    if part.numel() and not all(map(isfinite, map(float, part.aminmax()))):
        file = checkpoint.directory / checkpoint.entries[name].file
        raise UserError(f"{file}: tensor {name} holds NaN or infinite numbers. Download the model again.")
