"""Output error of a MoE block for sets of dropped experts, from residual Gram matrices instead of forwards.

Dropping experts changes which experts a token picks and their weights w, never an expert's output y. With z
the block's output, s = sum w, H[a,b] = <y_a - z, y_b - z> and c[a] = <y_a - z, z>, the new output z' obeys

    ||z' - z||^2 = w^T H w + 2 (s - 1) w^T c + (s - 1)^2 ||z||^2,

in which the last two terms vanish where the router scales its weights to sum to 1. The shared expert cancels.
"""

from collections.abc import Mapping
from itertools import combinations
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Floats = NDArray[np.float64]

BLOCK = 2048  # tokens a step; the working set stays in tens of megabytes


def packed_index(experts: int) -> NDArray[np.int64]:
    """Return [E, E] positions in a packed, row-major upper triangle; symmetric."""
    index = np.zeros((experts, experts), np.int64)
    rows, columns = np.triu_indices(experts)
    index[rows, columns] = index[columns, rows] = np.arange(len(rows))
    return index


def all_subsets(arrays: Mapping[str, Array], chunk: NDArray[np.int64]) -> Floats:
    """Return the loss of every set of dropped experts, [2^E]; bit e of the position says that e is dropped.

    For K = 2 and weights that sum to 1. `arrays` is one layer of the probe `residual_gram`, `chunk` [T] the
    chunk of each token; the loss sums the norm ||Z - Z'||_F of each chunk. Sets that leave fewer than two
    experts get infinity.

    A token picks the pair (a, b), a above b, iff both are kept and all others that rank above b are dropped.
    Its error is added at (pair, set of those others); the sum over all subsets of a dropped set (a zeta
    transform) then is that set's squared loss: O(T E^2 + E^3 2^E) in place of O(T C(E, r)).
    """
    experts = arrays["logits"].shape[1]
    losses = np.zeros(1 << experts)
    for number in np.unique(chunk):
        rows = chunk == number
        table = _pair_table(arrays["gram"][rows], arrays["logits"][rows])
        losses += np.sqrt(np.maximum(_sum_over_pairs(table, experts), 0))
    kept = experts - np.bitwise_count(np.arange(1 << experts))
    losses[kept < 2] = np.inf
    return losses


def _pair_table(gram: Array, logits: Array) -> Floats:
    """Return summed squared errors [E (E - 1) / 2, 2^(E - 2)] by picked pair and set of dropped higher ranks.

    The two bits of the pair are cut out of the set: neither is ever dropped.
    """
    experts = logits.shape[1]
    pairs = experts * (experts - 1) // 2
    packed = packed_index(experts)
    first, second = np.triu_indices(experts, 1)  # ranks of a pair
    first, second = first[1:], second[1:]  # ranks 0 and 1 are the original choice: its error is exactly 0
    table = np.zeros(pairs << (experts - 2))
    for start in range(0, len(logits), BLOCK):
        logit = logits[start : start + BLOCK].astype(np.float64)
        order = np.argsort(-logit, axis=1, kind="stable")  # [T, E]
        bits = np.left_shift(1, order)
        above = np.cumsum(bits, axis=1) - bits  # [T, E] all experts that rank higher
        a, b = order[:, first], order[:, second]  # [T, pairs]
        error = _quadratic(gram[start : start + BLOCK], logit, packed, a, b)
        low, high = np.minimum(a, b), np.maximum(a, b)
        dropped = above[:, second] - bits[:, first]
        dropped = _without_bit(_without_bit(dropped, high), low)
        pair = low * experts - low * (low + 1) // 2 + high - low - 1
        position = (pair << (experts - 2)) + dropped
        table += np.bincount(position.ravel(), error.ravel(), table.size)
    return table.reshape(pairs, -1)


def _quadratic(gram: Array, logit: Floats, packed: NDArray[np.int64], a: Array, b: Array) -> Floats:
    """Return w^T H w of each token and pair, [T, pairs]; weights are the softmax of the pair's logits."""
    row = np.arange(len(logit))[:, None]
    weight = 1 / (1 + np.exp(logit[row, b] - logit[row, a]))  # a ranks above b: no overflow
    h = [gram[row, packed[i, j]].astype(np.float64) for i, j in ((a, a), (a, b), (b, b))]
    error: Floats = weight**2 * h[0] + 2 * weight * (1 - weight) * h[1] + (1 - weight) ** 2 * h[2]
    return error


