"""MoNE: replace experts of little weight and steady output by constant vectors, their mean outputs.

Zhang et al., "MoNE: Replacing Redundant Experts with Lightweight Novices for Structured Pruning of MoE", ICLR 2026
(arXiv 2507.00390), section 4. Over the n tokens that chose expert e, with its output y and routing weight g:

    score_e = || sqrt(1/(n-1) sum_t (y(t) - m)^2) ||_2 * G_e,   m = 1/n sum_t y(t),   G_e = 1/n sum_t g(t)

Experts of the lowest scores are replaced; a token that chooses one of them gets g(t) m. The router stays.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from espalier.checkpoints.shape import ModelShape
from espalier.collecting.stats import Stats
from espalier.errors import UserError
from espalier.methods.options import fraction, one_of
from espalier.methods.ranking import BUDGETS, mean
from espalier.plans.operations import Constant, Operation
from espalier.plans.plan import Plan
from espalier.plans.plan_tensors import PlanTensor

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Mone:
    """`ratio` is the fraction of experts replaced: round(ratio * E) of each layer, at least one of which stays.

    `gate="mean"` is G_e above, the paper's equation; `gate="sum"` takes sum_t g(t) for it, as the paper's code does,
    so that an expert seldom chosen scores low. An expert that no token chose scores 0 and becomes a vector of zeros,
    one that a single token chose scores 0. Of equal scores the higher id is replaced. `budget="global"` ranks the
    experts of all layers together.
    """

    ratio: float
    gate: str = "mean"
    budget: str = "uniform"
    probes: ClassVar[tuple[str, ...]] = ("routed_moments",)

    def __post_init__(self) -> None:
        one_of("mone", "gate", self.gate, ("mean", "sum"))
        one_of("mone", "budget", self.budget, BUDGETS)

    def check(self, shape: ModelShape, tokens: int) -> None:
        if shape.family == "llama4_text":
            raise UserError(
                "conf/method/mone.yaml: a constant needs a router that weighs outputs; that of llama4_text weighs "
                "inputs. Use method=reap."
            )
        fraction("mone", self.ratio, shape.experts, "experts")

    def plan(self, stats: Stats, shape: ModelShape) -> Plan:
        self.check(shape, stats.tokens)
        moments = dict(stats.layers("routed_moments"))
        scores = {layer: self._score(arrays) for layer, arrays in moments.items()}
        each = fraction("mone", self.ratio, shape.experts, "experts")
        replaced = _lowest(scores, each, self.budget)
        layers: dict[int, tuple[Operation, ...]] = {}
        tensors = {}
        for layer, experts in replaced.items():
            layers[layer] = (Constant(experts, f"{layer}.vectors"),) if experts else ()
            if experts:
                arrays, ids = moments[layer], list(experts)
                means = arrays["sum"][ids] / np.maximum(arrays["counts"][ids], 1)[:, None]
                tensors[f"{layer}.vectors"] = PlanTensor.of(means)
        evidence = {layer: {"scores": values.tolist()} for layer, values in scores.items()}
        return Plan({"name": "mone"} | asdict(self), layers, evidence, tensors=tensors)

    def _score(self, arrays: Mapping[str, NDArray[Any]]) -> Floats:
        counts = arrays["counts"].astype(np.float64)[:, None]
        spread = arrays["square_sum"] - arrays["sum"] ** 2 / np.maximum(counts, 1)  # rounding may leave it below 0
        deviation = np.sqrt(np.maximum(spread, 0) / np.maximum(counts - 1, 1))
        gate = arrays["gate_sum"] if self.gate == "sum" else mean(arrays["gate_sum"], arrays["counts"])
        score: Floats = np.linalg.norm(deviation, axis=1) * gate
        score[arrays["counts"] < 2] = 0  # of one output the difference above is rounding only
        return score


def _lowest(scores: Mapping[int, Floats], each: int, budget: str) -> dict[int, tuple[int, ...]]:
    """Return the ids of the lowest scores by layer: `each` of every layer, or as many of all but one a layer."""
    ranked = {
        layer: sorted(range(len(values)), key=lambda e, v=values: (v[e], -e))  # type: ignore[misc]
        for layer, values in scores.items()
    }
    if budget == "uniform":
        return {layer: tuple(sorted(ids[:each])) for layer, ids in ranked.items()}
    pairs = sorted((scores[layer][e], -layer, -e) for layer, ids in ranked.items() for e in ids[:-1])
    chosen = [(-layer, -e) for _, layer, e in pairs[: each * len(scores)]]
    return {layer: tuple(sorted(e for where, e in chosen if where == layer)) for layer in scores}
