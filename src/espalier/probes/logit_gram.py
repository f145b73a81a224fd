"""Second moments of the router logits."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from espalier.checkpoints.shape import ModelShape
from espalier.models.observe import BlockTrace
from espalier.probes.probe import Arrays, added, to_numpy


class LogitGram:
    """Second moments of the router logits l, enough for every similarity between their columns (M-SMoE).

    gram float64 [E, E]: sum over tokens of l l^T.
    sum float64 [E]: sum over tokens of l.
    """

    dense: ClassVar[bool] = False
    merged: ClassVar[bool] = False

    def __init__(self, shape: ModelShape, tokens: int) -> None:
        self.gram = np.zeros((shape.experts, shape.experts))
        self.sum = np.zeros(shape.experts)

    def update(self, trace: BlockTrace) -> None:
        logits = trace.logits.double()  # [T, E]
        self.gram += to_numpy(logits.T @ logits)
        self.sum += to_numpy(logits.sum(0))

    def result(self) -> Arrays:
        return {"gram": self.gram, "sum": self.sum}

    @staticmethod
    def merge(parts: Sequence[Arrays], tokens: Sequence[int]) -> Arrays:
        return added(parts)
