"""Turn a partition of experts into a merge: order the groups and weigh their members."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.collecting.stats import Stats
from espalier.plans.operations import Merge


def used(stats: Stats, layer: int, freq_topk: str | int) -> NDArray[np.int64]:
    """Return how often each expert was chosen [E]: by the model (`model`) or by the two largest logits (2)."""
    counts: NDArray[np.int64] = stats.layer("usage", layer)["counts" if freq_topk == "model" else "top2_counts"]
    return counts


def merge_groups(groups: Iterable[Iterable[int]], counts: NDArray[Any] | None, router: str) -> Merge:
    """Return the merge of `groups`, ordered by smallest member.

    With `counts` [E], a member weighs its share of its group's count; a group whose members were never
    chosen is averaged instead (HC-SMoE's code would give it zero weights: a dead expert). Without, all
    members weigh the same.
    """
    ordered = sorted(tuple(sorted(group)) for group in groups)
    weights = []
    for group in ordered:
        shares = np.ones(len(group)) if counts is None else np.asarray(counts, np.float64)[list(group)]
        if shares.sum() == 0:
            shares = np.ones(len(group))
        weights.append(tuple((shares / shares.sum()).tolist()))
    return Merge(tuple(ordered), tuple(weights), router)


def group_counts(merge: Merge, counts: NDArray[Any]) -> list[int]:
    """Return the summed count of each group: how often a token chose one of its members."""
    return [int(sum(counts[expert] for expert in group)) for group in merge.groups]
