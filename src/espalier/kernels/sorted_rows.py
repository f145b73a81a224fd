"""The rows of a MoE block on a CPU: tokens sorted by the experts that they run.

Shapes: T tokens, K slots a token, R rows, E experts, D hidden.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# Rows of neighbouring experts that are gathered, and added, at once; what lies between two products stays in the cache.
TOGETHER = 256
# Up to so many rows, the numbers of rows that products are computed for lie so far apart. Closest between 12 and 24,
# where every row takes its time; up to 12 reading the weights takes as long for one as for all (measured, Zen 4).
STEPS = ((4, 2), (12, 4), (24, 2), (32, 4), (64, 8), (128, 16), (256, 32), (512, 64))

Rows = tuple[list[int], Tensor, Tensor, Tensor]
Product = Callable[[Tensor, int], Tensor]  # rows [R, D] and their expert -> what it makes of them, [R, D]
Piece = tuple[int, int, int, int]  # the first expert and the one after the last, and their rows likewise


def bucket(rows: int) -> int:
    """Return the bucket of a number of rows from 0 to 512, the least of 29 that holds them: half more at most, or 3.

    oneDNN compiles a product for each number of rows, which takes as long as the product itself for 50 rows. How many
    rows an expert gets changes with every call.
    """
    if rows <= 2:
        return rows
    step = next((step for up_to, step in STEPS if rows <= up_to), STEPS[-1][1])
    return -(-rows // step) * step


def pieces(counts: list[int], most: int = TOGETHER, split: bool = True) -> Iterator[Piece]:
    """Yield neighbouring experts that have at most `most` rows together; one that has more, alone or in parts."""
    first = start = 0
    while first < len(counts):
        last, stop = first + 1, start + counts[first]
        while last < len(counts) and stop + counts[last] - start <= most:
            stop, last = stop + counts[last], last + 1
        step = most if split else max(stop - start, 1)
        for part in range(start, stop, step):
            yield first, last, part, min(part + step, stop)
        first, start = last, stop


def sort_rows(indices: Tensor, weights: Tensor, experts: int, join: bool = True) -> Rows:
    """Return how many rows each expert has, and for each row, by expert, then token: its expert, token and weight [R].

    `indices` int [T, K] and `weights` [T, K] are a router's; an index >= experts means "no expert" and has no row. A
    token's picks of one expert are one row, whose weight is their sum, in float32; without `join` each is a row.
    """
    expert, order = indices.flatten().sort(stable=True)
    counts = _counts(expert, experts)
    live = sum(counts)
    expert, order = expert[:live], order[:live]
    token = order // indices.shape[-1]
    weight = weights.flatten().index_select(0, order)
    if not join:
        return counts, expert, token, weight
    again = (expert[1:] == expert[:-1]) & (token[1:] == token[:-1])  # the sort is stable: these are neighbours
    if not again.any():
        return counts, expert, token, weight
    new = torch.cat([again.new_ones(1), ~again])
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    weight = wide.new_zeros(int(new.sum())).index_add(0, new.cumsum(0) - 1, wide)
    expert, token = expert[new], token[new]
    return _counts(expert, experts), expert, token, weight


def _counts(expert: Tensor, experts: int) -> list[int]:
    counts: list[int] = torch.bincount(expert, minlength=experts)[:experts].tolist()
    return counts


def weighted_sum(
    run: Product, x: Tensor, indices: Tensor, weights: Tensor, experts: int, split: bool = False
) -> Tensor:
    """Return the weighted sum [T, D], float32 at least, of what `run` makes of each expert's rows of x [T, D].

    `indices` int [T, K] and `weights` [T, K] are a router's; an index >= experts means "no expert". A token's picks of
    one expert are one row. `split`: `run` is given at most TOGETHER rows.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    output = x.new_zeros(x.shape, dtype=wide)
    if len(x) == 1 and not torch.is_grad_enabled():  # nothing to sort, and no graph that needs the weights
        shares: dict[int, float] = {}
        for number, part in zip(indices.flatten().tolist(), weights.flatten().tolist(), strict=True):
            if number < experts:
                shares[number] = shares.get(number, 0.0) + part
        for number, part in shares.items():
            output.add_(run(x, number), alpha=part)
        return output
    counts, _, token, weight = sort_rows(indices, weights, experts)
    for first, last, start, stop in pieces(counts, split=split):
        here, share = token[start:stop], weight[start:stop, None].to(wide)
        if not len(here):
            continue
        rows = x.index_select(0, here)
        parts = rows.split(counts[first:last]) if last > first + 1 else (rows,)
        made = [run(part, number) for number, part in enumerate(parts, first) if len(part)]
        joined = torch.cat(made) if len(made) > 1 else made[0]
        output.index_add_(0, here, joined.to(wide).mul_(share))
    return output
