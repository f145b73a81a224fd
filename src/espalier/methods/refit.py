"""The down projection that makes a merged expert reproduce its members' outputs, by least squares.

Shapes: N tokens, F neurons, D hidden. With a_e how often expert e of group C is chosen, as a share of the group, and
g_e(x) the weight with which the router chooses it, W fits the merged expert's inner activation P to

    least_squares          sum_{e in C} a_e E_e(x)                                  (MergeMoE, arXiv 2510.14436)
    routed_least_squares   sum_{e in C} g_e(x) E_e(x) / sum_{e in C} g_e(x), each token weighted by its summed g squared

on the sampled tokens that chose any member. The second is what the group adds to the block's output; its squared
error is the block's but for the products of two groups' errors.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve

from espalier.methods.evidence import Evidence, chose_any, gates
from espalier.methods.similarity import Floats
from espalier.plans.operations import Merge

# Of the mean squared activation. Chosen on held-out tokens of the embedded model (50 % and 25 %): the mean of outputs
# hardly needs one (1e-6 to 1e-2 differ by 0.1 % in the block's error); the routed target is noisier.
RIDGES = {"least_squares": 1e-2, "routed_least_squares": 1e-1}


def refit(down: NDArray[Any], inner: NDArray[Any], missing: NDArray[Any], ridge: float) -> Floats:
    """Return the down projection W [F, D], transposed, that is the least-squares fit near `down`:

        argmin_W ||P (W - W0) - R||_F^2 + lambda ||W - W0||_F^2,   lambda = ridge * trace(P^T P) / min(N, F)

    with W0 = `down` [F, D], P = `inner` [N, F] and R = `missing` [N, D], what P W0 lacks. Solved in float64 by the
    normal equations, or by their dual where there are fewer tokens than neurons. The ridge leaves W0 where the tokens
    say nothing: MergeMoE's pseudo-inverse would put zeros there. Without tokens, or activations, W is W0.
    """
    p, r = inner.astype(np.float64), missing.astype(np.float64)
    start = down.astype(np.float64)
    tokens, width = p.shape
    dual = tokens < width
    products = p @ p.T if dual else p.T @ p
    strength = ridge * float(np.trace(products)) / max(len(products), 1)
    if strength == 0:
        return start
    products.flat[:: len(products) + 1] += strength
    change = p.T @ solve(products, r, assume_a="pos") if dual else solve(products, p.T @ r, assume_a="pos")
    return np.asarray(start + change)


def refitted_down(rule: str, merge: Merge, layer: int, evidence: Evidence) -> NDArray[np.float32]:
    """Return the fitted down projections [M, F, D] of the M groups with more than one member."""
    groups = zip(merge.groups, merge.weights, strict=True)
    found = [refitted_group(rule, group, weights, layer, evidence) for group, weights in groups if len(group) > 1]
    return np.stack(found).astype(np.float32)


def refitted_group(rule: str, group: Sequence[int], weights: Sequence[float], layer: int, evidence: Evidence) -> Floats:
    """Return the fitted down projection [F, D] of one group, whose members weigh `weights`."""
    import torch

    arrays = evidence.stats.layer("inputs", layer)
    tokens = chose_any(arrays, group)
    x = torch.from_numpy(arrays["hidden"][tokens])
    block = evidence.block(layer)
    merged = block.merged(group, weights)
    if rule == "least_squares":
        shares = np.tile(weights, (len(x), 1))  # [N, n]
        scale = np.ones((len(x), 1))
    else:
        shares = gates(arrays, group)[tokens]
        scale = shares.sum(axis=1, keepdims=True)
    missing = -scale * merged.output(0, x).double().numpy()
    down = np.zeros((evidence.shape.width, evidence.shape.hidden))
    for expert, weight, share in zip(group, weights, shares.T, strict=True):
        missing += share[:, None] * block.output(expert, x).double().numpy()
        down += weight * evidence.weights.neurons(layer, expert)["down"].double().numpy()
    return refit(down, scale * merged.inner(0, x).numpy(), missing, RIDGES[rule])
