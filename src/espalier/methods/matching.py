"""Which neuron of a merged expert each neuron of a group's members goes to.

Shapes: N tokens, F neurons, n members of a group. `inner` are the members' inner activations, what the down projection
gets, [N, F] each.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from espalier.methods.similarity import Floats, unit

Targets = NDArray[np.int32]
BLOCK = 2048  # neurons whose correlations with all others are in memory at once
STILL = 1e-7  # a neuron whose deviation is below this share of its largest activation does nothing but its mean


def to_dominant(inner: Sequence[NDArray[np.float32]], dominant: int) -> Targets:
    """Return the targets [n, F] when each neuron goes to the most correlated one of member `dominant`.

    Fix-Dom of HC-SMoE (arXiv 2410.08589, appendix): many may go to one, and the dominant's own stay. Of equal
    correlations the lower neuron is taken. A neuron without variance, or with fewer than two tokens, is correlated
    with none: it goes to its own number.
    """
    width = inner[0].shape[1]
    targets = np.tile(np.arange(width, dtype=np.int32), (len(inner), 1))
    if len(inner[0]) < 2:
        return targets
    reference = standardised(inner[dominant])
    for member, activation in enumerate(inner):
        if member == dominant:
            continue
        own = standardised(activation)
        for start in range(0, width, BLOCK):
            part = own[:, start : start + BLOCK]
            best = np.argmax(reference.T @ part, axis=0)
            moving = part.any(axis=0)
            targets[member, start : start + BLOCK][moving] = best[moving]
    return targets


def standardised(activation: NDArray[np.float32]) -> Floats:
    """Return the columns [N, F] with mean 0 and length 1, so that their products are Pearson correlations."""
    values = activation.astype(np.float64)
    largest = np.abs(values).max(axis=0)
    values -= values.mean(axis=0)
    norm = np.linalg.norm(values, axis=0)
    still = norm <= STILL * np.sqrt(len(values)) * largest
    values /= np.where(still, 1, norm)
    values[:, still] = 0
    return values


def zipped(inner: Sequence[NDArray[np.float32]]) -> Targets:
    """Return the targets [n, F] when the most correlated pair of all n F neurons is joined until F are left.

    ZipIt (Stoica et al., arXiv 2305.03053), as HC-SMoE uses it. Joined neurons are as related to another as the less
    related of them. HC-SMoE's code also takes a tenth of that, so that a neuron is seldom joined twice: then the
    neurons of three equal experts do not find each other, and it was not measured to merge better. Of equal
    correlations the lower pair is joined. A neuron without variance is correlated with those of its number alone.
    With fewer than two tokens each neuron goes to its own number.
    """
    width, members = inner[0].shape[1], len(inner)
    if len(inner[0]) < 2:
        return np.tile(np.arange(width, dtype=np.int32), (members, 1))
    features = np.concatenate([standardised(activation) for activation in inner], axis=1).astype(np.float32)
    related = features.T @ features  # [n F, n F]
    still = np.flatnonzero(~features.any(axis=0))
    related[np.ix_(still, still)] = np.equal.outer(still % width, still % width)
    label = np.arange(width * members)
    alive = np.ones(len(label), bool)
    best = np.full(len(label), -np.inf, np.float32)  # a neuron's largest correlation with a later one, and which
    partner = np.zeros(len(label), np.int64)

    def look(i: int) -> None:
        later = np.where(alive[i + 1 :], related[i, i + 1 :], -np.inf)
        best[i] = -np.inf
        if len(later):
            partner[i] = i + 1 + int(np.argmax(later))
            best[i] = later[partner[i] - i - 1]

    for i in range(len(label)):
        look(i)
    for _ in range(width * (members - 1)):
        i = int(np.argmax(np.where(alive, best, -np.inf)))
        j = int(partner[i])
        related[i] = related[:, i] = np.minimum(related[i], related[j])  # never grows: other best pairs stay best
        alive[j] = False
        label[label == j] = i
        for k in np.flatnonzero(alive & ((partner == i) | (partner == j))).tolist():
            look(k)
        look(i)
    found = np.unique(label, return_inverse=True)[1]
    return found.reshape(members, width).astype(np.int32)


def by_weights(first: NDArray[np.float32], other: NDArray[np.float32]) -> Targets:
    """Return the targets [F] of the permutation of `other` [F, n] that lies closest to `first` [F, n].

    The rows are neurons, and sum_m ||first[target[m]] - other[m]||^2 is least (weight matching; Git Re-Basin, arXiv
    2209.04836, for one hidden layer).
    """
    return assigned(-(first.astype(np.float64) @ other.astype(np.float64).T))


def by_weights_and_activations(
    weights: tuple[NDArray[np.float32], NDArray[np.float32]], inner: tuple[NDArray[np.float32], NDArray[np.float32]]
) -> Targets:
    """Return the targets [F] of the permutation with the least sum of two distances, of (first, other) each (REAM).

    `weights` [F, n] have a row for each neuron, `inner` [N, F] a column; both are scaled to length 1 before.
    """
    cost = unit_distances(*weights)
    if len(inner[0]) > 1:
        cost += unit_distances(inner[0].T, inner[1].T)
    return assigned(cost)


def unit_distances(first: NDArray[np.float32], other: NDArray[np.float32]) -> Floats:
    """Return the Euclidean distances between the rows, [F, F], when all are scaled to length 1."""
    a, b = unit(first.astype(np.float64)), unit(other.astype(np.float64))
    lengths = np.add.outer((a * a).sum(axis=1), (b * b).sum(axis=1))  # 1 + 1, or less for rows of zeros
    return np.asarray(np.sqrt(np.maximum(lengths - 2 * (a @ b.T), 0)))


def assigned(cost: Floats) -> Targets:
    """Return for each column of `cost` [F, F] its row in the assignment of least cost."""
    from scipy.optimize import linear_sum_assignment  # slow to import, and few rules match neurons

    rows, columns = linear_sum_assignment(cost)
    targets = np.empty(len(cost), np.int32)
    targets[columns] = rows
    return targets
