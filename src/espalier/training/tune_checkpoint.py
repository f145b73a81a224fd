"""Write a tuned checkpoint: a copy of its source with some tensors replaced, the model card saying by what."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier.artefacts.partial import check_disk, code_version, resumable_directory
from espalier.artefacts.store import write_json
from espalier.checkpoints.checkpoint import Checkpoint
from espalier.checkpoints.dtypes import TORCH_NAMES
from espalier.checkpoints.shards import OutputTensor, ShardWriter, default_workers
from espalier.surgery.apply import NOT_COPIED, TENSORS, chat_templates, copy_beside

if TYPE_CHECKING:
    from torch import Tensor

CARD, LOSSES = "README.md", "tuning.json"


def write_tuned(
    source: Path,
    tensors: Mapping[str, Tensor],
    out: Path,
    section: str,
    record: dict[str, Any],
    *,
    replace: bool = False,
    workers: int | None = None,
    config: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write `out`: the checkpoint `source` with `tensors`, by their names on disk, in the place of its own.

    They are rounded to the dtype that the source has. Every other tensor and file is copied by its bytes; the model
    card gets `section` at its end, `tuning.json` is `record`, and `config`, if given, the new config.json. Returns
    `bytes`, `shards`, `tensors` (replaced and copied). UserError when `out` exists (unless `replace`), is being
    written, or the disk has no room.
    """
    checkpoint = Checkpoint(source)
    shards = [[_output(checkpoint, name, tensors) for name in checkpoint.tensors_of(file)] for file in checkpoint.files]
    writer = ShardWriter(shards)
    beside = [
        path for path in sorted(source.iterdir())
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith(NOT_COPIED)
    ]  # fmt: skip
    beside += chat_templates(source)
    check_disk(out, writer.nbytes + sum(path.stat().st_size for path in beside))
    identity = {
        "source": [str(source.resolve()), checkpoint.fingerprint],
        "tensors": {name: _digest(tensor) for name, tensor in sorted(tensors.items())},
        "layout": writer.layout(),
        "code": code_version(),
    } | ({} if config is None else {"config": config})
    with resumable_directory(out, identity, replace) as directory:
        files = writer.write(directory, None, workers or default_workers(), resume=True)
        copy_beside(source, beside, directory)
        if (source / TENSORS).exists():  # what plan.json names
            (directory / TENSORS).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / TENSORS, directory / TENSORS)
        card = directory / CARD
        before = card.read_text().rstrip() if card.exists() else f"# {source.name}, tuned with Espalier"
        card.write_text(f"{before}\n\n{section.strip()}\n")
        write_json(directory / LOSSES, record)
        if config is not None:
            (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        writer.check(directory)
    copied = len(checkpoint.entries) - len(tensors)
    return {"bytes": writer.nbytes, "shards": len(files), "tensors": {"replaced": len(tensors), "copied": copied}}


def _output(checkpoint: Checkpoint, name: str, tensors: Mapping[str, Tensor]) -> OutputTensor:
    import torch

    entry = checkpoint.entries[name]
    if name not in tensors:
        return OutputTensor(name, entry.dtype, entry.shape, lambda: [checkpoint.tensor(name)])
    tensor = tensors[name].detach().to("cpu", getattr(torch, TORCH_NAMES[entry.dtype]))
    return OutputTensor(name, entry.dtype, entry.shape, lambda: [tensor])


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()
