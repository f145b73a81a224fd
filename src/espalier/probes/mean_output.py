"""Mean output of each expert over all tokens."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch

from espalier.checkpoints.shape import ModelShape
from espalier.models.observe import BlockTrace
from espalier.probes.probe import Arrays, to_numpy


class MeanOutput:
    """Mean unweighted output of each expert (HC-SMoE, arXiv 2410.08589).

    all_tokens float64 [E, D]: over all tokens, routed to it or not, of f(x) on the block's input x. That is so too
    where the router scales the experts' input: on one input for all, the means compare the experts themselves.
    """

    dense: ClassVar[bool] = True
    merged: ClassVar[bool] = False

    def __init__(self, shape: ModelShape, tokens: int) -> None:
        self.tokens = 0
        self.sum = np.zeros((shape.experts, shape.hidden))

    def update(self, trace: BlockTrace) -> None:
        self.tokens += len(trace.token)
        self.sum += to_numpy(trace.outputs().sum(1, dtype=torch.float64))

    def result(self) -> Arrays:
        return {"all_tokens": self.sum / self.tokens}

    @staticmethod
    def merge(parts: Sequence[Arrays], tokens: Sequence[int]) -> Arrays:
        total = np.sum([part["all_tokens"] * number for part, number in zip(parts, tokens, strict=True)], axis=0)
        return {"all_tokens": total / sum(tokens)}
