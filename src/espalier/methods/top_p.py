"""Top-p routing of a model that was trained with K experts: as many as the router needs to be sure, K at most.

Huang et al., "Harder Tasks Need More Experts", ACL 2024 (arXiv 2403.07652). With P_1 >= P_2 >= ... the softmax of a
token's logits over all E experts, the token runs the smallest i with P_1 + ... + P_i >= p. The paper trains a model
so, with p = 0.4; here a trained one is left with fewer of its K experts, and the weights of what is left are scaled as
in every skipping rule.
"""

from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np

from espalier.checkpoints.shape import ModelShape
from espalier.collecting.stats import Stats
from espalier.errors import UserError
from espalier.methods.options import softmax_router
from espalier.methods.thresholds import check_budget, check_keys, cut_values, kept, threshold_for
from espalier.plans.operations import Skip
from espalier.plans.plan import Plan

WHERE = "conf/method/top_p.yaml"
PUBLISHED = 0.4


@dataclass(frozen=True)
class TopP:
    """Keep the experts of largest probability until they reach `p`, or a wanted mean of experts."""

    p: float | None = None
    mean_k: float | None = None
    probes: ClassVar[tuple[str, ...]] = ("routing",)

    def __post_init__(self) -> None:
        check_keys(WHERE, "p", self.p, self.mean_k, f"the paper's {PUBLISHED}")
        if self.p == 0:
            raise UserError(f"{WHERE}: p=0 is reached without any expert. Use p > 0, or fixed_k with k=1.")

    def check(self, shape: ModelShape, tokens: int) -> None:
        """Raise UserError when there is nothing to skip, the router is none of softmax, or mean_k cannot be met."""
        check_budget(WHERE, self.mean_k, shape)
        softmax_router(WHERE, shape, "top_p adds up probabilities of all experts", "Use naee_skip or fixed_k.")

    def plan(self, stats: Stats, shape: ModelShape) -> Plan:
        """Evidence per layer: p and the mean number of experts a token keeps on the calibration."""
        self.check(shape, stats.tokens)
        layers, evidence = {}, {}
        for layer, arrays in stats.layers("routing"):
            tokens = len(arrays["probability"])
            values = np.sort(cut_values("top_p", arrays["probability"]), axis=None)  # [T (K - 1)]
            if self.mean_k is not None:
                p = threshold_for(values, "top_p", (self.mean_k - 1) * tokens)
            else:
                p = PUBLISHED if self.p is None else float(self.p)
            layers[layer] = (Skip(rule="top_p", p=p),)
            number = int(kept(values, "top_p", np.array([p]))[0])
            evidence[layer] = {"p": p, "experts_per_token": 1 + number / tokens}
        return Plan({"name": "top_p"} | asdict(self), layers, evidence)
