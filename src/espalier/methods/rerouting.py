"""How a router chooses and weighs once some of its experts are gone, computed from the logits of the full router.

Removing an expert takes its row out of the router: the logits of the others stay as they are, but not always their
scores (a softmax runs over the experts that are left) nor, with groups, which groups a token may choose from.

Shapes: T tokens, E experts, K chosen.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.checkpoints.shape import ModelShape
from espalier.errors import UserError

Array = NDArray[Any]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

CORRECTED = ("sigmoid with a correction bias", "softmax with a correction bias")
SCORES = {"sigmoid with a correction bias": "sigmoid", "sparsemixer": "sparsemixer"}
MOST_TIES = 256  # choices of one token that are looked at where scores are equal
INPUT_SCALED = "sigmoid of the largest logit on the experts' input"  # the weight is inside the output: it counts as 1


@dataclass(frozen=True)
class Router:
    """The rule of a router.

    `scores`: `softmax` over the experts that are there, `sigmoid` of each logit, or `sparsemixer` (Phi-3.5-MoE: the
    two largest logits, each against its rivals within the relative `margin`). The K experts of the largest score plus
    `correction` [E] are chosen; their weights are the scores, scaled to sum to 1 if `renormalise`, times `factor`.
    With `groups` of consecutive experts a token chooses from the `groups_chosen` groups whose `group_least` best
    experts have the largest sum.
    """

    scores: str
    top_k: int
    renormalise: bool
    factor: float = 1.0
    correction: Array | None = None
    margin: float = 0.0
    groups: int = 1
    groups_chosen: int = 1
    group_least: int = 1

    @property
    def moving(self) -> bool:
        """Whether removing an expert may change the order of two others: their scores grow, a correction does not."""
        return self.scores == "softmax" and self.correction is not None

    @property
    def fixed(self) -> bool:
        """Whether the first K that are there, in one order, are the choice."""
        return self.groups == 1 and not self.moving

    @property
    def local(self) -> bool:
        """Whether the weights depend on the chosen experts alone."""
        return self.scores == "sigmoid" or (self.scores == "softmax" and self.renormalise)

    @property
    def foreseeable(self) -> bool:
        """Whether `decisive` names all experts whose removal may change a token's choice."""
        return self.scores != "sparsemixer" and not self.moving


def needs_correction(shape: ModelShape) -> bool:
    """Whether a router of this kind adds a bias to the scores that it chooses by."""
    return shape.router in CORRECTED


def router_of(shape: ModelShape, where: str, correction: Array | None = None, margin: float = 0.0) -> Router:
    """Return the rule of the shape's router with factor 1; UserError naming `where` for a router not known here."""
    groups = (shape.groups, shape.groups_chosen, shape.group_least if shape.groups > 1 else 1)
    if shape.router == INPUT_SCALED and shape.top_k == 1:
        return Router("softmax", 1, True)
    if not (shape.router.startswith("softmax") or shape.router in SCORES):
        raise UserError(
            f"{where}: the search cannot tell how the router of {shape.family} ({shape.router}) chooses without some "
            "of its experts. Use method=reap."
        )
    scores = SCORES.get(shape.router, "softmax")
    return Router(scores, shape.top_k, shape.renormalise, 1.0, correction, margin, *groups)


