"""How many clusters each layer is cut into, where not every layer gets the same number.

All of them leave as many clusters in total as a uniform budget, and in each layer at least `budget.least`.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from espalier.checkpoints.shape import ModelShape
from espalier.methods.agglomerate import Floats
from espalier.methods.budget import global_survivors, knapsack, least

BUDGETS = ("uniform", "global", "knapsack")
GLOBAL_BY = ("usage", "linkage")


def by_usage(counts: Mapping[int, NDArray[np.int64]], shape: ModelShape, total: int) -> dict[int, int]:
    """Return how many of the `total` most used experts of all layers each layer has (HC-SMoE's `dynamic_group`).

    `counts` are [E] by layer. Of equal counts the lower layer's comes first.
    """
    return global_survivors(counts, shape, total)


def by_linkage(merges: Mapping[int, Floats], shape: ModelShape, total: int) -> dict[int, int]:
    """Return the clusters of each layer when the lowest merges of all layers' linkage matrices are done.

    One cut through all dendrograms: heights are compared as they are. Ties go to the lower layer.
    """
    floor = least(shape)
    possible = [
        (height, layer)
        for layer in sorted(merges)
        for height in running_maximum(merges[layer])[: shape.experts - floor]
    ]
    counts = dict.fromkeys(sorted(merges), shape.experts)
    for _, layer in sorted(possible)[: len(merges) * shape.experts - total]:
        counts[layer] -= 1
    return counts


def running_maximum(merges: Floats) -> list[float]:
    """Return the heights of a linkage matrix, made monotone where rounding lets one fall below that before it."""
    heights: list[float] = np.maximum.accumulate(merges[:, 2]).tolist()
    return heights


def by_loss(curves: Mapping[int, Floats], shape: ModelShape, total: int) -> dict[int, int]:
    """Return the clusters of each layer with the smallest sum of losses; `curves[layer][n]` is that of n clusters."""
    floor = least(shape)
    allowed = {layer: np.where(np.arange(len(curve)) < floor, np.inf, curve) for layer, curve in curves.items()}
    return knapsack(allowed, total)


def loss_curve(merges: Floats, square: Floats, counts: NDArray[np.int64]) -> Floats:
    """Return the within-cluster loss [E + 1] of each number of clusters, infinite for none.

    With c_e the `counts` and v_C the mean of a cluster's vectors weighted by them,
        loss = sum_C sum_{e in C} c_e ||v_e - v_C||^2
             = sum_C sum_{e < f in C} c_e c_f ||v_e - v_f||^2 / sum_{e in C} c_e:
    for mean outputs the squared error that a token meets when it gets the merged output, summed over its choices.
    `square` [E, E] are the squared distances.
    """
    n = len(square)
    weighted = square * np.outer(counts, counts)
    groups = {e: [e] for e in range(n)}
    own = dict.fromkeys(range(n), 0.0)
    curve = np.full(n + 1, np.inf)
    curve[n] = 0.0
    for step, (first, second) in enumerate(merges[:, :2].astype(int).tolist()):
        group = groups.pop(first) + groups.pop(second)
        total = float(counts[group].sum())
        pairs = float(weighted[np.ix_(group, group)].sum()) / 2
        lost = own.pop(first) + own.pop(second)
        groups[n + step], own[n + step] = group, pairs / total if total else 0.0
        curve[n - step - 1] = curve[n - step] + own[n + step] - lost
    return curve
