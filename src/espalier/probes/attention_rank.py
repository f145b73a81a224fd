"""The rank of a layer's attention maps: how much its tokens look at different things."""

from collections.abc import Sequence

import numpy as np
import torch

from espalier.models.observe_attention import AttentionTrace
from espalier.probes.probe import Arrays, added, to_numpy


class AttentionRank:
    """ARank (gamma-MoD, Luo et al., ICLR 2025, arXiv 2410.13859) before its mean over heads and sequences.

    rank_sum float64 [H]: the sum over sequences of each head's rank of A without its diagonal, A [L, L] the attention
    weights among the tokens that count.   sequences int64 [1]: how many.

    The rank counts singular values above L eps times the largest, eps that of float32.
    """

    def __init__(self) -> None:
        self.rank_sum = np.zeros(0)
        self.sequences = 0

    def update(self, trace: AttentionTrace) -> None:
        for weights, mask in zip(trace.weights, trace.mask, strict=True):
            seen = weights[:, mask][:, :, mask].float()  # [H, L', L']
            ranks = to_numpy(torch.linalg.matrix_rank(seen.tril(-1))).astype(np.float64)
            self.rank_sum = ranks if self.sequences == 0 else self.rank_sum + ranks
            self.sequences += 1

    def result(self) -> Arrays:
        return {"rank_sum": self.rank_sum, "sequences": np.array([self.sequences])}

    @staticmethod
    def merge(parts: Sequence[Arrays], tokens: Sequence[int]) -> Arrays:
        return added(parts)
