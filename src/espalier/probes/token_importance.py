"""How important each token is to the others of its sequence."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from espalier.checkpoints.shape import ModelShape
from espalier.models.observe import BlockTrace
from espalier.probes.probe import Arrays, joined, to_numpy


class TokenImportance:
    """A token's importance by what it is and who looks at it (ODP, arXiv 2410.06270, equation for I_j).

    importance float32 [T]: ||t_j||_1 times the mean attention that tokens i >= j of the sequence pay to token j,
    averaged over heads. t_j is the input of the MoE block; the paper does not say which hidden state it takes.
    """

    dense: ClassVar[bool] = False
    merged: ClassVar[bool] = True
    attention: ClassVar[bool] = True  # the pass computes attention weights

    def __init__(self, shape: ModelShape, tokens: int) -> None:
        self.parts: list[Tensor] = []

    def update(self, trace: BlockTrace) -> None:
        if trace.attention is None:
            raise ValueError(f"layer {trace.layer}: the pass was observed without attention")
        self.parts.append((trace.hidden.float().abs().sum(-1) * trace.attention).cpu())

    def result(self) -> Arrays:
        return {"importance": to_numpy(torch.cat(self.parts))}

    @staticmethod
    def merge(parts: Sequence[Arrays], tokens: Sequence[int]) -> Arrays:
        return joined(parts)
