"""How often and how strongly the router chooses each expert."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch

from espalier.checkpoints.shape import ModelShape
from espalier.models.observe import BlockTrace
from espalier.probes.probe import Arrays, added, count_by_expert, sum_by_expert, to_numpy


class Usage:
    """How often and how strongly the router chooses each expert.

    counts int64 [E]: tokens that chose the expert.
    top2_counts int64 [E]: tokens for which its logit is among the two largest, whatever K is (HC-SMoE's code).
    gate_sum float64 [E]: sum of its routing weights as the model uses them.
    probability_sum float64 [E]: sum over all tokens of its softmax probability over all E experts.
    """

    dense: ClassVar[bool] = False
    merged: ClassVar[bool] = False

    def __init__(self, shape: ModelShape, tokens: int) -> None:
        self.experts = shape.experts
        self.counts = np.zeros(self.experts, np.int64)
        self.top2_counts = np.zeros(self.experts, np.int64)
        self.gate_sum = np.zeros(self.experts)
        self.probability_sum = np.zeros(self.experts)

    def update(self, trace: BlockTrace) -> None:
        top2 = trace.logits.topk(min(2, self.experts), dim=-1).indices  # [T, 2]
        self.counts += count_by_expert(trace.indices, self.experts)
        self.top2_counts += count_by_expert(top2, self.experts)
        self.gate_sum += sum_by_expert(trace.indices, trace.weights, self.experts)
        self.probability_sum += to_numpy(trace.logits.softmax(-1).sum(0, dtype=torch.float64))

    def result(self) -> Arrays:
        return {
            "counts": self.counts,
            "top2_counts": self.top2_counts,
            "gate_sum": self.gate_sum,
            "probability_sum": self.probability_sum,
        }

    @staticmethod
    def merge(parts: Sequence[Arrays], tokens: Sequence[int]) -> Arrays:
        return added(parts)
