"""How much each neuron of each expert gives to the block's output."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch

from espalier.checkpoints.shape import ModelShape
from espalier.models.observe import BlockTrace, inner_activation
from espalier.probes.probe import Arrays, to_numpy


class NeuronEnergy:
    """Over the tokens that chose an expert, of phi = g a with its inner activation a and the routing weight g.

    Where the router scales the input (Llama 4), the weight is in a already and phi = a.

    square_sum float64 [E, F]: sum of phi^2.   square_max float64 [E, F]: largest phi^2.
    """

    dense: ClassVar[bool] = False
    merged: ClassVar[bool] = False

    def __init__(self, shape: ModelShape, tokens: int) -> None:
        self.square_sum, self.square_max = np.zeros((2, shape.experts, shape.width))

    def update(self, trace: BlockTrace) -> None:
        for expert in range(trace.experts.num_experts):
            token, k = (trace.indices == expert).nonzero(as_tuple=True)
            if not len(token):
                continue
            hidden = trace.hidden[token]
            if trace.scales is not None:
                hidden = hidden * trace.weights[token, k].unsqueeze(1).to(hidden.dtype)
            inner = inner_activation(trace.experts, hidden, expert).double()  # [tokens, F]
            square = (inner * trace.output_weights[token, k].double().unsqueeze(1)).square()
            self.square_sum[expert] += to_numpy(square.sum(0))
            self.square_max[expert] = np.maximum(self.square_max[expert], to_numpy(torch.amax(square, 0)))

    def result(self) -> Arrays:
        return {"square_sum": self.square_sum, "square_max": self.square_max}

    @staticmethod
    def merge(parts: Sequence[Arrays], tokens: Sequence[int]) -> Arrays:
        return {
            "square_sum": np.sum([part["square_sum"] for part in parts], axis=0),
            "square_max": np.max([part["square_max"] for part in parts], axis=0),
        }
