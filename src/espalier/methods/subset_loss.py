"""Output error of a MoE block for sets of kept experts, from residual Gram matrices instead of forwards.

Dropping experts changes which experts a token picks and their weights w, never an expert's output y. With z
the block's output, s = sum w, H[a,b] = <y_a - z, y_b - z> and c[a] = <y_a - z, z>, the new output z' obeys

    ||z' - z||^2 = w^T H w + 2 (s - 1) w^T c + (s - 1)^2 ||z||^2,

in which the last two terms vanish where the router scales its weights to sum to 1. The shared expert cancels.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.errors import UserError
from espalier.methods.rerouting import Router, Routing

Array = NDArray[Any]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Kept = NDArray[np.bool_]

BLOCK = 4096  # tokens a step, or choices of tokens; the working set stays in tens of megabytes
MISROUTED = 1e-3  # of ||Z||^2: a hundred times what rounding to bf16 makes


def packed_index(experts: int) -> Ints:
    """Return [E, E] positions in a packed, row-major upper triangle; symmetric."""
    index = np.zeros((experts, experts), np.int64)
    rows, columns = np.triu_indices(experts)
    index[rows, columns] = index[columns, rows] = np.arange(len(rows))
    return index


class BlockLoss:
    """The loss of one MoE block for any set of kept experts.

    `arrays` is one layer of the probe `residual_gram`, `chunk` int [T] the chunk of each token: the loss sums the
    norm ||Z - Z'||_F of each chunk. A token whose choice the removal leaves alone adds exactly 0 where its weights
    stay too. With `weight_sum` float [T] in `arrays` (what the model's weights add up to) z need not be this block's
    own output on these inputs; then no token adds 0 of itself.

    The router's constant factor is found from the arrays. Where experts share a token's K-th place, the token chose
    those that give the block's own output back. UserError when the rule does not give it back, with every expert there.
    """

    def __init__(self, arrays: Mapping[str, Array], chunk: Ints, router: Router, where: str = "statistics") -> None:
        self.gram, self.cross = arrays["gram"], arrays["cross"]
        self.norm = arrays["norm"].astype(np.float64)
        self.tokens, self.experts = arrays["logits"].shape
        self.chunk, self.chunks = chunk, int(chunk.max()) + 1 if len(chunk) else 1
        self.packed = packed_index(self.experts)
        self.aimed = "weight_sum" in arrays
        self.all_rows = np.arange(self.tokens)
        everyone = np.ones(self.experts, bool)
        self.routing = Routing(router, arrays["logits"])
        chosen, weights = self.routing.route(self.all_rows, self._there(self.all_rows, everyone))
        router = replace(router, factor=self._factor(arrays, chosen, weights))
        self.router = self.routing.router = router
        if not self.aimed:
            self._settle_ties()
        # Of the whole block, [T, K] each.
        self.chosen, self.weights = self.routing.route(self.all_rows, self._there(self.all_rows, everyone))
        error = self._quadratic(self.all_rows, self.chosen, self.weights)
        if not self.aimed and error.sum() > MISROUTED * self.norm.sum():
            raise UserError(
                f"{where}: routed anew by its logits, the block's output differs from what was observed by "
                f"{np.sqrt(error.sum() / self.norm.sum()):.2g} of its norm; the search does not know this router. "
                "Use method=reap."
            )
        self.whole = error if self.aimed else np.zeros(self.tokens)  # [T], with every expert there

    @property
    def size(self) -> float:
        """||Z||, taken as the loss takes it: per chunk, then summed."""
        return self.loss_of(self.norm)

    def loss_of(self, error: Floats) -> float:
        """Return the loss of squared errors [T]."""
        return float(np.sqrt(np.maximum(np.bincount(self.chunk, error, self.chunks), 0)).sum())

    def step(self, rows: Ints, kept: Kept, without: Ints | None = None) -> tuple[Ints, Floats, Floats]:
        """Return what the tokens `rows` [n] choose [n, K], the weights [n, K] and ||z' - z||^2 [n].

        Only the experts `kept` [E] are there; `without` [n] takes one more from each token.
        """
        found: list[tuple[Array, ...]] = []
        for start in range(0, max(len(rows), 1), BLOCK):
            part = slice(start, start + BLOCK)
            there = self._there(rows[part], kept, None if without is None else without[part])
            chosen, weights = self.routing.route(rows[part], there)
            found.append((chosen, weights, self._error(rows[part], chosen, weights)))
        chosen, weights, error = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return chosen, weights, error

    def error(self, kept: Kept) -> Floats:
        """Return the squared error of every token, float64 [T], when only the experts `kept` are there."""
        rows, error = self.all_rows, self.whole.copy()
        if self.router.foreseeable and (self.router.local or not self.aimed):
            first = self.decisive
            rows = np.flatnonzero((~kept)[first].any(axis=1))
            if not self.router.local:
                error = self.growth(kept) ** 2 * self.norm  # z' = (1 + growth) z where the choice stays
        error[rows] = self.step(rows, kept)[2]
        return error

    def loss(self, kept: Kept) -> float:
        return self.loss_of(self.error(kept))

    @cached_property
    def decisive(self) -> Ints:
        """Experts without which a token may choose otherwise than in the whole block, [T, A]."""
        there = self._there(self.all_rows, np.ones(self.experts, bool))
        return self.routing.decisive(self.all_rows, there, self.chosen)

    def choice_error(self, rows: Ints, chosen: Ints) -> Floats:
        """Return the squared error [n] when the tokens choose `chosen` [n, K], for a `local` router."""
        return self._error(rows, chosen, self.routing.local_weights(rows, chosen))

    def growth(self, kept: Kept) -> Floats:
        """Return by how much the weights of an unchanged choice grow, less 1, [T]: m / (1 - m), m what is dropped.

        Of the probability, that is; 0 for a token that has lost all of it, and so its choice.
        """
        mass = self._probability[:, ~kept].sum(axis=1)
        growth: Floats = np.divide(mass, 1 - mass, out=np.zeros(self.tokens), where=mass < 1)
        return growth

    @cached_property
    def _probability(self) -> Floats:
        logits = self.routing.logits
        terms = np.exp(logits - logits.max(axis=1, keepdims=True))
        probability: Floats = terms / terms.sum(axis=1, keepdims=True)
        return probability

    def _there(self, rows: Ints, kept: Kept, without: Ints | None = None) -> Kept:
        there = np.repeat(kept[None], len(rows), axis=0)
        if without is not None:
            there[np.arange(len(rows)), without] = False
        return there

    def _error(self, rows: Ints, chosen: Ints, weights: Floats) -> Floats:
        error = self._quadratic(rows, chosen, weights)
        if not self.aimed:
            same = self._same(rows, chosen)
            if self.router.local:
                error[same] = 0
            elif self.router.scores == "softmax":  # the weights grow alike
                growth = weights[same].sum(axis=1) / self.weights[rows[same]].sum(axis=1)
                error[same] = (growth - 1) ** 2 * self.norm[rows[same]]
            else:
                same &= (weights == self.weights[rows]).all(axis=1)
                error[same] = 0
        return error

    def _same(self, rows: Ints, chosen: Ints) -> Kept:
        """Return which of the tokens choose what they do in the whole block, [n], in whatever order."""
        own = self.chosen[rows]
        if chosen.shape[1] == 2:  # numpy is slow over an axis so short
            straight = (chosen[:, 0] == own[:, 0]) & (chosen[:, 1] == own[:, 1])
            same: Kept = straight | ((chosen[:, 0] == own[:, 1]) & (chosen[:, 1] == own[:, 0]))
        else:
            same = (np.sort(chosen, axis=1) == np.sort(own, axis=1)).all(axis=1)
        return same

    def _quadratic(self, rows: Ints, chosen: Ints, weights: Floats) -> Floats:
        i, j = np.triu_indices(chosen.shape[1])
        twice = np.where(i == j, 1, 2)
        router = self.routing.router
        sums_to_one = router.renormalise and router.factor == 1
        error = np.empty(len(rows))
        for start in range(0, len(rows), BLOCK):
            part = slice(start, start + BLOCK)
            row, pick, w = rows[part, None], chosen[part], weights[part]
            h = self.gram[row, self.packed[pick[:, i], pick[:, j]]].astype(np.float64)  # [t, K (K + 1) / 2]
            found = np.einsum("tp,tp->t", twice * w[:, i] * w[:, j], h)
            if not sums_to_one:
                excess = w.sum(axis=1) - 1
                cross = (w * self.cross[row, pick]).sum(axis=1)
                found += 2 * excess * cross + excess**2 * self.norm[rows[part]]
            error[part] = found
        return np.maximum(error, 0)

    def _settle_ties(self) -> None:
        """Find out what tokens chose among equal scores: of all that they may have, what gives their output back."""
        for row, choices in self.routing.ties():
            rows = np.full(len(choices), row)
            error = self._quadratic(rows, choices, self.routing.whole_weights(rows, choices))
            self.routing.settle(row, choices[np.argmin(error)])

    def _factor(self, arrays: Mapping[str, Array], chosen: Ints, weights: Floats) -> float:
        """Return the router's constant factor: from sum w = weight_sum, else from <z, z> = sum w <y, z>."""
        if self.aimed:
            own, model = weights.sum(axis=1), arrays["weight_sum"].astype(np.float64)
        else:
            outer = np.take_along_axis(self.cross, chosen, axis=1) + self.norm[:, None]  # <y, z>
            own, model = (weights * outer).sum(axis=1), self.norm
        seen = own > 0
        factor = float(np.median(model[seen] / own[seen])) if seen.any() else 1.0
        return 1.0 if abs(factor - 1) < 1e-3 else factor


def all_subsets(block: BlockLoss) -> Floats:
    """Return the loss of every set of dropped experts, [2^E]; bit e of the position says that e is dropped.

    For K = 2, an order of choice that does not depend on which experts are there, and weights that depend on the
    chosen pair alone. Sets that leave fewer than two experts get infinity.

    A token picks the pair (a, b), a above b, iff both are kept and all others that rank above b are dropped.
    Its error is added at (pair, set of those others); the sum over all subsets of a dropped set (a zeta
    transform) then is that set's squared loss: O(T E^2 + E^3 2^E) in place of O(T C(E, r)).
    """
    experts = block.experts
    losses = np.zeros(1 << experts)
    for number in range(block.chunks):
        table = _pair_table(block, np.flatnonzero(block.chunk == number))
        losses += np.sqrt(np.maximum(_sum_over_pairs(table, experts), 0))
    kept = experts - np.bitwise_count(np.arange(1 << experts))
    losses[kept < 2] = np.inf
    return losses


def _pair_table(block: BlockLoss, tokens: Ints) -> Floats:
    """Return summed squared errors [E (E - 1) / 2, 2^(E - 2)] by picked pair and set of dropped higher ranks.

    The two bits of the pair are cut out of the set: neither is ever dropped.
    """
    experts = block.experts
    pairs = experts * (experts - 1) // 2
    table = np.zeros(pairs << (experts - 2))
    step = max(8 * BLOCK // pairs, 1)
    for start in range(0, len(tokens), step):
        picks = Picks(block, tokens[start : start + step], experts - 2)
        low, high = picks.chosen.min(axis=-1), picks.chosen.max(axis=-1)
        dropped = _without_bit(_without_bit(picks.needed, high), low)
        pair = low * experts - low * (low + 1) // 2 + high - low - 1
        position = (pair << (experts - 2)) + dropped
        np.add.at(table, position.ravel(), picks.error.ravel())
    return table.reshape(pairs, -1)


class Picks:
    """Every choice of K = 1 or 2 experts that tokens may come to when at most `removed` experts are dropped.

    For a router that is `fixed` and `local`. `chosen` [n, P, K]; `error` float64 [n, P], exactly 0 for a token's own
    choice; as bits of an int64 [n, P]: `own`, the chosen, and `needed`, all that must be dropped for it.
    """

    def __init__(self, block: BlockLoss, rows: Ints, removed: int) -> None:
        top_k = block.router.top_k
        ranks = np.arange(min(block.experts, removed + top_k))
        which = ranks[:, None] if top_k == 1 else np.stack(np.triu_indices(len(ranks), 1), axis=1)  # [P, K]
        order = block.routing.order[rows]  # [n, E]
        bits = np.left_shift(1, order)
        upto = np.cumsum(bits, axis=1)
        self.chosen = order[:, which]
        self.own = bits[:, which].sum(axis=-1)
        self.needed = upto[:, which[:, -1]] - self.own
        row = np.repeat(rows, len(which))
        self.error = block.choice_error(row, self.chosen.reshape(-1, top_k)).reshape(self.own.shape)


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


def enumerate_subsets(block: BlockLoss, dropped: Iterable[tuple[int, ...]]) -> Floats:
    """Return the loss of every set of dropped experts given, one evaluation after another; for any router."""
    losses = []
    for gone in dropped:
        kept = np.ones(block.experts, bool)
        kept[list(gone)] = False
        losses.append(block.loss(kept))
    return np.array(losses)
