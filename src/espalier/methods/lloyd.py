"""K-means with Lloyd's algorithm, by scikit-learn; every cluster has a member."""

import warnings

import numpy as np
from numpy.typing import NDArray

from espalier.methods.similarity import Floats

ITERATIONS = 100  # at most, as HC-SMoE's code


def kmeans(points: Floats, clusters: int, seed: int | list[int] | NDArray[np.int64]) -> list[list[int]]:
    """Return `clusters` groups of the rows of `points` [N, n], by smallest member.

    `seed`: numbers that seed k-means++, or an array of the points that the centres start from. A cluster that would
    stay empty (fewer distinct points than clusters) gets the point that lies farthest from its own centre, of equal
    ones that with the lowest number.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    settings = {"n_init": 1, "max_iter": ITERATIONS}
    if isinstance(seed, np.ndarray):
        model = KMeans(clusters, init=points[seed], **settings)
    else:
        model = KMeans(clusters, random_state=int(np.random.default_rng(seed).integers(2**31)), **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of empty clusters, which are filled below
        labels = model.fit(points).labels_
    groups = [np.flatnonzero(labels == label).tolist() for label in range(clusters)]
    return split([group for group in groups if group], points, clusters)


def split(groups: list[list[int]], points: Floats, clusters: int) -> list[list[int]]:
    """Make groups of their own of the points farthest from their group's mean, until there are `clusters`."""
    groups = sorted(sorted(group) for group in groups)
    while len(groups) < clusters:
        far = {
            e: float(np.linalg.norm(points[e] - points[group].mean(axis=0)))
            for group in groups
            if len(group) > 1
            for e in group
        }
        alone = min(far, key=lambda e: (-far[e], e))
        groups = [*([e for e in group if e != alone] for group in groups), [alone]]
    return sorted(groups)
