"""How active each neuron of a dense FFN is."""

from collections.abc import Sequence

import numpy as np

from espalier.checkpoints.shape import DenseShape
from espalier.models.observe_ffn import FFNTrace
from espalier.probes.probe import Arrays, added, to_numpy


class FFNEnergy:
    """Over all tokens, of the activations a_j that the down projection gets.

    square_sum float64 [F]: sum of a_j^2.   absolute_sum float64 [F]: sum of |a_j|.
    """

    def __init__(self, shape: DenseShape, tokens: int) -> None:
        self.square_sum, self.absolute_sum = np.zeros((2, shape.width))

    def update(self, trace: FFNTrace) -> None:
        inner = trace.inner.double()
        self.square_sum += to_numpy(inner.square().sum(0))
        self.absolute_sum += to_numpy(inner.abs().sum(0))

    def result(self) -> Arrays:
        return {"square_sum": self.square_sum, "absolute_sum": self.absolute_sum}

    @staticmethod
    def merge(parts: Sequence[Arrays], tokens: Sequence[int]) -> Arrays:
        return added(parts)
