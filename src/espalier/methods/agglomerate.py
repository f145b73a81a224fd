"""Agglomerative clustering with a fixed order among ties: the closest pair merges first, lower ids first."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# d(k, i + j) from d(k, i), d(k, j), d(i, j) and the sizes of i, j, k (Lance and Williams, 1967).
LINKAGES: dict[str, Callable[[Floats, Floats, float, int, int, NDArray[np.int64]], Floats]] = {
    "average": lambda ki, kj, ij, ni, nj, nk: (ni * ki + nj * kj) / (ni + nj),
    "single": lambda ki, kj, ij, ni, nj, nk: np.minimum(ki, kj),
    "complete": lambda ki, kj, ij, ni, nj, nk: np.maximum(ki, kj),
    "ward": lambda ki, kj, ij, ni, nj, nk: np.sqrt(
        ((ni + nk) * ki**2 + (nj + nk) * kj**2 - nk * ij**2) / (ni + nj + nk)
    ),
}


def linkage_matrix(distances: Floats, linkage: str) -> Floats:
    """Return all N - 1 merges of N points by their `distances` [N, N], as SciPy writes them.

    Row s holds the labels of the two clusters that merge, their distance and the new size; the new cluster
    gets label N + s. Equal to `scipy.cluster.hierarchy.linkage` but for ties, which SciPy breaks by its
    search order: here the pair whose smallest members (i, j) come first wins. `ward` has a meaning for Euclidean
    distances only.
    """
    n = len(distances)
    distance = distances.astype(np.float64)  # a copy; row i stands for the cluster whose smallest member is i
    np.fill_diagonal(distance, np.inf)
    size, label = np.ones(n, np.int64), np.arange(n)
    merges = np.empty((n - 1, 4))
    for step in range(n - 1):
        i, j = divmod(int(np.argmin(distance)), n)  # the first minimum of a symmetric matrix has i < j
        height = float(distance[i, j])
        merges[step] = *sorted((label[i], label[j])), height, size[i] + size[j]
        others = np.isfinite(distance[i]) & np.isfinite(distance[j])
        row = LINKAGES[linkage](distance[i, others], distance[j, others], height, size[i], size[j], size[others])
        distance[i, others] = distance[others, i] = row
        distance[j, :] = distance[:, j] = np.inf
        size[i] += size[j]
        label[i] = n + step
    return merges


def cut(merges: Floats, clusters: int) -> list[list[int]]:
    """Return exactly `clusters` groups of ids: what the first N - clusters merges leave.

    A cut by height could leave fewer where heights tie.
    """
    n = len(merges) + 1
    groups = {i: [i] for i in range(n)}
    for step in range(n - clusters):
        first, second = int(merges[step, 0]), int(merges[step, 1])
        groups[n + step] = groups.pop(first) + groups.pop(second)
    return sorted(sorted(group) for group in groups.values())
