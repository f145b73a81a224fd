"""Partitions of an FFN's neurons into equal blocks.

Shapes: F neurons, E blocks, D hidden.
"""

import numpy as np
from numpy.typing import NDArray

from espalier.errors import UserError

Labels = NDArray[np.int64]  # the block of each neuron, [F]


def block_size(method: str, neurons: int, blocks: int, what: str = "neurons") -> int:
    """Return how many of `neurons` each of `blocks` holds; UserError where they do not divide."""
    if blocks < 1 or neurons % blocks:
        fits = [n for n in range(2, min(neurons, 257)) if neurons % n == 0]
        near = sorted(fits, key=lambda n: abs(n - blocks))[:4]
        raise UserError(
            f"conf/method/{method}.yaml: blocks={blocks} does not divide {neurons} {what}. Use blocks="
            f"{', '.join(map(str, sorted(near)))}."
        )
    return neurons // blocks


def active_blocks(method: str, ratio: float, blocks: int) -> int:
    """Return how many of `blocks` a token runs when the fraction `ratio` of them is left out.

    UserError unless ratio is in (0, 1), leaves at least one block out and one in.
    """
    where = f"conf/method/{method}.yaml: ratio={ratio}"
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < 1:
        raise UserError(f"{where} is not a fraction in (0, 1) of neurons that a token leaves out.")
    left_out = round(ratio * blocks)
    if not 0 < left_out < blocks:
        raise UserError(
            f"{where} leaves {left_out} of {blocks} blocks out. Use {1 / blocks:g} <= ratio <= {1 - 1 / blocks:g}."
        )
    return blocks - left_out


def contiguous(neurons: int, blocks: int) -> Labels:
    """Return consecutive blocks."""
    return np.repeat(np.arange(blocks), neurons // blocks)


def random(neurons: int, blocks: int, rng: np.random.Generator) -> Labels:
    """Return blocks drawn without replacement."""
    labels: Labels = rng.permutation(contiguous(neurons, blocks))
    return labels


def balanced_kmeans(points: NDArray[np.float64], blocks: int, seed: int) -> Labels:
    """Return the clusters of equal size that size-constrained k-means (Bradley et al., 2000) finds for `points` [F, D].

    Of one start by k-means++; the library `k-means-constrained` solves each assignment exactly, as a minimum cost flow.
    """
    from k_means_constrained import KMeansConstrained

    size = len(points) // blocks
    if blocks == 1:
        return np.zeros(len(points), np.int64)
    model = KMeansConstrained(blocks, size_min=size, size_max=size, n_init=1, max_iter=100, random_state=seed, n_jobs=1)
    return _numbered(model.fit(points).labels_.astype(np.int64))


def balanced_assignment(costs: NDArray[np.int64], capacity: int) -> Labels:
    """Return the column of each row of `costs` int [n, k] that makes the sum least, `capacity` rows a column.

    Exact, as a minimum cost flow (OR-tools). ValueError unless n = k capacity.
    """
    from ortools.graph.python import min_cost_flow

    rows, columns = costs.shape
    if rows != columns * capacity:
        raise ValueError(f"{rows} rows do not fill {columns} columns of {capacity}")
    flow = min_cost_flow.SimpleMinCostFlow()
    starts = np.repeat(np.arange(rows), columns)
    ends = rows + np.tile(np.arange(columns), rows)
    arcs = flow.add_arcs_with_capacity_and_unit_cost(starts, ends, np.ones(rows * columns, np.int64), costs.ravel())
    flow.set_nodes_supplies(np.arange(rows + columns), np.repeat([1, -capacity], [rows, columns]))
    if flow.solve() != flow.OPTIMAL:
        raise RuntimeError("the assignment was not solved")
    chosen: NDArray[np.int64] = flow.flows(arcs).reshape(rows, columns).argmax(axis=1)
    return chosen


def stored_order(labels: Labels) -> NDArray[np.int64]:
    """Return the neurons block by block, ascending inside, [F]."""
    return np.argsort(labels, kind="stable")


def _numbered(labels: Labels) -> Labels:
    """Number the blocks by their first neuron, whatever the clustering calls them."""
    _, first = np.unique(labels, return_index=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    found: Labels = rank[labels]
    return found
