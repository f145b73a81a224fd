"""Soft counting: keep the experts that receive the most router probability.

The soft count of SEER-MoE (Muzio, Sun and He, 2024, arXiv 2404.05089), layer by layer; HC-SMoE's S-prune
sums the same scores but ranks them over all layers:

    score_e = sum_t p_e(t),   p(t) = softmax over all E logits
"""

from dataclasses import asdict, dataclass
from typing import ClassVar

from espalier.checkpoints.shape import ModelShape
from espalier.collecting.stats import Stats
from espalier.methods.budget import survivors
from espalier.methods.options import one_of, softmax_router
from espalier.methods.ranking import BUDGETS, keep_best
from espalier.plans.plan import Plan

WHERE = "conf/method/soft_count.yaml"


@dataclass(frozen=True)
class SoftCount:
    """Keep the experts of the highest summed router probability over all tokens, chosen or not."""

    ratio: float
    budget: str = "uniform"
    probes: ClassVar[tuple[str, ...]] = ("usage",)

    def __post_init__(self) -> None:
        one_of("soft_count", "budget", self.budget, BUDGETS)

    def check(self, shape: ModelShape, tokens: int) -> None:
        """Raise UserError for a ratio that does not fit the model, or a router whose scores are no softmax."""
        survivors(self.ratio, shape, WHERE)
        softmax_router(WHERE, shape, "the score is the softmax of the logits", "Use method=reap or frequency.")

    def plan(self, stats: Stats, shape: ModelShape) -> Plan:
        self.check(shape, stats.tokens)
        scores = ((layer, arrays["probability_sum"]) for layer, arrays in stats.layers("usage"))
        return keep_best({"name": "soft_count"} | asdict(self), scores, shape, budget=self.budget)