def _without_bit(sets: Array, bit: Array) -> Array:
    """Cut bit number `bit` out of each set; higher bits move down by one."""
    low = sets & (np.left_shift(1, bit) - 1)
    result: Array = low | ((sets >> (bit + 1)) << bit)
    return result


def _sum_over_pairs(table: Floats, experts: int) -> Floats:
    """Return the squared loss of every dropped set, [2^E], from a table that is overwritten."""
    for bit in range(experts - 2):
        view = table.reshape(len(table), -1, 2, 1 << bit)
        view[:, :, 1] += view[:, :, 0]
    total = np.zeros([2] * experts)  # axis i stands for bit E - 1 - i
    for pair, (a, b) in enumerate(combinations(range(experts), 2)):
        both_kept: list[Any] = [slice(None)] * experts
        both_kept[experts - 1 - a] = both_kept[experts - 1 - b] = 0
        total[tuple(both_kept)] += table[pair].reshape([2] * (experts - 2))
    return total.ravel()


def enumerate_subsets(
    arrays: Mapping[str, Array], chunk: NDArray[np.int64], removed: int, top_k: int, renormalise: bool
) -> Floats:
    """Return the loss of every set of `removed` experts, in the order of itertools.combinations.

    For any K. The router's weights are those of a model whose router rows are sliced: softmax over the kept
    experts, the K largest, scaled to sum to 1 if `renormalise`; without that they grow, also for tokens that
    keep their choice. `arrays`, `chunk` and the loss as in `all_subsets`.
    """
    logits = arrays["logits"].astype(np.float64)
    tokens, experts = logits.shape
    order = np.argsort(-logits, axis=1, kind="stable")[:, : top_k + removed]  # no lower rank is ever picked
    probability = np.exp(logits - logits.max(axis=1, keepdims=True))
    probability /= probability.sum(axis=1, keepdims=True)
    norm = arrays["norm"].astype(np.float64)
    packed = packed_index(experts)
    losses = np.empty(comb(experts, removed))
    for number, dropped in enumerate(combinations(range(experts), removed)):
        gone = np.zeros(experts, bool)
        gone[list(dropped)] = True
        changed = gone[order[:, :top_k]].any(axis=1)
        error = np.zeros(tokens)  # exactly 0 for tokens that keep their choice, if weights sum to 1
        if not renormalise:
            mass = probability[~changed][:, gone].sum(axis=1)
            error[~changed] = (mass / (1 - mass)) ** 2 * norm[~changed]  # z' = z / (1 - mass)
        rows = np.flatnonzero(changed)
        if len(rows):
            error[rows] = _changed_errors(arrays, logits, order, packed, rows, gone, top_k, renormalise)
        squared = np.bincount(chunk, error)
        losses[number] = np.sqrt(np.maximum(squared, 0)).sum()
    return losses


def _changed_errors(
    arrays: Mapping[str, Array],
    logits: Floats,
    order: NDArray[np.int64],
    packed: NDArray[np.int64],
    rows: NDArray[np.int64],
    gone: NDArray[np.bool_],
    top_k: int,
    renormalise: bool,
) -> Floats:
    """Return ||z' - z||^2 of the tokens `rows`, which lose at least one of their experts, [len(rows)]."""
    ranked = order[rows]
    kept = ~gone[ranked]
    picked = ranked[kept & (np.cumsum(kept, axis=1) <= top_k)].reshape(-1, top_k)  # [T, K], best first
    row = rows[:, None]
    best = logits[row, picked[:, :1]]
    weight = np.exp(logits[row, picked] - best)  # [T, K]
    if renormalise:
        weight /= weight.sum(axis=1, keepdims=True)
    else:
        weight /= np.exp(logits[rows][:, ~gone] - best).sum(axis=1, keepdims=True)
    i, j = np.triu_indices(top_k)
    h = arrays["gram"][row, packed[picked[:, i], picked[:, j]]].astype(np.float64)  # [T, K (K + 1) / 2]
    error: Floats = (np.where(i == j, 1, 2) * weight[:, i] * weight[:, j] * h).sum(axis=1)
    if not renormalise:
        excess = weight.sum(axis=1) - 1
        cross = (weight * arrays["cross"][row, picked]).sum(axis=1)
        error += 2 * excess * cross + excess**2 * arrays["norm"][rows].astype(np.float64)
    return error
