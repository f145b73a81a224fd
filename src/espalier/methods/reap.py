"""REAP: keep the experts of the largest mean router-weighted output norm over the tokens that chose them.

Lasby et al., ICLR 2026 (arXiv 2510.13999), equation 9; X_e = {t : e in TopK(t)}:

    score_e = 1 / |X_e| * sum_{t in X_e} g_e(t) ||y_e(t)||_2
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from numpy.typing import NDArray

from espalier.checkpoints.shape import ModelShape
from espalier.collecting.stats import Stats
from espalier.methods.budget import survivors
from espalier.methods.options import one_of, softmax_router
from espalier.methods.ranking import BUDGETS, keep_best, mean
from espalier.plans.plan import Plan

WHERE = "conf/method/reap.yaml"


@dataclass(frozen=True)
class Reap:
    """Keep the experts that add most to the block's output when they are chosen.

    `weights="model"`: g is the weight that the model's router gives (the K of them scaled to sum to 1 where
    the model does so). `weights="published"`: g is the softmax probability over all E logits, never scaled;
    so REAP's code runs Mixtral, although Mixtral itself scales. An expert that no token chose scores 0.
    """

    ratio: float
    weights: str = "model"
    budget: str = "uniform"
    probes: ClassVar[tuple[str, ...]] = ("output_norm",)

    def __post_init__(self) -> None:
        one_of("reap", "budget", self.budget, BUDGETS)
        one_of("reap", "weights", self.weights, ("model", "published"))

    def check(self, shape: ModelShape, tokens: int) -> None:
        """Raise UserError for a ratio that does not fit the model, or weights that its router does not have."""
        survivors(self.ratio, shape, WHERE)
        if self.weights == "published":
            softmax_router(WHERE, shape, "weights=published is the softmax of the logits", "Use weights=model.")

    def plan(self, stats: Stats, shape: ModelShape) -> Plan:
        self.check(shape, stats.tokens)
        return keep_best({"name": "reap"} | asdict(self), self._scores(stats), shape, budget=self.budget)

    def _scores(self, stats: Stats) -> Iterator[tuple[int, NDArray[Any]]]:
        total = "gate_norm_sum" if self.weights == "model" else "probability_norm_sum"
        for layer, arrays in stats.layers("output_norm"):
            yield layer, mean(arrays[total], arrays["counts"])