class Routing:
    """A router on the logits float [T, E] of some tokens."""

    def __init__(self, router: Router, logits: Array) -> None:
        self.router = router
        self.logits = logits.astype(np.float64)
        self.tokens, self.experts = logits.shape
        self.scores = _sigmoid(self.logits) if router.scores == "sigmoid" else self.logits
        self._choice = self.scores if router.moving else self._corrected(self.scores)
        self.order = np.argsort(-self._choice, axis=1, kind="stable")  # [T, E]
        self._group = np.arange(self.experts) * router.groups // self.experts  # [E]

    @cached_property
    def rank(self) -> Ints:
        """The place of each expert in a token's order, [T, E]."""
        return np.argsort(self.order, axis=1)

    def route(self, rows: Array, there: Array) -> tuple[Ints, Floats]:
        """Return the chosen experts [n, K], first choice first, and their weights, of the tokens `rows` [n].

        `there` bool [n, E] says which experts a token's router has: at least K, enough of them in each group.
        """
        router = self.router
        if router.scores == "sparsemixer":
            return self._sparsemixer(rows, there)
        scores, order = self.scores[rows], self.order[rows]
        if router.moving or not router.local:
            scores = _softmax(np.where(there, scores, -np.inf)) if router.scores == "softmax" else scores
        if router.moving:
            order = np.argsort(-np.where(there, self._corrected(scores), -np.inf), axis=1, kind="stable")
        allowed = there if router.groups == 1 else there & self._in_chosen_groups(rows, there)
        ranked = np.take_along_axis(allowed, order, axis=1)
        picked = ranked & (np.cumsum(ranked, axis=1, dtype=np.int16) <= router.top_k)
        chosen = order[picked].reshape(len(rows), router.top_k)
        if router.local:
            return chosen, self.local_weights(rows, chosen)
        weights = np.take_along_axis(scores, chosen, axis=1)
        return chosen, weights * router.factor

    def ties(self) -> Iterator[tuple[int, Ints]]:
        """Yield the tokens whose K-th place several experts share, and all that they may have chosen [n, K].

        Logits in bf16 are often equal, and which of the experts a model then takes lies with its top-k. Of routers
        that are `fixed` and rank by scores alone; of one token at most MOST_TIES choices.
        """
        k = self.router.top_k
        if not self.router.fixed or self.router.scores == "sparsemixer" or k >= self.experts:
            return
        last, following = np.take_along_axis(self._choice, self.order[:, k - 1 : k + 1], axis=1).T
        for row in np.flatnonzero(last == following).tolist():
            above = np.flatnonzero(self._choice[row] > last[row])
            equal = np.flatnonzero(self._choice[row] == last[row])
            choices = list(islice(combinations(equal.tolist(), k - len(above)), MOST_TIES))
            yield row, np.array([[*above, *some] for some in choices])

    def settle(self, row: int, chosen: Ints) -> None:
        """Let the experts `chosen` [K] come before others of the same score in the order of one token."""
        others = ~np.isin(np.arange(self.experts), chosen)
        self.order[row] = np.lexsort((others, -self._choice[row]))

    def _corrected(self, scores: Floats) -> Floats:
        return scores if self.router.correction is None else scores + self.router.correction

    def local_weights(self, rows: Array, chosen: Ints) -> Floats:
        """Return the weights [n, K] of the experts `chosen`, for a `local` router."""
        found = self.scores[rows[:, None], chosen]
        if self.router.scores == "softmax":
            found = _softmax(found)
        elif self.router.renormalise:
            found = found / found.sum(axis=1, keepdims=True)
        weights: Floats = found * self.router.factor
        return weights

    def whole_weights(self, rows: Array, chosen: Ints) -> Floats:
        """Return the weights [n, K] of the experts `chosen` when all are there, for scores of softmax or sigmoid."""
        if self.router.local:
            return self.local_weights(rows, chosen)
        return np.take_along_axis(_softmax(self.scores[rows]), chosen, axis=1) * self.router.factor

    def next(self, rows: Array, there: Array) -> Ints:
        """Return the expert that a token takes when it loses one of its own, [n], for a `fixed` router; -1: none."""
        order = self.order[rows]
        ranked = np.take_along_axis(there, order, axis=1)
        following = ranked & (np.cumsum(ranked, axis=1, dtype=np.int16) == self.router.top_k + 1)
        place = following.argmax(axis=1)[:, None]
        found: Ints = np.where(
            np.take_along_axis(following, place, axis=1), np.take_along_axis(order, place, axis=1), -1
        )[:, 0]
        return found

    def decisive(self, rows: Array, there: Array, chosen: Ints) -> Ints:
        """Return the experts of which a token may choose otherwise without one, [n, A]: those that it chose.

        With groups also the best ones of its groups; an expert may stand there twice.
        """
        router = self.router
        if router.groups == 1:
            return chosen
        members = there & self._in_chosen_groups(rows, there)
        best = [chosen]
        size = self.experts // router.groups
        scores = np.where(members, self._choice[rows], -np.inf).reshape(len(rows), router.groups, size)
        open_groups = members.reshape(scores.shape).any(axis=2)  # [n, groups]
        which = np.argsort(~open_groups, axis=1, kind="stable")[:, : router.groups_chosen]
        scores = np.take_along_axis(scores, which[:, :, None], axis=1)
        top = np.argsort(-scores, axis=2, kind="stable")[:, :, : router.group_least]
        best.append((top + size * which[:, :, None]).reshape(len(rows), -1))
        return np.concatenate(best, axis=1)

    def _in_chosen_groups(self, rows: Array, there: Array) -> Array:
        """Return bool [n, E]: whether an expert's group is one that the token chooses from."""
        router = self.router
        size = self.experts // router.groups
        choice = np.where(there, self._choice[rows], -np.inf).reshape(len(rows), router.groups, size)
        best = -np.sort(-choice, axis=2)[:, :, : router.group_least]
        group = best.sum(axis=2)
        which = np.argsort(-group, axis=1, kind="stable")[:, : router.groups_chosen]
        chosen = np.zeros(group.shape, bool)
        np.put_along_axis(chosen, which, True, axis=1)
        return chosen[:, self._group]

    def _sparsemixer(self, rows: Array, there: Array) -> tuple[Ints, Floats]:
        left = np.where(there, self.logits[rows], -np.inf)
        size = np.abs(self.logits[rows])
        chosen, weights = [], []
        for _ in range(2):
            first = left.argmax(axis=1)[:, None]
            top = np.take_along_axis(left, first, axis=1)
            with np.errstate(divide="ignore", invalid="ignore"):
                near = (top - left) / np.maximum(size, top) <= self.router.margin
            near |= left == top  # the best is its own rival, whatever it is divided by
            weights.append(1 / np.exp(np.where(near, left, -np.inf) - top).sum(axis=1, keepdims=True))
            chosen.append(first)
            left = left.copy()
            np.put_along_axis(left, first, -np.inf, axis=1)
        return np.concatenate(chosen, axis=1), np.concatenate(weights, axis=1) * self.router.factor


def _softmax(x: Floats) -> Floats:
    if x.shape[1] == 2:  # numpy is slow over an axis so short
        second = _sigmoid(x[:, 1] - x[:, 0])
        return np.stack([1 - second, second], axis=1)
    found = np.exp(x - x.max(axis=1, keepdims=True))
    result: Floats = found / found.sum(axis=1, keepdims=True)
    return result


def _sigmoid(x: Floats) -> Floats:
    small = np.exp(-np.abs(x))
    result: Floats = np.where(x >= 0, 1 / (1 + small), small / (1 + small))
    return result
