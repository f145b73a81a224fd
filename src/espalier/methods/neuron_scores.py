"""What each neuron of a dense FFN is worth.

Shapes: T tokens, F neurons, D hidden.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.collecting.stats import Array
from espalier.models.ffn_weights import FFNLayer

SCORES = ("activation", "magnitude")


def activation(arrays: Mapping[str, Array], layer: FFNLayer, tokens: int) -> NDArray[np.float64]:
    """Return the root mean square of a_j times ||W_down,j||_2, [F]: Wanda's criterion (arXiv 2306.11695) by neuron.

    `arrays` are those of the probe `ffn_energy`.
    """
    norms = layer.down_norms().double().numpy()
    found: NDArray[np.float64] = np.sqrt(arrays["square_sum"] / max(tokens, 1)) * norms
    return found


def magnitude(layer: FFNLayer) -> NDArray[np.float64]:
    """Return the product of the norms of a neuron's weights, [F]; it needs no data."""
    found = layer.up.norm(dim=1).double() * layer.down_norms().double()
    if layer.gate is not None:
        found = found * layer.gate.norm(dim=1).double()
    values: NDArray[np.float64] = found.numpy()
    return values


def best(scores: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Return the `count` neurons of largest score, ascending; of equal ones the lower."""
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def unit_scores(layer: FFNLayer, hidden: Any, labels: NDArray[np.int64], units: int) -> Any:
    """Return a unit's score on each token, float32 [T, U]: the sum over its neurons of |a_j| ||W_down,j||_2.

    MoEfication's (arXiv 2110.01786) sum of positive activations, for activations of either sign. A neuron with label
    -1 belongs to no unit.
    """
    import torch

    value = layer.inner(hidden).abs() * layer.down_norms()
    owner = torch.zeros(len(labels), units)
    rows = np.flatnonzero(labels >= 0)
    owner[rows, torch.from_numpy(labels[rows])] = 1.0
    return value @ owner
