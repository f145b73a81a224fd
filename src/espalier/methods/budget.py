"""How many experts each MoE block keeps; imports no torch."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.checkpoints.shape import ModelShape
from espalier.errors import UserError
from espalier.plans.operations import group_problem


def survivors(ratio: float, shape: ModelShape, where: str) -> int:
    """Number of experts left when the fraction `ratio` of E is removed: E - round(ratio * E).

    `where` names the key's owner in the error, such as `conf/method/reap.yaml`. UserError when ratio is not
    in (0, 1), removes nothing, leaves fewer experts than the router picks, or does not fit its groups.
    """
    if not isinstance(ratio, int | float) or not 0 < ratio < 1:
        raise UserError(f"{where}: ratio={ratio} is not a fraction in (0, 1) of experts to remove.")
    left = shape.experts - round(ratio * shape.experts)
    if left < shape.top_k:
        most = (shape.experts - shape.top_k) / shape.experts
        raise UserError(
            f"{where}: ratio={ratio} leaves {left} of {shape.experts} experts, but the router picks "
            f"top_k={shape.top_k}. Use ratio <= {int(most * 1000) / 1000:g}."
        )
    if left == shape.experts:
        raise UserError(
            f"{where}: ratio={ratio} removes none of {shape.experts} experts. Use ratio >= {1 / shape.experts:g}."
        )
    each, rest = divmod(left, shape.groups)
    problem = f"not a multiple of the {shape.groups} router groups" if rest else group_problem(each, shape)
    if problem:
        sizes = range(shape.groups, shape.experts, shape.groups)
        fits = [n for n in sizes if n >= shape.top_k and not group_problem(n // shape.groups, shape)]
        ratios = ", ".join(f"{1 - n / shape.experts:g}" for n in sorted(fits, key=lambda n: abs(n - left))[:3])
        remedy = f"Use ratio={ratios}." if ratios else "No ratio suits this router."
        raise UserError(f"{where}: ratio={ratio} leaves {left} experts, {problem}. {remedy}")
    return left


def least(shape: ModelShape) -> int:
    """Return the fewest experts that one layer can be left with: a multiple of the router groups, at least K."""
    sizes = range(shape.groups, shape.experts + 1, shape.groups)
    return next(n for n in sizes if n >= shape.top_k and not group_problem(n // shape.groups, shape))


def global_survivors(scores: Mapping[int, NDArray[Any]], shape: ModelShape, total: int) -> dict[int, int]:
    """Return how many experts each layer keeps when the `total` best of all layers together are kept.

    `scores` are [E] by layer. A layer keeps at least `least(shape)`, and the same number in each router group: the
    n-th best of all groups together count as their mean. Ties go to the lower layer.
    """
    floor = least(shape) // shape.groups
    places = []
    for layer in sorted(scores):
        best = -np.sort(-np.asarray(scores[layer], np.float64).reshape(shape.groups, -1), axis=1)
        places += [(-score, layer) for score in best.mean(axis=0)[floor:]]
    counts = dict.fromkeys(sorted(scores), floor * shape.groups)
    for _, layer in sorted(places)[: (total - sum(counts.values())) // shape.groups]:
        counts[layer] += shape.groups
    return counts


def knapsack(losses: Mapping[int, NDArray[np.float64]], total: int) -> dict[int, int]:
    """Return how many experts each layer keeps, `total` in all, with the smallest sum of losses.

    `losses[layer][n]` is the layer's loss when it keeps n experts, infinite where it cannot. Exact, by dynamic
    programming; of equal sums the one that keeps fewer in the last layer where they differ. ValueError when `total`
    cannot be reached.
    """
    best = np.full(total + 1, np.inf)
    best[0] = 0.0
    choices = []
    for layer in sorted(losses):
        found = np.full(total + 1, np.inf)
        choice = np.zeros(total + 1, np.int64)
        for n, loss in enumerate(losses[layer][: total + 1]):
            if np.isfinite(loss):
                reached = best[: total + 1 - n] + loss
                better = reached < found[n:]
                found[n:][better] = reached[better]
                choice[n:][better] = n
        best = found
        choices.append((layer, choice))
    if not np.isfinite(best[total]):
        raise ValueError(f"no choice of experts a layer keeps {total} in all")
    counts, left = {}, total
    for layer, choice in reversed(choices):
        counts[layer] = int(choice[left])
        left -= counts[layer]
    return dict(sorted(counts.items()))
