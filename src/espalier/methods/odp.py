"""ODP: NAEE's skipping, but the most important tokens of a sequence keep all their experts while it is read.

Huang et al., "MC-MoE", ICLR 2025 (arXiv 2410.06270). A token skips expert j where w_j < mu w_1, mu being the median of
w_2 / w_1 over the calibration, unless it is among the 2 % of its sequence with the largest

    I_j = ||t_j||_1 (1 / (L - j)) sum_{i >= j} A_{j,i}

with A_{j,i} the attention that token i pays to j, averaged over heads, j counted from 0. The paper does not say which
hidden state t_j is: here it is the input of the MoE block. A token that is generated one at a time has no later tokens
yet, and is not protected.
"""

from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from espalier.checkpoints.shape import ModelShape
from espalier.collecting.stats import Stats
from espalier.errors import UserError
from espalier.methods.thresholds import check_budget, check_keys, cut_values, is_number, kept, threshold_for
from espalier.plans.operations import NO_ATTENTION_WEIGHTS, Skip, protected_tokens
from espalier.plans.plan import Plan

WHERE = "conf/method/odp.yaml"


@dataclass(frozen=True)
class Odp:
    """Skip by the ratio of weights, sparing the fraction `protect` of each sequence's tokens; at least one of them.

    `beta` is the threshold of all layers, by default each layer's median over all tokens; `mean_k` instead is a mean
    over all tokens, protected ones included.
    """

    beta: float | None = None
    mean_k: float | None = None
    protect: float = 0.02
    probes: ClassVar[tuple[str, ...]] = ("routing", "token_importance")

    def __post_init__(self) -> None:
        check_keys(WHERE, "beta", self.beta, self.mean_k, "the median")
        if not (is_number(self.protect) and 0 < self.protect <= 1):
            raise UserError(f"{WHERE}: protect={self.protect} is not a fraction in (0, 1]. Without it use naee_skip.")

    def check(self, shape: ModelShape, tokens: int) -> None:
        """Raise UserError when there is nothing to skip, mean_k cannot be met, or layers have no attention weights."""
        check_budget(WHERE, self.mean_k, shape)
        if shape.family in NO_ATTENTION_WEIGHTS:
            raise UserError(
                f"{WHERE}: {shape.family} has layers without attention weights, which tell a token's importance. Use "
                "naee_skip."
            )

    def plan(self, stats: Stats, shape: ModelShape) -> Plan:
        """Evidence per layer: beta, the number of protected tokens, the mean number of experts a token keeps."""
        self.check(shape, stats.tokens)
        layers, evidence = {}, {}
        for layer, arrays in stats.layers("routing"):
            spared = protected(
                stats.layer("token_importance", layer)["importance"], stats.sequence_tokens, self.protect
            )
            ratios = cut_values("ratio", arrays["weights"])  # [T, K - 1]
            tokens, always = len(ratios), int(spared.sum()) * (shape.top_k - 1)
            values = np.sort(ratios[~spared], axis=None)
            if self.mean_k is not None:
                wanted = (self.mean_k - 1) * tokens - always
                if wanted <= -1:
                    raise UserError(
                        f"{WHERE}: mean_k={self.mean_k}, but protect={self.protect} alone leaves "
                        f"{1 + always / tokens:.3g} experts a token. Use a larger mean_k or protect less."
                    )
                beta = threshold_for(values, "ratio", wanted)
            else:
                beta = float(np.median(ratios)) if self.beta is None else float(self.beta)
            layers[layer] = (Skip(beta, protect=self.protect),)
            number = always + int(kept(values, "ratio", np.array([beta]))[0])
            evidence[layer] = {
                "beta": beta,
                "protected": int(spared.sum()),
                "experts_per_token": 1 + number / tokens,
            }
        return Plan({"name": "odp"} | asdict(self), layers, evidence)


def protected(importance: NDArray[np.float32], sequence_tokens: tuple[int, ...], fraction: float) -> NDArray[np.bool_]:
    """Return which tokens are protected, [T]: the most important of each sequence, the earlier of equal ones."""
    found = np.zeros(len(importance), bool)
    start = 0
    for tokens in sequence_tokens:
        order = np.argsort(-importance[start : start + tokens], kind="stable")
        found[start + order[: protected_tokens(fraction, tokens)]] = True
        start += tokens
    return found
