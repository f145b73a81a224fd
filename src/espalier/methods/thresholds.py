"""Thresholds of the skipping rules: what they are compared with on the calibration, and which one meets a budget.

Shapes: T tokens, K experts a token, whose weights w_1 >= ... >= w_K the rules look at (`plans.operations.Skip`).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.checkpoints.shape import ModelShape
from espalier.errors import UserError

Floats = NDArray[np.float64]


def cut_values(rule: str, weights: NDArray[Any]) -> Floats:
    """Return the numbers that the rule compares with its threshold c, one for each expert but the first, [T, K - 1].

    Expert i + 1 stays where, with `weights` [T, K]:  `ratio`  w_{i+1} / w_1 >= c;
    `tail`  (w_{i+1} + ... + w_K) / (w_1 + ... + w_K) > c;  `top_p`  w_1 + ... + w_i < c, for probabilities w.
    Rounded to fp32, as the model's are.
    """
    weights = weights.astype(np.float64)
    if rule == "ratio":
        values = weights[:, 1:] / weights[:, :1]
    elif rule == "tail":
        sums = weights[:, ::-1].cumsum(axis=1)[:, ::-1]  # [T, K]: w_i + ... + w_K
        values = sums[:, 1:] / sums[:, :1]
    else:
        values = weights.cumsum(axis=1)[:, :-1]
    return np.asarray(values.astype(np.float32), np.float64)


def kept(values: Floats, rule: str, thresholds: Floats) -> NDArray[np.int64]:
    """Return how many of the `values`, sorted [N], stay by each threshold."""
    if rule == "top_p":
        below = np.searchsorted(values, thresholds, side="left")
        return np.asarray(np.where(thresholds >= 1, values.size, below), np.int64)
    # skipped: ratio < c, but tail <= c
    skipped = np.searchsorted(values, thresholds, side="left" if rule == "ratio" else "right")
    return np.asarray(values.size - skipped, np.int64)


def threshold_for(values: Floats, rule: str, wanted: float) -> float:
    """Return the threshold by which nearest to `wanted` of the sorted values stay; of two, the one that keeps more.

    Between two neighbouring values any threshold decides alike; their middle is farthest from rounding. Without
    ties the number is met to a half.
    """
    distinct = np.unique(values[np.isfinite(values)])
    if not distinct.size:
        return 1.0 if rule == "top_p" else 0.0
    middles = (distinct[1:] + distinct[:-1]) / 2
    last = float(distinct[-1])
    if rule == "top_p":  # from all to none
        candidates = np.concatenate([[1.0], middles[::-1], [distinct[0] / 2]])
    else:
        candidates = np.concatenate([[0.0], middles, [(last + 1) / 2 if last <= 1 else 1.5 * last]])
    return float(candidates[np.argmin(np.abs(kept(values, rule, candidates) - wanted))])


def check_keys(where: str, key: str, value: Any, mean_k: Any, instead: str) -> None:
    """Raise UserError when both the threshold `key` and `mean_k` are given, or the threshold is none.

    `instead` says what a threshold that is not given stands for.
    """
    if value is not None and mean_k is not None:
        raise UserError(f"{where}: {key}={value} and mean_k={mean_k} exclude each other. Give one.")
    if value is not None and not (is_number(value) and 0 <= value <= 1):
        raise UserError(f"{where}: {key}={value} is not a number in 0..1, nor null for {instead}.")


def check_budget(where: str, mean_k: Any, shape: ModelShape) -> None:
    """Raise UserError when the model has nothing to skip, or `mean_k` is given and cannot be met."""
    if shape.top_k < 2:
        raise UserError(f"{where}: the router picks top_k={shape.top_k}; skipping needs at least 2.")
    if mean_k is not None and not (is_number(mean_k) and 1 <= mean_k <= shape.top_k):
        raise UserError(f"{where}: mean_k={mean_k} lies outside 1..top_k={shape.top_k}.")


def is_number(value: Any) -> bool:
    """Whether `value` is an int or a float."""
    return isinstance(value, int | float) and not isinstance(value, bool)
