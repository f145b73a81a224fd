"""What tokens skip under a rule, on the calibration: how many experts each one runs, and which tokens run few.

Shapes: T tokens, K experts that the router picks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.collecting.stats import Stats
from espalier.methods.odp import protected
from espalier.methods.thresholds import cut_values
from espalier.plans.operations import Merge, Skip
from espalier.plans.plan import Plan

LISTED = 12  # tokens at either end
LEAST = 8  # times that a listed token occurs

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Word:
    """A token of the vocabulary: its id, how often it occurs, and the mean of the experts that it runs a layer."""

    id: int
    times: int
    experts: float


@dataclass(frozen=True)
class Skipping:
    """Of one plan: by layer the shares [K] of the tokens that run 1 .. K experts, and the tokens at either end."""

    shares: dict[int, NDArray[np.float64]]
    fewest: tuple[Word, ...]
    most: tuple[Word, ...]


def experts_run(op: Skip, plan: Plan, before: Sequence[Plan], layer: int, stats: Stats) -> Counts:
    """Return how many experts each calibration token runs by the rule `op` of `plan`, [T].

    `before` are the plans that made the checkpoint whose routing `stats` hold.
    """
    arrays = stats.layer("routing", layer)
    number = arrays["weights"].shape[1]
    if op.rule == "fixed_k":
        assert op.k is not None
        return np.full(len(arrays["weights"]), op.k, np.int64)
    values = cut_values(op.rule, arrays["probability" if op.rule == "top_p" else "weights"])  # [T, K - 1]
    if op.rule == "top_p":
        assert op.p is not None
        stays = values < op.p if op.p < 1 else np.ones_like(values, dtype=bool)
    else:
        assert op.beta is not None
        threshold = op.beta * _factors(op, plan, before, layer, arrays["experts"])
        stays = values >= threshold if op.rule == "ratio" else values > threshold
    runs: Counts = 1 + stays.sum(axis=1)
    if op.protect is not None:
        importance = stats.layer("token_importance", layer)["importance"]
        runs = np.where(protected(importance, stats.sequence_tokens, op.protect), number, runs)
    return runs


def _factors(op: Skip, plan: Plan, before: Sequence[Plan], layer: int, picked: NDArray[Any]) -> Any:
    """Return what multiplies the threshold: 1, or the factor [T, K - 1] of the first expert and each other."""
    if op.factor is None:
        return 1.0
    stored = picked
    for earlier in before:
        for done in earlier.layers.get(layer, ()):
            if isinstance(done, Merge) and done.router == "remap":
                stored = np.array(done.expert_map())[stored]
    return plan.tensors[op.factor].read()[stored[:, :1], stored[:, 1:]].astype(np.float64)


def what_tokens_skip(chain: Sequence[Plan], stats: Stats, ids: NDArray[Any]) -> Skipping | None:
    """Return what the last of a row's plans lets tokens skip; None when that has no rule of skipping.

    `stats` are those that it was made from, with the probe `routing`; `ids` int [T] the tokens that they are of.
    """
    *before, plan = chain
    rules = {layer: op for layer, ops in sorted(plan.layers.items()) for op in ops if isinstance(op, Skip)}
    if not rules:
        return None
    runs = {layer: experts_run(op, plan, before, layer, stats) for layer, op in rules.items()}
    number = max(stats.layer("routing", layer)["weights"].shape[1] for layer in rules)
    shares = {layer: np.bincount(run, minlength=number + 1)[1:] / len(run) for layer, run in runs.items()}
    words = _words(ids, np.mean(list(runs.values()), axis=0))
    listed = min(LISTED, len(words) // 2)
    return Skipping(shares, tuple(words[:listed]), tuple(reversed(words[len(words) - listed :])))


def _words(ids: NDArray[Any], means: NDArray[np.float64]) -> list[Word]:
    """Return the tokens that occur often enough, by rising mean of experts."""
    found, place, times = np.unique(ids, return_inverse=True, return_counts=True)
    sums = np.bincount(place, weights=means)
    words = [
        Word(int(id), int(count), float(total / count))
        for id, count, total in zip(found, times, sums, strict=True)
        if count >= LEAST
    ]
    return sorted(words, key=lambda word: (word.experts, word.id))
