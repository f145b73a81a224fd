"""NAEE: keep the subset of experts that changes the block's output least.

Lu et al., "Not All Experts are Equal", ACL 2024 (arXiv 2402.14800), section 3.2; per MoE block, with Z' the
outputs [T, D] of the block without the experts in C, and its router sliced to the others:

    C* = argmin over |C| = E - r of ||Z - Z'(C)||_F

The losses come from residual Gram matrices (`espalier.methods.subset_loss`), not from C(E, r) forwards.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import combinations, product
from math import comb
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from espalier.checkpoints.shape import ModelShape
from espalier.collecting.sampling import gram_sample
from espalier.collecting.stats import Stats
from espalier.errors import UserError
from espalier.methods.budget import knapsack, least, survivors
from espalier.methods.options import one_of, whole_number
from espalier.methods.rerouting import Router, needs_correction, router_of
from espalier.methods.subset_loss import BlockLoss, all_subsets, enumerate_subsets
from espalier.methods.subset_search import best_of, branch_and_bound, can_bound, eliminate, improve, seeds
from espalier.plans.operations import Keep
from espalier.plans.plan import Plan

if TYPE_CHECKING:
    from espalier.models.experts import ExpertWeights

WHERE = "conf/method/naee.yaml"
BEST = 5  # losses kept as evidence
WIDEST_TABLE = 16  # experts; the table of all subsets then takes 16 MB and doubles with each expert more
MOST_OPERATIONS = 1e10  # subsets x tokens x (E + K^2) that search=exact takes: some minutes a layer on one core
CHEAP_OPERATIONS = 1e9  # that search=auto spends on looking at every subset
LEAST_TOKENS = 4096  # a subset takes no less time than with so many tokens: the cost of the calls

Evidence = dict[str, Any]


@dataclass(frozen=True)
class Naee:
    """Keep the r experts that reproduce the block's output best on the calibration tokens.

    `loss="single"` is the paper's one norm over all tokens; `loss="chunked"` its code's sum of one norm per
    calibration batch, here per `chunk_sequences` sequences, which may rank close subsets differently.

    `mode="layerwise"`: layers are searched one by one, all against the uncompressed model (the paper's main method).
    `mode="progressive"`: each layer on what the layers already pruned give it, against the uncompressed model's output.

    `search`: `exact` looks at every subset, ties go to the lexicographically smallest set of dropped experts, and is
    refused where that takes too long. `greedy` eliminates one expert after another, then swaps; swaps also start
    from frequency and REAP, and the best of the three is kept. `branch_and_bound` goes on from there and may prove
    the optimum (K <= 2). `auto`: `exact` where it is cheap, else `branch_and_bound`, else `greedy`.

    `budget="knapsack"`: layers keep different numbers of experts, in all as many as `uniform` would, with the
    smallest sum of squared losses: every block adds to the same residual stream, in the same units, and there the
    errors of different layers add up like unrelated vectors. Relative to ||Z|| the losses would spare a block that
    adds little to the stream.
    """

    ratio: float
    loss: str = "single"
    chunk_sequences: int = 8
    mode: str = "layerwise"
    search: str = "auto"
    budget: str = "uniform"
    probes: ClassVar[tuple[str, ...]] = ("residual_gram",)
    reads_weights: ClassVar[bool] = True  # of routers alone: what some add to the scores

    def __post_init__(self) -> None:
        one_of("naee", "loss", self.loss, ("single", "chunked"))
        one_of("naee", "mode", self.mode, ("layerwise", "progressive"))
        one_of("naee", "search", self.search, ("auto", "exact", "greedy", "branch_and_bound"))
        one_of("naee", "budget", self.budget, ("uniform", "knapsack"))
        whole_number("naee", "chunk_sequences", self.chunk_sequences, 1)
        if self.mode == "progressive" and self.budget == "knapsack":
            raise UserError(
                f"{WHERE}: budget=knapsack compares all layers before the first is pruned, mode=progressive decides "
                "one after another. Use mode=layerwise or budget=uniform."
            )

    @property
    def sequential(self) -> bool:
        """Whether a layer's statistics depend on what was decided for the layers before it."""
        return self.mode == "progressive"

    def check(self, shape: ModelShape, tokens: int) -> None:
        """Raise UserError for a ratio, a router or a search that does not fit the model."""
        self._refuse_long(shape, survivors(self.ratio, shape, WHERE), tokens)
        router = _rule(shape)
        if self.search == "branch_and_bound" and not can_bound(router, shape.experts):
            raise UserError(
                f"{WHERE}: search=branch_and_bound has a bound for routers that pick one or two of at most 62 experts "
                f"in a fixed order and weigh them alone; that of {shape.family} picks {shape.top_k} of "
                f"{shape.experts} ({shape.router}). Use search=auto."
            )

    def plan(self, stats: Stats, shape: ModelShape, experts: "ExpertWeights | None" = None) -> Plan:
        """Evidence per layer: see `plan_layer`. UserError as `check`, and where the router is another than it says."""
        if self.sequential:
            raise ValueError("mode=progressive plans layer by layer: espalier.collecting.sequential")
        self.check(shape, stats.tokens)
        counts = dict.fromkeys(shape.layers, survivors(self.ratio, shape, WHERE))
        if self.budget == "knapsack":
            curves = {layer: self._curve(self._block(stats, layer, shape, experts), shape) for layer in shape.layers}
            counts = knapsack(curves, sum(counts.values()))
            for layer, kept in counts.items():  # one may lose more than the ratio says
                self._refuse_long(shape, kept, stats.tokens, f" in layer {layer}")
        layers, evidence = {}, {}
        for layer in shape.layers:
            layers[layer], evidence[layer] = self.plan_layer(stats, layer, shape, experts, counts[layer])
        return self.finish(layers, evidence)

    def _refuse_long(self, shape: ModelShape, kept: int, tokens: int, place: str = "") -> None:
        """Raise UserError when search=exact looks at too many subsets of a layer that keeps `kept` experts."""
        if self.search != "exact" or _has_table(_rule(shape), shape.experts):
            return
        removed, sample = shape.experts - kept, gram_sample(shape.experts, tokens)
        cost = _operations(shape, removed, sample)
        if cost > MOST_OPERATIONS:
            raise UserError(
                f"{WHERE}: search=exact, removing {removed} of {shape.experts} experts{place}: "
                f"{_subsets(shape, removed):.3g} subsets on {sample} tokens, "
                f"{cost:.2g} operations a layer; it stops at {MOST_OPERATIONS:.0g}. Use search=auto."
            )

    def finish(self, layers: dict[int, tuple[Keep, ...]], evidence: dict[int, Evidence]) -> Plan:
        """Return the plan of all layers."""
        return Plan({"name": "naee"} | asdict(self), dict(layers), evidence)

    def plan_layer(
        self, stats: Stats, layer: int, shape: ModelShape, experts: "ExpertWeights | None", kept: int | None = None
    ) -> tuple[tuple[Keep, ...], Evidence]:
        """Return what is done to one layer, and its evidence.

        loss, loss / ||Z||, tokens; the search, and whether its result is proven to be the best. Of a search that
        looked at every subset: how many, and the losses of the best few; else what each start led to, and a bound.
        ||Z|| is taken as the loss takes it (per chunk, then summed), of the routed experts' output.
        """
        block = self._block(stats, layer, shape, experts)
        removed = shape.experts - (survivors(self.ratio, shape, WHERE) if kept is None else kept)
        found, evidence = self._search(block, removed, shape)
        loss, size = evidence["loss"], block.size
        evidence = {"loss": loss, "relative_loss": loss / size if size else 0.0, "tokens": block.tokens} | evidence
        return (Keep(tuple(np.flatnonzero(found).tolist())),), evidence

    def _block(self, stats: Stats, layer: int, shape: ModelShape, experts: "ExpertWeights | None") -> BlockLoss:
        arrays, correction, margin = stats.layer("residual_gram", layer), None, 0.0
        if needs_correction(shape) or shape.router == "sparsemixer":
            if experts is None:
                raise UserError(f"{WHERE}: the router of {shape.family} needs more than logits: give the checkpoint.")
            correction, margin = experts.correction(layer), experts.margin
        router = router_of(shape, WHERE, None if correction is None else correction.double().numpy(), margin)
        return BlockLoss(arrays, self._chunks(stats, arrays["token"]), router, f"statistics, layer {layer}")

    def _chunks(self, stats: Stats, token: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the chunk [T] of each observed token, given its index among all unmasked tokens."""
        if self.loss == "single":
            return np.zeros(len(token), np.int64)
        sequence = np.repeat(np.arange(len(stats.sequence_tokens)), stats.sequence_tokens)
        chunk: NDArray[np.int64] = sequence[token] // self.chunk_sequences
        return chunk

    def _search(self, block: BlockLoss, removed: int, shape: ModelShape) -> tuple[NDArray[np.bool_], Evidence]:
        if removed == 0:
            everyone = np.ones(block.experts, bool)
            return everyone, {"loss": block.loss(everyone), "search": "exact", "optimal": True}
        cheap = _operations(shape, removed, block.tokens) <= CHEAP_OPERATIONS
        if self.search == "exact" or (self.search == "auto" and (cheap or _has_table(block.router, block.experts))):
            return _exact(block, removed)
        bounded = self.search != "greedy" and can_bound(block.router, block.experts)
        return _from_starts(block, removed, bounded)

    @staticmethod
    def _curve(block: BlockLoss, shape: ModelShape) -> NDArray[np.float64]:
        """Return the squared loss by the number of experts kept, [E + 1], infinite where the router cannot run.

        The smallest of all subsets where the table has them, else along greedy elimination.
        """
        experts, floor = shape.experts, least(shape)
        curve = np.full(experts + 1, np.inf)
        if _has_table(block.router, experts):
            losses = all_subsets(block)
            np.minimum.at(curve, experts - np.bitwise_count(np.arange(1 << experts)).astype(np.int64), losses)
        else:
            curve[experts] = block.loss(np.ones(experts, bool))
            for kept, loss in eliminate(block, experts - floor):
                curve[kept.sum()] = loss
        curve[:floor] = np.inf
        return curve**2


def _rule(shape: ModelShape) -> Router:
    """Return the rule of the model's router, whatever it adds to the scores."""
    return router_of(shape, WHERE, np.zeros(shape.experts) if needs_correction(shape) else None)


def _has_table(router: Router, experts: int) -> bool:
    return router.fixed and router.local and router.top_k == 2 and experts <= WIDEST_TABLE


def _subsets(shape: ModelShape, removed: int) -> int:
    return int(comb(shape.experts // shape.groups, removed // shape.groups) ** shape.groups)


def _operations(shape: ModelShape, removed: int, tokens: int) -> float:
    return float(_subsets(shape, removed)) * max(tokens, LEAST_TOKENS) * (shape.experts + shape.top_k**2)


def _dropped(experts: int, groups: int, removed: int) -> Iterator[tuple[int, ...]]:
    """Yield every set of dropped experts, equally many of each group, in lexicographic order."""
    size = experts // groups
    each = [combinations(range(g * size, (g + 1) * size), removed // groups) for g in range(groups)]
    for parts in product(*each):
        yield tuple(e for part in parts for e in part)


def _exact(block: BlockLoss, removed: int) -> tuple[NDArray[np.bool_], Evidence]:
    dropped = list(_dropped(block.experts, block.router.groups, removed))
    if _has_table(block.router, block.experts):
        losses = all_subsets(block)[(1 << np.array(dropped)).sum(axis=1)]
    else:
        losses = enumerate_subsets(block, dropped)
    order = np.argsort(losses, kind="stable")[:BEST]
    kept = np.ones(block.experts, bool)
    kept[list(dropped[order[0]])] = False
    best = [{"dropped": list(dropped[i]), "loss": float(losses[i])} for i in order]
    loss = float(losses[order[0]])
    return kept, {"loss": loss, "search": "exact", "optimal": True, "subsets": len(losses), "best": best}


def _from_starts(block: BlockLoss, removed: int, bounded: bool) -> tuple[NDArray[np.bool_], Evidence]:
    """Improve three starts by swaps, and the best of them by branch and bound."""
    starts = {"greedy": [kept for kept, _ in eliminate(block, removed)][-1]}
    starts |= {name: best_of(block, scores, removed) for name, scores in seeds(block).items()}
    found: dict[str, tuple[NDArray[np.bool_], float, bool]] = {}
    for name, start in starts.items():
        same = next((one for one in found.values() if (one[0] == start).all()), None)
        found[name] = same or improve(block, start)
    name = min(found, key=lambda name: found[name][1])  # of equal losses the first
    kept, loss, swapped = found[name]
    evidence: Evidence = {
        "loss": loss,
        "search": name,
        "optimal": False,
        "swaps_tried": "all" if swapped else "some",
        "starts": {name: {"alone": block.loss(starts[name]), "swapped": found[name][1]} for name in starts},
    }
    if bounded:
        kept, loss, bound = branch_and_bound(block, removed, kept)
        evidence |= {"loss": loss, "search": "branch_and_bound", "bound": bound, "optimal": bound == loss}
    return kept, evidence
