"""What real routing lets a kernel save: picks that merging joins or a rule skips, and the experts that a batch reads.

A token's picks that a merged checkpoint sends to one stored expert are one row: the share of picks that go is what
merging saves in products. The union of the experts of a batch is what it reads, and what pruning or merging saves
there; skipping makes it smaller for a few tokens only. Imports no torch.

Shapes: N tokens, K chosen, E router rows.
"""

from collections import Counter
from collections.abc import Sequence
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

BATCHES = 64  # of each size, at most


def routing_facts(
    experts: NDArray[np.int32],
    rows: int,
    expert_map: Sequence[int] | None,
    batches: Sequence[int],
    skipped: NDArray[np.bool_] | None = None,
) -> dict[str, Any]:
    """Return what the picks `experts` [N, K] among `rows` router rows share.

    `skipped`: the part of the picks that a rule leaves out, of a mask [N, K], None if there is no rule. Of the others:
    `joined`: the part of all picks that others of their token join, by `expert_map` [E]; `joined_even`: the same if
    picks were drawn evenly and none skipped. `collisions`: the part of the tokens with such picks. `union`: by size of
    a batch of tokens that follow each other, the mean number of stored experts that it runs; `union_even`: for even
    draws of which none is skipped.
    """
    mapped = np.arange(rows) if expert_map is None else np.asarray(expert_map)
    stored = mapped[experts]  # [N, K]
    if skipped is not None:
        stored = np.where(skipped, -1, stored)
    stored = np.sort(stored, axis=1)
    number, k = stored.shape
    runs = (stored >= 0).sum(axis=1)
    distinct = (stored[:, :1] >= 0).sum(axis=1) + ((stored[:, 1:] != stored[:, :-1]) & (stored[:, 1:] >= 0)).sum(axis=1)
    sizes = Counter(mapped.tolist())
    unions, even = {}, {}
    for tokens in batches:
        starts = range(0, number - tokens + 1, tokens)
        picks = (stored[start : start + tokens] for start in list(starts)[:BATCHES])
        found = [len(np.unique(batch[batch >= 0])) for batch in picks]
        if found:
            unions[str(tokens)] = float(np.mean(found))
            even[str(tokens)] = sum(1 - _missed(rows, size, k) ** tokens for size in sizes.values())
    return {
        "tokens": number,
        "stored": len(sizes),
        "skipped": None if skipped is None else float(1 - runs.mean() / k),
        "joined": float((runs - distinct).mean() / k),
        "joined_even": 1 - sum(1 - _missed(rows, size, k) for size in sizes.values()) / k,
        "collisions": float((distinct < runs).mean()),
        "union": unions,
        "union_even": even,
    }


def _missed(rows: int, size: int, k: int) -> float:
    """Return how likely none of k distinct rows, drawn evenly of `rows`, is among `size` given ones."""
    return comb(rows - size, k) / comb(rows, k)
