"""Frequency pruning: keep the experts that the router chooses most often.

The hard count of SEER-MoE (Muzio, Sun and He, 2024, arXiv 2404.05089), NAEE's and REAP's baseline:

    score_e = |{t : e in TopK(t)}|
"""

from dataclasses import asdict, dataclass
from typing import ClassVar

from espalier.methods.ranking import keep_best
from espalier.plan import Plan
from espalier.shape import ModelShape
from espalier.stats import Stats


@dataclass(frozen=True)
class Frequency:
    """Keep the experts that the router chooses most often."""

    ratio: float
    probes: ClassVar[tuple[str, ...]] = ("usage",)

    def plan(self, stats: Stats, shape: ModelShape) -> Plan:
        scores = ((layer, arrays["counts"]) for layer, arrays in stats.layers("usage"))
        return keep_best({"name": "frequency"} | asdict(self), scores, shape)
