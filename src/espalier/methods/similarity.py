"""How far the experts of one layer are from each other, by what the calibration or the weights say of them.

Shapes: T tokens, E experts, K chosen, D hidden, F expert width. What is compared of expert e is one vector v_e:

    expert_output   its mean output over all T tokens [D] (HC-SMoE, arXiv 2410.08589)
    routed_output   its mean output over the tokens that chose it [D]; zero where none did
    router_logits   its column of the router's logits [T]
    weight          its matrices, flat: gate, up, down [3 F D]

Distances between the two long ones follow from their inner products <v_e, v_f>, an E x E matrix: T x E logits or
all weights of a layer are never in memory.
"""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import pdist, squareform

from espalier.checkpoints.shape import ModelShape
from espalier.collecting.stats import Stats

if TYPE_CHECKING:
    from espalier.models.experts import ExpertWeights

Floats = NDArray[np.float64]

# The probes that each needs.
SIMILARITIES: dict[str, tuple[str, ...]] = {
    "expert_output": ("mean_output",),
    "routed_output": ("routed_moments",),
    "router_logits": ("logit_gram",),
    "weight": (),
}
DISTANCES = ("euclidean", "cosine")

WEIGHT_BYTES = 2 * 2**30  # of float64 weights in memory at once; a larger layer is read in several passes
ROUNDING = 1e-13  # squared distances below this share of the vectors' own squares are rounding errors


def distances(
    similarity: str,
    distance: str,
    layer: int,
    stats: Stats,
    shape: ModelShape,
    experts: "ExpertWeights | None" = None,
) -> Floats:
    """Return the distances between the experts of a layer, float64 [E, E], symmetric with a zero diagonal.

    `euclidean`: ||v_e - v_f||. `cosine`: 1 - cos(v_e, v_f), which is half the squared distance of the vectors scaled
    to length 1; a vector of zeros is at 1 from all but another of them. `experts` is read for `weight` only.
    """
    points = outputs(similarity, layer, stats)
    if points is None:
        return gram_distances(gram(similarity, layer, stats, shape, experts), distance)
    if distance == "euclidean":
        return np.asarray(squareform(pdist(points)), np.float64)
    return cosine_distances(points)


def vectors(
    similarity: str,
    distance: str,
    layer: int,
    stats: Stats,
    shape: ModelShape,
    experts: "ExpertWeights | None" = None,
) -> Floats:
    """Return points [E, n] that lie as far apart as the experts' vectors, of length 1 where `distance` is `cosine`.

    Where only inner products are known they are the rows of a square root of that matrix, n = E.
    """
    points = outputs(similarity, layer, stats)
    if points is None:
        values, axes = np.linalg.eigh(gram(similarity, layer, stats, shape, experts))
        points = axes * np.sqrt(np.maximum(values, 0))
    return unit(points) if distance == "cosine" else points


def outputs(similarity: str, layer: int, stats: Stats) -> Floats | None:
    """Return the vectors that are outputs, float64 [E, D], or None for another similarity."""
    if similarity == "expert_output":
        return np.asarray(stats.layer("mean_output", layer)["all_tokens"], np.float64)
    if similarity == "routed_output":
        moments = stats.layer("routed_moments", layer)
        total = moments["sum"].astype(np.float64)
        return np.asarray(total / np.maximum(moments["counts"], 1)[:, None])
    return None


def gram(similarity: str, layer: int, stats: Stats, shape: ModelShape, experts: "ExpertWeights | None") -> Floats:
    """Return the inner products [E, E] of the vectors of `router_logits` or `weight`."""
    if similarity == "router_logits":
        return np.asarray(stats.layer("logit_gram", layer)["gram"], np.float64)
    assert experts is not None
    return weight_gram(experts, layer, shape.experts)


def weight_gram(experts: "ExpertWeights", layer: int, number: int) -> Floats:
    """Return the inner products [E, E] of the experts' flat weights.

    Some neurons of all E experts are in memory at once, at most WEIGHT_BYTES of them in float64, and one expert: what
    exceeds that is read again in the next pass.
    """
    first = experts.neurons(layer, 0)
    width = next(iter(first.values())).shape[0]
    neuron = sum(part.shape[1] for part in first.values())  # numbers of each neuron
    step = max(1, int(WEIGHT_BYTES / (8 * neuron * number)))
    total = np.zeros((number, number))
    for start in range(0, width, step):
        size = min(step, width - start)
        rows = np.empty((number, size * neuron))
        for expert in range(number):
            parts = experts.neurons(layer, expert).values()
            np.concatenate([part[start : start + size].numpy().ravel() for part in parts], out=rows[expert])
        total += rows @ rows.T
    return total


def gram_distances(products: Floats, distance: str) -> Floats:
    """Return distances [E, E] from the vectors' inner products."""
    square = np.diagonal(products)
    if distance == "cosine":
        norm = np.sqrt(square)
        length = np.outer(norm, norm)
        cosine = np.where(length > 0, products / np.where(length > 0, length, 1), np.equal.outer(norm, norm))
        found = 1 - cosine
        found[found < ROUNDING] = 0
    else:
        sums = np.add.outer(square, square)
        found = sums - 2 * products
        found = np.sqrt(np.where(found > ROUNDING * sums, found, 0))
    found = np.maximum(found, found.T)  # products of equal pairs may differ in their last bit
    np.fill_diagonal(found, 0)
    return np.asarray(found)


def cosine_distances(points: Floats) -> Floats:
    """Return 1 - cosine of the rows of `points`, [E, E]."""
    found = np.asarray(squareform(pdist(unit(points), "sqeuclidean")) / 2)
    zero = ~points.any(axis=1)
    found[zero] = found[:, zero] = 1
    found[np.ix_(zero, zero)] = 0
    return found


def unit(points: Floats) -> Floats:
    """Return the rows scaled to length 1; those of zeros stay."""
    norm = np.linalg.norm(points, axis=1, keepdims=True)
    return np.asarray(points / np.where(norm > 0, norm, 1))


def squares(found: Floats, distance: str) -> Floats:
    """Return squared Euclidean distances from `distances`: for `cosine` those of the vectors scaled to length 1."""
    return found**2 if distance == "euclidean" else 2 * found
