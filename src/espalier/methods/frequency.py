"""Frequency pruning: keep the experts that the router chooses most often.

The hard count of SEER-MoE (Muzio, Sun and He, 2024, arXiv 2404.05089), NAEE's and REAP's baseline; and REAP's
weighted frequency (arXiv 2510.13999), with g the weight that the model's router gives a chosen expert:

    counts: |{t : e in TopK(t)}|        gate: sum_{t : e in TopK(t)} g_e(t)
"""

from dataclasses import asdict, dataclass
from typing import ClassVar

from espalier.checkpoints.shape import ModelShape
from espalier.collecting.stats import Stats
from espalier.methods.options import one_of
from espalier.methods.ranking import BUDGETS, keep_best
from espalier.plans.plan import Plan

ARRAYS = {"counts": "counts", "gate": "gate_sum"}


@dataclass(frozen=True)
class Frequency:
    """Keep the experts that the router chooses most often, or with the largest sum of weights."""

    ratio: float
    weights: str = "counts"
    budget: str = "uniform"
    probes: ClassVar[tuple[str, ...]] = ("usage",)

    def __post_init__(self) -> None:
        one_of("frequency", "budget", self.budget, BUDGETS)
        one_of("frequency", "weights", self.weights, tuple(ARRAYS))

    def plan(self, stats: Stats, shape: ModelShape) -> Plan:
        scores = ((layer, arrays[ARRAYS[self.weights]]) for layer, arrays in stats.layers("usage"))
        return keep_best({"name": "frequency"} | asdict(self), scores, shape, budget=self.budget)
