"""Overlapping experts in one stored copy: neurons that belong to the same experts lie together.

A *signature* is the set of experts that have a neuron. Neurons of one signature make a segment, and an expert is the
segments whose signature holds it; the segments are put in an order in which each expert's lie in few pieces, so that a
single token reads few stretches of the weights.

Shapes: E experts, F neurons, S segments.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def segments_of(masks: NDArray[np.bool_]) -> tuple[NDArray[np.int64], tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Return the stored neurons [F'], the segments' sizes and the segments of each expert for `masks` bool [E, F].

    Neurons that no expert has are left out. ValueError when an expert has none.
    """
    if not masks.any(axis=1).all():
        raise ValueError("an expert has no neuron")
    used = np.flatnonzero(masks.any(axis=0))
    signatures, owner = np.unique(masks[:, used].T, axis=0, return_inverse=True)  # [S, E], [F']
    sizes = np.bincount(owner.ravel(), minlength=len(signatures))
    order = path(signatures, sizes)
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    place = rank[owner.ravel()]
    neurons = used[np.argsort(place, kind="stable")]
    units = tuple(tuple(np.flatnonzero(signatures[order, expert]).tolist()) for expert in range(len(masks)))
    return neurons, tuple(sizes[order].tolist()), units


def path(signatures: NDArray[np.bool_], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return an order of `signatures` [S, E] in which neighbours differ in few experts, [S].

    The nearest neighbour is taken again and again, from the signature of all experts (or the largest) on, then parts of
    the path are turned round while that helps (2-opt).
    """
    count = len(signatures)
    apart = (signatures[:, None] != signatures[None]).sum(axis=2)
    start = int(np.lexsort((-sizes, -signatures.sum(axis=1)))[0])
    order, left = [start], set(range(count)) - {start}
    while left:
        last = order[-1]
        order.append(min(left, key=lambda s: (int(apart[last, s]), -int(sizes[s]), s)))
        left.remove(order[-1])
    found = np.array(order)
    improved = count > 3
    while improved:
        improved = False
        for i in range(1, count - 1):
            # Turning found[i : j + 1] round replaces two steps of the path by two others; the last has no successor.
            before, first = found[i - 1], found[i]
            ends = found[i + 1 :]
            gain = apart[before, first] - apart[before, ends]
            gain[:-1] += apart[ends[:-1], ends[1:]] - apart[first, ends[1:]]
            best = int(gain.argmax())
            if gain[best] > 0:
                found[i : i + best + 2] = found[i : i + best + 2][::-1].copy()
                improved = True
    return found


def pieces(units: Sequence[Sequence[int]]) -> float:
    """Return in how many stretches of the stored neurons an expert lies, the mean over experts."""
    return float(np.mean([1 + int((np.diff(unit) > 1).sum()) for unit in units]))
