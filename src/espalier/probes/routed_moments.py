"""First and second moments of the outputs of chosen experts."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch

from espalier.checkpoints.shape import ModelShape
from espalier.models.observe import BlockTrace
from espalier.probes.probe import Arrays, count_by_expert, sum_by_expert, sum_outputs, to_numpy


class RoutedMoments:
    """Sums over the tokens that chose an expert, of its output y (as OutputNorm has it) and routing weight g.

    counts int64 [E].   gate_sum float64 [E]: of g.   sum float64 [E, D]: of y.   square_sum float64 [E, D]: of y * y.
    gate_sum_outputs float64 [E, D]: of what the expert adds to the block, g y.
    largest, smallest float64 [E]: largest and smallest number in any y, 0 where no token chose the expert.
    """

    dense: ClassVar[bool] = False
    merged: ClassVar[bool] = False

    def __init__(self, shape: ModelShape, tokens: int) -> None:
        self.experts = shape.experts
        self.counts = np.zeros(self.experts, np.int64)
        self.gate_sum = np.zeros(self.experts)
        self.sum, self.square_sum, self.gate_sum_outputs = np.zeros((3, self.experts, shape.hidden))
        self.largest = np.full(self.experts, -np.inf)
        self.smallest = np.full(self.experts, np.inf)

    def update(self, trace: BlockTrace) -> None:
        self.counts += count_by_expert(trace.indices, self.experts)
        self.gate_sum += sum_by_expert(trace.indices, trace.weights, self.experts)
        self.sum += sum_outputs(trace, trace.routed)
        self.square_sum += sum_outputs(trace, trace.routed.double().square())
        self.gate_sum_outputs += sum_outputs(trace, trace.routed.double() * trace.output_weights.double().unsqueeze(-1))
        chosen = trace.indices.flatten()
        for extreme, name in ((trace.routed.amax(-1), "amax"), (trace.routed.amin(-1), "amin")):
            best = torch.full((self.experts + 1,), float("-inf" if name == "amax" else "inf"), dtype=torch.float64)
            best = best.to(chosen.device).scatter_reduce(0, chosen, extreme.double().flatten(), name)
            if name == "amax":
                self.largest = np.maximum(self.largest, to_numpy(best[:-1]))
            else:
                self.smallest = np.minimum(self.smallest, to_numpy(best[:-1]))

    def result(self) -> Arrays:
        return {
            "counts": self.counts,
            "gate_sum": self.gate_sum,
            "sum": self.sum,
            "square_sum": self.square_sum,
            "gate_sum_outputs": self.gate_sum_outputs,
            "largest": np.where(self.counts > 0, self.largest, 0.0),
            "smallest": np.where(self.counts > 0, self.smallest, 0.0),
        }

    @staticmethod
    def merge(parts: Sequence[Arrays], tokens: Sequence[int]) -> Arrays:
        added = {key: np.sum([part[key] for part in parts], axis=0) for key in parts[0] if key[-3:] != "est"}
        seen = np.stack([part["counts"] > 0 for part in parts])  # [parts, E]
        any_seen = seen.any(axis=0)
        largest = np.where(seen, [part["largest"] for part in parts], -np.inf).max(axis=0)
        smallest = np.where(seen, [part["smallest"] for part in parts], np.inf).min(axis=0)
        return added | {
            "largest": np.where(any_seen, largest, 0.0),
            "smallest": np.where(any_seen, smallest, 0.0),
        }
