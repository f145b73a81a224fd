"""Expert activation norm (EAN): keep the experts whose outputs are largest where they are chosen.

Jaiswal et al., 2025 (arXiv 2504.05586), in the variants of REAP's baselines (arXiv 2510.13999; its `ean_ca` is
`norm_of_mean`) and the mean square (MSAN) of "How to Score Experts" (arXiv 2606.15716, whose MAN is `mean`). Sums
run over the tokens routed to expert e, n of them; y is its unweighted output, g the weight that the model gives it:

    sum: sum_t ||y_e(t)||_2         mean: sum / n         weighted_sum: sum_t g_e(t) ||y_e(t)||_2
    mean_square: 1/n sum_t ||y_e(t)||_2^2                 norm_of_mean: ||1/n sum_t y_e(t)||_2
    max_activation: the largest element of any y_e(t), with its sign; at least 0
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.checkpoints.shape import ModelShape
from espalier.collecting.stats import Stats
from espalier.methods.options import one_of
from espalier.methods.ranking import BUDGETS, keep_best, mean
from espalier.plans.plan import Plan

Scores = Callable[[dict[str, NDArray[Any]]], NDArray[Any]]  # [E] of one layer's arrays of a probe

VARIANTS: dict[str, tuple[str, Scores]] = {
    "sum": ("output_norm", lambda a: a["norm_sum"]),
    "mean": ("output_norm", lambda a: mean(a["norm_sum"], a["counts"])),
    "weighted_sum": ("output_norm", lambda a: a["gate_norm_sum"]),
    "mean_square": ("routed_moments", lambda a: mean(a["square_sum"].sum(axis=1), a["counts"])),
    "norm_of_mean": ("routed_moments", lambda a: mean(np.linalg.norm(a["sum"], axis=1), a["counts"])),
    "max_activation": ("routed_moments", lambda a: np.maximum(a["largest"], 0)),
}


@dataclass(frozen=True)
class Ean:
    """Keep the experts of the largest output norms; an expert that no token chose scores 0."""

    ratio: float
    variant: str = "sum"
    budget: str = "uniform"

    def __post_init__(self) -> None:
        one_of("ean", "budget", self.budget, BUDGETS)
        one_of("ean", "variant", self.variant, tuple(VARIANTS))

    @property
    def probes(self) -> tuple[str, ...]:
        return (VARIANTS[self.variant][0],)

    def plan(self, stats: Stats, shape: ModelShape) -> Plan:
        return keep_best({"name": "ean"} | asdict(self), self._scores(stats), shape, budget=self.budget)

    def _scores(self, stats: Stats) -> Iterator[tuple[int, NDArray[Any]]]:
        probe, scores = VARIANTS[self.variant]
        for layer, arrays in stats.layers(probe):
            yield layer, scores(arrays)
