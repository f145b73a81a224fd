"""Sizes of a model's decoder layers and of their parts, and where those lie on disk; imports no torch."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from espalier.checkpoints.layer_parts import LayerParts

if TYPE_CHECKING:
    from espalier.checkpoints.checkpoint import Checkpoint


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of all decoder layers of a model, in parameters in its files.

    `attends`: layers whose attention can be skipped. By layer: `whole`, and of it `attention` and `ffn`.
    """

    attends: tuple[int, ...]
    whole: tuple[int, ...]
    attention: tuple[int, ...]
    ffn: tuple[int, ...]
    refused: str = ""

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(self.whole)

    def part(self, layer: int, granularity: str) -> int:
        """Parameters of what a token skips: a whole layer (`block`), its `attention` or its `ffn`."""
        parts = {"block": self.whole, "attention": self.attention, "ffn": self.ffn}
        return parts[granularity][layer]


def layer_parts(checkpoint: "Checkpoint") -> LayerParts:
    """Return what a decoder layer of the checkpoint's family is made of."""
    return checkpoint.dense_family.parts if checkpoint.is_dense else checkpoint.family.parts


def ffn_module(checkpoint: "Checkpoint") -> str:
    """Return the attribute of a live decoder layer's FFN or MoE block."""
    return checkpoint.dense_family.module if checkpoint.is_dense else checkpoint.family.module


def part_prefix(checkpoint: "Checkpoint", layer: int, granularity: str) -> str:
    """Return the prefix of the tensors on disk of a decoder layer (`block`), its `attention` or its `ffn`."""
    prefix = f"model.layers.{layer}."
    if granularity == "attention":
        return f"{prefix}{layer_parts(checkpoint).attention}."
    if granularity == "ffn" and not checkpoint.is_dense:
        return f"{checkpoint.family.block.format(layer=layer)}."
    return f"{prefix}{checkpoint.dense_family.module}." if granularity == "ffn" else prefix


def decoder_shape(checkpoint: "Checkpoint", sizes: Mapping[str, int]) -> DecoderShape:
    """Return the sizes of all decoder layers; `sizes` are the parameters of tensors by name."""
    parts, count = layer_parts(checkpoint), int(checkpoint.config["num_hidden_layers"])
    found = {granularity: [0] * count for granularity in ("block", "attention", "ffn")}
    inner = {part_prefix(checkpoint, layer, part): part for layer in range(count) for part in ("attention", "ffn")}
    for name, size in sizes.items():
        match = re.match(r"(model\.layers\.(\d+)\.)([^.]+\.)", name)
        if match is None or int(match[2]) >= count:
            continue
        found["block"][int(match[2])] += size
        part = inner.get(match[1] + match[3])
        if part is not None:
            found[part][int(match[2])] += size
    whole, attention, ffn = (tuple(found[granularity]) for granularity in ("block", "attention", "ffn"))
    return DecoderShape(tuple(parts.attends(checkpoint.config)), whole, attention, ffn, parts.refused)
