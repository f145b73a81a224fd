"""NAEE's dynamic skipping: a token leaves out its weaker experts where their weights are relatively small.

Lu et al., "Not All Experts are Equal", ACL 2024 (arXiv 2402.14800), section 3.3 (K = 2) and appendix A.2
(any K); w_1 >= ... >= w_K are the weights of a token's experts:

    K = 2:  skip expert 2 where w_2 < beta w_1,   beta = median_t w_2(t) / w_1(t)
    K > 2:  keep the smallest i with w_{i+1} + ... + w_K <= beta (w_1 + ... + w_K)

The paper sets beta for K = 2 only, so that about half of the experts that could be skipped are skipped.
For K > 2 the same is ours: beta is the median of all T (K - 1) tails, which leaves (K + 1) / 2 experts a token.
"""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from espalier.errors import UserError
from espalier.plan import Plan, Skip
from espalier.shape import ModelShape
from espalier.stats import Stats

WHERE = "conf/method/naee_skip.yaml"


@dataclass(frozen=True)
class NaeeSkip:
    """Skip experts by a threshold per layer: the median, one number for all layers, or a wanted mean of experts.

    To skip in a pruned model, collect the statistics on the pruned model, as the paper does.
    """

    beta: float | None = None
    mean_k: float | None = None
    probes: ClassVar[tuple[str, ...]] = ("gate_ratio",)

    def __post_init__(self) -> None:
        if self.beta is not None and self.mean_k is not None:
            raise UserError(f"{WHERE}: beta={self.beta} and mean_k={self.mean_k} exclude each other. Give one.")
        if self.beta is not None and not (_is_number(self.beta) and 0 <= self.beta <= 1):
            raise UserError(f"{WHERE}: beta={self.beta} is not a number in 0..1, nor null for the median.")

    def plan(self, stats: Stats, shape: ModelShape) -> Plan:
        """Evidence per layer: beta and the mean number of experts a token keeps on the calibration."""
        if shape.top_k < 2:
            raise UserError(f"{WHERE}: the router picks top_k={shape.top_k}; skipping needs at least 2.")
        if self.mean_k is not None and not (_is_number(self.mean_k) and 1 <= self.mean_k <= shape.top_k):
            raise UserError(f"{WHERE}: mean_k={self.mean_k} lies outside 1..top_k={shape.top_k}.")
        rule = "ratio" if shape.top_k == 2 else "tail"  # also the name of the array that beta cuts
        layers, evidence = {}, {}
        for layer, arrays in stats.layers("gate_ratio"):
            tokens = len(arrays[rule])
            values = np.sort(arrays[rule].astype(np.float64), axis=None)  # [T (K - 1)], ascending
            if self.mean_k is not None:
                beta = _beta_for(values, rule, (self.mean_k - 1) * tokens)
            else:
                beta = float(np.median(values)) if self.beta is None else float(self.beta)
            layers[layer] = (Skip(beta, rule),)
            kept = float(_kept(values, rule, np.array([beta]))[0])
            evidence[layer] = {"beta": beta, "experts_per_token": 1 + kept / tokens}
        return Plan({"name": "naee_skip"} | asdict(self), layers, evidence)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _kept(values: NDArray[np.float64], rule: str, beta: NDArray[np.float64]) -> NDArray[np.int64]:
    """Number of experts beyond the first that each beta keeps, summed over tokens.

    A token's tails descend, so it keeps one expert more than it has tails above beta.
    """
    # skipped: ratio < beta, but tail <= beta
    return values.size - np.searchsorted(values, beta, side="left" if rule == "ratio" else "right")


def _beta_for(values: NDArray[np.float64], rule: str, wanted: float) -> float:
    """Return the beta that keeps nearest to `wanted` experts beyond the first; of two, the one that keeps more.

    Between two neighbouring observed values any beta decides alike; their middle is farthest from rounding.
    """
    distinct = np.unique(values)
    middles = (distinct[1:] + distinct[:-1]) / 2
    candidates = np.concatenate([[0.0], middles, [(distinct[-1] + 1) / 2]])
    return float(candidates[np.argmin(np.abs(_kept(values, rule, candidates) - wanted))])
