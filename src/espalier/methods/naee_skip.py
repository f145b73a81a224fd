"""NAEE's dynamic skipping: a token leaves out its weaker experts where their weights are relatively small.

Lu et al., "Not All Experts are Equal", ACL 2024 (arXiv 2402.14800), section 3.3 (K = 2) and appendix A.2
(any K); w_1 >= ... >= w_K are the weights of a token's experts:

    K = 2:  skip expert 2 where w_2 < beta w_1,   beta = median_t w_2(t) / w_1(t)
    K > 2:  keep the smallest i with w_{i+1} + ... + w_K <= beta (w_1 + ... + w_K)

The paper sets beta for K = 2 only, so that about half of the experts that could be skipped are skipped.
For K > 2 the same is ours: beta is the median of all T (K - 1) tails, which leaves (K + 1) / 2 experts a token.
`rule=ratio` generalises the first rule instead: every expert with w_j < beta w_1 is left out.
"""

from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np

from espalier.checkpoints.shape import ModelShape
from espalier.collecting.stats import Stats
from espalier.methods.options import one_of
from espalier.methods.thresholds import check_budget, check_keys, cut_values, kept, threshold_for
from espalier.plans.operations import Skip
from espalier.plans.plan import Plan

WHERE = "conf/method/naee_skip.yaml"


@dataclass(frozen=True)
class NaeeSkip:
    """Skip experts by a threshold per layer: the median, one number for all layers, or a wanted mean of experts.

    `rule="auto"` is `ratio` for K = 2, where both are one rule up to the scale of beta, and else `tail`. To skip in a
    pruned model, collect the statistics on the pruned model, as the paper does.
    """

    beta: float | None = None
    mean_k: float | None = None
    rule: str = "auto"
    probes: ClassVar[tuple[str, ...]] = ("routing",)

    def __post_init__(self) -> None:
        check_keys(WHERE, "beta", self.beta, self.mean_k, "the median")
        one_of("naee_skip", "rule", self.rule, ("auto", "ratio", "tail"))

    def check(self, shape: ModelShape, tokens: int) -> None:
        """Raise UserError when there is nothing to skip or mean_k cannot be met."""
        check_budget(WHERE, self.mean_k, shape)

    def plan(self, stats: Stats, shape: ModelShape) -> Plan:
        """Evidence per layer: beta and the mean number of experts a token keeps on the calibration."""
        self.check(shape, stats.tokens)
        rule = self.rule if self.rule != "auto" else "ratio" if shape.top_k == 2 else "tail"
        layers, evidence = {}, {}
        for layer, arrays in stats.layers("routing"):
            tokens = len(arrays["weights"])
            values = np.sort(cut_values(rule, arrays["weights"]), axis=None)  # [T (K - 1)]
            if self.mean_k is not None:
                beta = threshold_for(values, rule, (self.mean_k - 1) * tokens)
            else:
                beta = float(np.median(values)) if self.beta is None else float(self.beta)
            layers[layer] = (Skip(beta, rule),)
            evidence[layer] = {
                "beta": beta,
                "experts_per_token": 1 + int(kept(values, rule, np.array([beta]))[0]) / tokens,
            }
        return Plan({"name": "naee_skip"} | asdict(self), layers, evidence)
