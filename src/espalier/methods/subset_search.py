"""Search for the experts to keep where there are too many subsets to look at each: NAEE's objective, other ways.

The loss is neither monotone nor submodular in the kept experts: a newly kept one may displace a better one of the
same token. So greedy elimination has no guarantee, swaps are tried after it, and only branch and bound proves.

Shapes: T tokens, E experts, K chosen. Sets of kept experts are bool [E]. Each router group loses equally many.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from espalier.methods.rerouting import Router
from espalier.methods.subset_loss import BlockLoss, Picks

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Kept = NDArray[np.bool_]

SWAP_TOKENS = 2_000_000  # re-routed from one start, the same on any machine: some seconds
NODE_PICKS = 1_000_000_000  # looked at for the bounds of all nodes, a layer: some ten seconds
WIDEST_BOUND = 62  # experts: a set is the bits of one number
LESS = 1 - 1e-9  # what gains less is rounding


class State:
    """What the tokens do when only `kept` are there, and what they would do with one expert less.

    `total` [C]: squared error of each chunk. `gain` [C, E]: what is added to it when one more expert goes; exact
    where the router is `foreseeable`, else without tokens that only choose otherwise because other scores grow.
    """

    def __init__(self, block: BlockLoss, kept: Kept) -> None:
        self.block, self.kept = block, kept.copy()
        self.chosen, self.weights, self.error = block.step(block.all_rows, self.kept)
        self.decisive = self._decisive(block.all_rows)  # [T, A]
        self.after = self._after(block.all_rows)  # [T, A], the error without that expert
        simple = block.router.fixed and block.router.local
        self.next = self._next(block.all_rows) if simple else None  # [T]
        self._sum()

    @property
    def loss(self) -> float:
        return float(np.sqrt(self.total).sum())

    def remove(self, expert: int) -> None:
        """Take one more expert away."""
        rows = self.block.all_rows
        self.kept[expert] = False
        if self.next is not None:  # others neither chose it nor would next
            rows = np.flatnonzero((self.chosen == expert).any(axis=1) | (self.next == expert))
        self.chosen[rows], self.weights[rows], self.error[rows] = self.block.step(rows, self.kept)
        self.decisive[rows] = self._decisive(rows)
        if self.next is not None:
            self.next[rows] = self._next(rows)
        self.after[rows] = self._after(rows)
        self._sum()

    def _decisive(self, rows: Ints) -> Ints:
        there = np.repeat(self.kept[None], len(rows), axis=0)
        return self.block.routing.decisive(rows, there, self.chosen[rows])

    def _next(self, rows: Ints) -> Ints:
        return self.block.routing.next(rows, np.repeat(self.kept[None], len(rows), axis=0))

    def _after(self, rows: Ints) -> Floats:
        decisive, spare = self.decisive[rows], _spare(self.block, self.kept)
        after = np.repeat(self.error[rows, None], decisive.shape[1], axis=1)
        for a in range(decisive.shape[1]):
            twice = (decisive[:, :a] == decisive[:, a : a + 1]).any(axis=1)  # counts once
            once = np.flatnonzero(spare[decisive[:, a]] & ~twice)
            after[once, a] = self.block.step(rows[once], self.kept, decisive[once, a])[2]
        return after

    def _sum(self) -> None:
        block, experts = self.block, self.block.experts
        self.total = np.bincount(block.chunk, self.error, block.chunks)
        change = self.after - self.error[:, None]
        place = block.chunk[:, None] * experts + self.decisive
        gain: Floats = np.bincount(place.ravel(), change.ravel(), block.chunks * experts).astype(np.float64)
        if block.router.scores == "softmax" and not block.router.local:
            gain += self._growth_gain(place)
        self.gain = gain.reshape(block.chunks, experts)

    def _growth_gain(self, place: Ints) -> Floats:
        """Return what grown weights add, [C * E]: of tokens that keep their choice, whose softmax has a term less."""
        block = self.block
        logits = np.where(self.kept, block.routing.logits, -np.inf)
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        s = self.weights.sum(axis=1)[:, None]
        cross = (self.weights * np.take_along_axis(block.cross, self.chosen, axis=1)).sum(axis=1)[:, None]
        norm = block.norm[:, None]
        h = self.error[:, None] - 2 * (s - 1) * cross - (s - 1) ** 2 * norm
        a = 1 / (1 - np.minimum(p, 1 - 1e-9))  # the largest p are of decisive experts, which are taken out below
        change = a**2 * h + 2 * (a * s - 1) * a * cross + (a * s - 1) ** 2 * norm - self.error[:, None]
        np.put_along_axis(change, self.decisive, 0.0, axis=1)
        by_chunk = np.zeros((block.chunks, block.experts))
        np.add.at(by_chunk, block.chunk, change)
        return by_chunk.ravel()


def _spare(block: BlockLoss, kept: Kept) -> Kept:
    """Return of which experts [E] the router can do without one more."""
    router, groups = block.router, group_of(block)
    counts = np.bincount(groups, kept, router.groups)
    after = counts - np.eye(router.groups)  # row g: one less in group g
    enough = (after.min(axis=1) >= router.group_least) & (
        np.sort(after, axis=1)[:, : router.groups_chosen].sum(axis=1) >= router.top_k
    )
    found: Kept = kept & enough[groups]
    return found


def group_of(block: BlockLoss) -> Ints:
    """Return the router group of each expert, [E]."""
    group: Ints = np.arange(block.experts) * block.router.groups // block.experts
    return group


def eliminate(block: BlockLoss, removed: int) -> Iterator[tuple[Kept, float]]:
    """Yield what is kept, and its loss, when the expert that is missed least goes, again and again.

    Router groups lose one expert each before any loses the next; only sets that the router can run are yielded. Of
    equal losses the lowest expert goes.
    """
    state, group = State(block, np.ones(block.experts, bool)), group_of(block)
    for _ in range(removed // block.router.groups):
        free = state.kept.copy()
        while free.any():
            loss = np.sqrt(np.maximum(state.total[:, None] + state.gain, 0)).sum(axis=0)
            expert = int(np.argmin(np.where(free, loss, np.inf)))
            free &= group != group[expert]
            state.remove(expert)
        yield state.kept.copy(), block.loss(state.kept)


def best_of(block: BlockLoss, scores: Floats, removed: int) -> Kept:
    """Return the experts [E] of highest score [E], in each router group the same number; ties to the lower id."""
    by_group = scores.reshape(block.router.groups, -1)
    order = np.argsort(-by_group, axis=1, kind="stable")[:, : by_group.shape[1] - removed // block.router.groups]
    kept = np.zeros(by_group.shape, bool)
    np.put_along_axis(kept, order, True, axis=1)
    return kept.ravel()


def seeds(block: BlockLoss) -> dict[str, Floats]:
    """Return scores [E] to start from: how often an expert is chosen, and REAP's (arXiv 2510.13999, eq. 9).

    Both of the tokens of the statistics: ||y_a||^2 = H_aa + 2 c_a + ||z||^2.
    """
    counts = np.bincount(block.chosen.ravel(), minlength=block.experts)
    own = block.packed[block.chosen, block.chosen]
    square = np.take_along_axis(block.gram, own, axis=1).astype(np.float64) + block.norm[:, None]
    square += 2 * np.take_along_axis(block.cross, block.chosen, axis=1)
    total = np.bincount(
        block.chosen.ravel(), (block.weights * np.sqrt(np.maximum(square, 0))).ravel(), minlength=block.experts
    )
    return {"frequency": counts.astype(np.float64), "reap": total / np.maximum(counts, 1)}


def improve(block: BlockLoss, kept: Kept) -> tuple[Kept, float, bool]:
    """Swap a kept for a removed expert of its group as long as that lowers the loss.

    Return what is kept, its loss, and whether every single swap was tried on it in vain. Swaps are tried in the order
    of what leaving and entering would change apart from each other; SWAP_TOKENS bounds the work.
    """
    kept, left, group = kept.copy(), SWAP_TOKENS, group_of(block)
    while True:
        state, found = State(block, kept), False
        entering = {int(f): _enters(block, state, int(f)) for f in np.flatnonzero(~kept)}
        entry = np.zeros((block.chunks, block.experts))
        for f, rows in entering.items():
            new = block.step(rows, _with(kept, f))[2] - state.error[rows]
            entry[:, f] = np.bincount(block.chunk[rows], new, block.chunks)
            left -= len(rows)
        pairs = [(e, f) for e in np.flatnonzero(kept) for f in entering if group[e] == group[f]]
        if not pairs:
            return kept, state.loss, True
        e, f = np.array(pairs).T
        apart = np.sqrt(np.maximum(state.total[:, None] + state.gain[:, e] + entry[:, f], 0)).sum(axis=0)
        for out, into in (pairs[n] for n in np.argsort(apart, kind="stable")):
            if left <= 0:
                return kept, state.loss, False
            swapped = _with(kept, into)
            swapped[out] = False
            rows = block.all_rows
            if block.router.local and block.router.fixed:
                leaves = (state.chosen == out).any(axis=1)
                leaves[entering[into]] = True
                rows = np.flatnonzero(leaves)
            error = state.error.copy()
            error[rows] = block.step(rows, swapped)[2]
            left -= len(rows)
            if block.loss_of(error) < state.loss * LESS:
                kept, found = swapped, True
                break
        if not found:
            return kept, state.loss, True


def _with(kept: Kept, expert: int) -> Kept:
    found = kept.copy()
    found[expert] = True
    return found


def _enters(block: BlockLoss, state: State, expert: int) -> Ints:
    """Return the tokens that may choose otherwise when `expert` is there again."""
    if not (block.router.fixed and block.router.local):
        return block.all_rows
    rank = block.routing.rank
    last = np.take_along_axis(rank, state.chosen, axis=1).max(axis=1)
    return np.flatnonzero(rank[:, expert] < last)


def can_bound(router: Router, experts: int) -> bool:
    """Whether `branch_and_bound` knows a bound: one or two experts a token, chosen in one order, weighed alone."""
    return router.fixed and router.local and router.top_k <= 2 and experts <= WIDEST_BOUND


def branch_and_bound(block: BlockLoss, removed: int, kept: Kept) -> tuple[Kept, float, float]:
    """Return the best set found from `kept` on, its loss, and a bound that no set's loss is below.

    Experts are decided one by one, the most chosen first. A token's error is at least the least of those picks that
    the decisions leave open: no member dropped, no kept expert ranked between, and no more experts in the way than may
    still be dropped. The search ends when nothing is open (bound = loss) or after NODE_PICKS.
    """
    picks = Picks(block, block.all_rows, removed)
    order = np.argsort(-np.bincount(block.chosen.ravel(), minlength=block.experts), kind="stable")
    least = picks.error.min(axis=1)
    original = np.bitwise_or.reduce(np.left_shift(1, block.chosen), axis=1)
    best, best_loss = kept, block.loss(kept)
    left = NODE_PICKS

    def bound(dropped: int, staying: int, more: int) -> float:
        nonlocal left
        rows = np.flatnonzero(original & dropped)
        own, needed = picks.own[rows], picks.needed[rows]
        closed = (own & dropped) | (needed & staying)
        closed |= np.bitwise_count(needed & ~dropped) > more
        error = least.copy()
        error[rows] = np.where(closed != 0, np.inf, picks.error[rows]).min(axis=1)
        left -= own.size + len(least)
        return block.loss_of(error)

    stack = [(bound(0, 0, removed), 0, 0, 0)]
    while stack and left > 0:
        low, depth, dropped, staying = stack.pop()
        if low >= best_loss * LESS:
            continue
        more = removed - dropped.bit_count()
        if more == 0 or block.experts - removed == staying.bit_count():
            found = np.array([not dropped >> e & 1 if more == 0 else bool(staying >> e & 1) for e in range(len(kept))])
            loss = block.loss(found)
            left -= block.tokens
            if loss < best_loss * LESS:
                best, best_loss = found, loss
            continue
        bit = 1 << int(order[depth])
        children = [(dropped | bit, staying), (dropped, staying | bit)]
        nodes = [(bound(d, s, removed - d.bit_count()), depth + 1, d, s) for d, s in children]
        stack += sorted(nodes, key=lambda node: -node[0])
    return best, best_loss, min([best_loss, *(node[0] for node in stack)])
