"""The original model's answers for distillation: each position's likeliest tokens and the mass of all others.

Shapes: N sequences, L tokens, V vocabulary, M likeliest tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from espalier.artefacts.store import atomic_file, stable_header
from espalier.checkpoints.checkpoint import Checkpoint
from espalier.errors import UserError
from espalier.models.running import Running
from espalier.models.runtime import load
from espalier.models.stream import Batch, StreamedModel
from espalier.training.tune_losses import top_and_tail

FORMAT = "espalier.teacher/1"

Progress = Callable[[int, int], None]


@torch.inference_mode()
def make_teacher(
    directory: Path,
    ids: NDArray[Any],
    mask: NDArray[Any] | None,
    top: int,
    dtype: str,
    running: Running,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Run the model once over `ids` int [N, L] and return what `save_teacher` writes.

    `log_probs` float16 [N, L, M], descending, their tokens `indices` int32 [N, L, M], and `log_tail` float16 [N, L],
    the log of all others' mass (-inf where there are none), with M = min(top, V). A model that does not fit is run one
    decoder layer at a time. UserError when the model's logits are not finite.
    """
    checkpoint = Checkpoint(directory)
    device, size = running.torch_device(), running.collect_batch_size
    every = torch.as_tensor(ids).long()
    masks = torch.ones_like(every) if mask is None else torch.as_tensor(mask)
    batches = [Batch.of(*part) for part in zip(torch.split(every, size), torch.split(masks, size), strict=True)]
    found: list[tuple[Tensor, Tensor, Tensor]] = []

    def keep(logits: Tensor) -> None:
        if not torch.isfinite(logits).all():
            raise UserError(f"{directory}: logits are not finite in {dtype}. Use dtype=float32 or bfloat16.")
        values = logits.float().topk(min(top, logits.shape[-1]), dim=-1)
        both = top_and_tail(logits, values.indices).to(torch.float16).cpu()
        found.append((both[..., :-1], values.indices.to(torch.int32).cpu(), both[..., -1]))
        if progress is not None:
            progress(len(found), len(batches))

    if running.streams(checkpoint, dtype):
        streamed = StreamedModel(directory, dtype, device)
        states = streamed.activations(batches, running.activation_memory, running.scratch)
        for turn in streamed.turns(batches, states):
            for number in range(len(batches)):
                turn.run(number)
        with streamed.head(states) as head:
            for number, batch in enumerate(batches):
                keep(head.logits(batch, number))
    else:
        model = load(directory, dtype, device)
        for batch in batches:
            given = None if batch.mask is None else batch.mask.to(device)
            keep(model(input_ids=batch.ids.to(device), attention_mask=given, use_cache=False).logits)
    names = ("log_probs", "indices", "log_tail")
    return {name: torch.cat(parts) for name, parts in zip(names, zip(*found, strict=True), strict=True)}


def save_teacher(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write the answers as safetensors, whole or not at all."""
    with atomic_file(path) as temporary:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, temporary, {"format": FORMAT, "facts": json.dumps(facts, sort_keys=True)})
        stable_header(temporary)


class Teacher:
    """Reads the answers of some sequences at a time from what `save_teacher` wrote.

    UserError when the file is no such file or holds answers to another number of tokens than `ids` [N, L].
    """

    def __init__(self, path: Path, ids: NDArray[Any]) -> None:
        try:
            file: Any = safe_open(path, "pt")
            metadata = file.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read ({error}). Run its teacher node again.") from None
        if metadata.get("format") != FORMAT:
            raise UserError(f"{path}: format is {metadata.get('format')!r}, expected {FORMAT}.")
        self._slices = {name: file.get_slice(name) for name in ("log_probs", "indices", "log_tail")}
        shape = self._slices["log_tail"].get_shape()
        if list(ids.shape) != list(shape):
            raise UserError(f"{path}: answers to {shape} tokens, but the tuning text has {list(ids.shape)}.")
        self.top = int(self._slices["indices"].get_shape()[-1])

    def rows(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Return log probabilities float16 [B, L, M + 1] (the tail last) and tokens int32 [B, L, M]."""
        parts = {name: torch.cat([each[row : row + 1] for row in rows]) for name, each in self._slices.items()}
        return torch.cat([parts["log_probs"], parts["log_tail"].unsqueeze(-1)], -1), parts["indices"]
