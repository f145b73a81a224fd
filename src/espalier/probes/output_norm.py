"""Norms of the outputs of chosen experts."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch

from espalier.checkpoints.shape import ModelShape
from espalier.models.observe import BlockTrace
from espalier.probes.probe import Arrays, added, count_by_expert, sum_by_expert


class OutputNorm:
    """L2 norms of the routed, unweighted expert outputs y (EAN and REAP, arXiv 2510.13999 eq. 9).

    Where the router scales the experts' input, y = f(g x) is what the expert adds to the block: the weight is in
    it and is not multiplied again, so norm_sum and gate_norm_sum are the same there.

    counts int64 [E]: tokens that chose the expert.
    norm_sum float64 [E]: sum of ||y|| over them.
    gate_norm_sum float64 [E]: sum of the norm of what the expert adds, g ||y|| with g as the model uses it.
    probability_norm_sum float64 [E]: sum of p ||y|| with p the softmax over all E experts, not renormalised.
    """

    dense: ClassVar[bool] = False
    merged: ClassVar[bool] = False

    def __init__(self, shape: ModelShape, tokens: int) -> None:
        self.experts = shape.experts
        self.counts = np.zeros(self.experts, np.int64)
        self.norm_sum = np.zeros(self.experts)
        self.gate_norm_sum = np.zeros(self.experts)
        self.probability_norm_sum = np.zeros(self.experts)

    def update(self, trace: BlockTrace) -> None:
        # One position k at a time: float64 copies of [T, K, D] would double the memory of the pass.
        norms = [torch.linalg.vector_norm(y, dim=-1, dtype=torch.float64) for y in trace.routed.unbind(1)]
        norm = torch.stack(norms, dim=1)  # [T, K]
        real = trace.indices.clamp(max=self.experts - 1)  # "no expert" falls out of the sums below
        probability = trace.logits.softmax(-1).gather(1, real)  # [T, K]
        self.counts += count_by_expert(trace.indices, self.experts)
        self.norm_sum += sum_by_expert(trace.indices, norm, self.experts)
        self.gate_norm_sum += sum_by_expert(trace.indices, norm * trace.output_weights, self.experts)
        self.probability_norm_sum += sum_by_expert(trace.indices, norm * probability, self.experts)

    def result(self) -> Arrays:
        return {
            "counts": self.counts,
            "norm_sum": self.norm_sum,
            "gate_norm_sum": self.gate_norm_sum,
            "probability_norm_sum": self.probability_norm_sum,
        }

    @staticmethod
    def merge(parts: Sequence[Arrays], tokens: Sequence[int]) -> Arrays:
        return added(parts)
