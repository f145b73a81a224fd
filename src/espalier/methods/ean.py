"""Expert activation norm (EAN): keep the experts whose outputs are largest where they are chosen.

Jaiswal et al., 2025 (arXiv 2504.05586), in the variants of REAP's baselines (arXiv 2510.13999); the sums
run over the tokens routed to expert e, y is its unweighted output and g the weight that the model gives it:

    sum: sum_t ||y_e(t)||_2      mean: sum / |{t}|      weighted_sum: sum_t g_e(t) ||y_e(t)||_2
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from numpy.typing import NDArray

from espalier.methods.options import one_of
from espalier.methods.ranking import keep_best, mean
from espalier.plan import Plan
from espalier.shape import ModelShape
from espalier.stats import Stats


@dataclass(frozen=True)
class Ean:
    """Keep the experts of the largest output norms; an expert that no token chose scores 0."""

    ratio: float
    variant: str = "sum"
    probes: ClassVar[tuple[str, ...]] = ("output_norm",)

    def __post_init__(self) -> None:
        one_of("ean", "variant", self.variant, ("sum", "mean", "weighted_sum"))

    def plan(self, stats: Stats, shape: ModelShape) -> Plan:
        return keep_best({"name": "ean"} | asdict(self), self._scores(stats), shape)

    def _scores(self, stats: Stats) -> Iterator[tuple[int, NDArray[Any]]]:
        for layer, arrays in stats.layers("output_norm"):
            if self.variant == "mean":
                yield layer, mean(arrays["norm_sum"], arrays["counts"])
            else:
                yield layer, arrays["norm_sum" if self.variant == "sum" else "gate_norm_sum"]
