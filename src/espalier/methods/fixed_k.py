"""FIXED-K: every token runs its k strongest experts of K; the baseline of every rule that looks at the token.

"You only need 2/3 of the chosen experts" (arXiv 2609.25809) compares dynamic rules with it at equal mean k, and takes
k = ceil(2 K / 3).
"""

from dataclasses import asdict, dataclass
from typing import ClassVar

from espalier.checkpoints.shape import ModelShape
from espalier.collecting.stats import Stats
from espalier.errors import UserError
from espalier.methods.thresholds import check_budget, is_number
from espalier.plans.operations import Skip
from espalier.plans.plan import Plan

WHERE = "conf/method/fixed_k.yaml"


@dataclass(frozen=True)
class FixedK:
    """Keep the first `k` experts of each token; `mean_k` is another name for it, so that sweeps can cross rules."""

    k: int | None = None
    mean_k: float | None = None
    probes: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.k is not None and self.mean_k is not None:
            raise UserError(f"{WHERE}: k={self.k} and mean_k={self.mean_k} exclude each other. Give one.")
        if self.k is not None and (isinstance(self.k, bool) or not isinstance(self.k, int)):
            raise UserError(f"{WHERE}: k={self.k} is not a whole number, nor null for ceil(2 K / 3).")

    def check(self, shape: ModelShape, tokens: int) -> None:
        """Raise UserError when there is nothing to skip, or k is not a whole number in 1..K."""
        check_budget(WHERE, self.mean_k, shape)
        if self.mean_k is not None and is_number(self.mean_k) and self.mean_k != int(self.mean_k):
            raise UserError(
                f"{WHERE}: mean_k={self.mean_k} is not a whole number, and every token keeps as many. Use "
                f"mean_k={int(self.mean_k)} or mean_k={int(self.mean_k) + 1}."
            )
        if self.k is not None and not 1 <= self.k <= shape.top_k:
            raise UserError(f"{WHERE}: k={self.k} lies outside 1..top_k={shape.top_k}.")

    def plan(self, stats: Stats, shape: ModelShape) -> Plan:
        """Evidence per layer: the number of experts that a token keeps."""
        self.check(shape, stats.tokens)
        wanted = self.k if self.mean_k is None else int(self.mean_k)
        k = -(-2 * shape.top_k // 3) if wanted is None else wanted
        evidence = {layer: {"k": k, "experts_per_token": float(k)} for layer in shape.layers}
        layers = {layer: (Skip(rule="fixed_k", k=k),) for layer in shape.layers}
        return Plan({"name": "fixed_k"} | asdict(self), layers, evidence)
