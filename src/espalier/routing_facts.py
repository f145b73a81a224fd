"""What real routing lets a kernel save: picks that merging joins, and the experts that a batch reads.

A token's picks that a merged checkpoint sends to one stored expert are one row: the share of picks that go is what
merging saves in products. The union of the experts of a batch is what it reads, and what pruning or merging saves
there; skipping hardly makes it smaller. Imports no torch.

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
    experts: NDArray[np.int32], rows: int, expert_map: Sequence[int] | None, batches: Sequence[int]
) -> dict[str, Any]:
    """Return what the picks `experts` [N, K] among `rows` router rows share.

    `joined`: the part of the picks that others of their token join, by `expert_map` [E]; `joined_even`: the same if
    picks were drawn evenly. `collisions`: the part of the tokens with such picks. `union`: by size of a batch of tokens
    that follow each other, the mean number of stored experts that it runs; `union_even`: for even draws.
    """
    mapped = np.arange(rows) if expert_map is None else np.asarray(expert_map)
    stored = np.sort(mapped[experts], axis=1)  # [N, K]
    number, k = stored.shape
    distinct = 1 + (stored[:, 1:] != stored[:, :-1]).sum(axis=1)
    sizes = Counter(mapped.tolist())
    unions, even = {}, {}
    for tokens in batches:
        starts = range(0, number - tokens + 1, tokens)
        found = [len(np.unique(stored[start : start + tokens])) for start in list(starts)[:BATCHES]]
        if found:
            unions[str(tokens)] = float(np.mean(found))
            even[str(tokens)] = sum(1 - _missed(rows, size, k) ** tokens for size in sizes.values())
    return {
        "tokens": number,
        "stored": len(sizes),
        "joined": float(1 - distinct.mean() / k),
        "joined_even": 1 - sum(1 - _missed(rows, size, k) for size in sizes.values()) / k,
        "collisions": float((distinct < k).mean()),
        "union": unions,
        "union_even": even,
    }


def _missed(rows: int, size: int, k: int) -> float:
    """Return how likely none of k distinct rows, drawn evenly of `rows`, is among `size` given ones."""
    return comb(rows - size, k) / comb(rows, k)
