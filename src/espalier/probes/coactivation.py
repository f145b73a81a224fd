"""How often two experts are chosen by the same token."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch

from espalier.checkpoints.shape import ModelShape
from espalier.models.observe import BlockTrace
from espalier.probes.probe import Arrays, added, to_numpy


class Coactivation:
    """How often two experts are chosen together (STUN, arXiv 2409.06211).

    counts int64 [E, E]: tokens that chose both; on the diagonal those that chose the expert.
    """

    dense: ClassVar[bool] = False
    merged: ClassVar[bool] = False

    def __init__(self, shape: ModelShape, tokens: int) -> None:
        self.counts = np.zeros((shape.experts, shape.experts), np.int64)

    def update(self, trace: BlockTrace) -> None:
        experts = len(self.counts)
        chosen = torch.zeros(len(trace.indices), experts + 1, dtype=torch.float64, device=trace.indices.device)
        chosen.scatter_(1, trace.indices, 1.0)  # the last column stands for no expert
        pairs = chosen[:, :experts]
        self.counts += to_numpy(pairs.T @ pairs).astype(np.int64)  # exact: far fewer tokens than 2^53

    def result(self) -> Arrays:
        return {"counts": self.counts}

    @staticmethod
    def merge(parts: Sequence[Arrays], tokens: Sequence[int]) -> Arrays:
        return added(parts)
