"""A sample of the block's inputs, for methods that run experts themselves."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from espalier.checkpoints.shape import ModelShape
from espalier.collecting.sampling import INPUT_TOKENS, stride
from espalier.models.observe import BlockTrace
from espalier.probes.probe import Arrays, joined, to_numpy


class Inputs:
    """What the block got for some of the tokens, T' of them, and what its router made of it.

    hidden float32 [T', D].   experts int32 [T', K], E for none.   weights float32 [T', K], as the model uses them.
    token int64 [T']: index among all tokens.
    """

    dense: ClassVar[bool] = False
    merged: ClassVar[bool] = True

    def __init__(self, shape: ModelShape, tokens: int) -> None:
        self.stride = stride(tokens, INPUT_TOKENS)
        self.parts: dict[str, list[Tensor]] = {"hidden": [], "experts": [], "weights": [], "token": []}

    def update(self, trace: BlockTrace) -> None:
        rows = (trace.token % self.stride == 0).nonzero()[:, 0]
        self.parts["hidden"].append(trace.hidden[rows].float().cpu())
        self.parts["experts"].append(trace.indices[rows].int().cpu())
        self.parts["weights"].append(trace.weights[rows].float().cpu())
        self.parts["token"].append(trace.token[rows].cpu())

    def result(self) -> Arrays:
        return {name: to_numpy(torch.cat(parts)) for name, parts in self.parts.items()}

    @staticmethod
    def merge(parts: Sequence[Arrays], tokens: Sequence[int]) -> Arrays:
        return joined(parts)
