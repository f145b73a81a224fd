"""Another threshold for the gates of a model that was split and trained (DSMoE, arXiv 2502.12455, table 4)."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, ClassVar

from espalier.checkpoints.shape import DenseShape
from espalier.collecting.stats import Stats
from espalier.errors import UserError
from espalier.plans import split
from espalier.plans.plan import Plan

if TYPE_CHECKING:
    from espalier.models.ffn_weights import FFNWeights

WHERE = "conf/method/threshold.yaml"


@dataclass(frozen=True)
class Threshold:
    """Let a block run where its gate exceeds `value`, in every layer that has gates."""

    value: float = 0.5
    dense: ClassVar[bool] = True
    probes: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if isinstance(self.value, bool) or not isinstance(self.value, int | float) or not 0 <= self.value < 1:
            raise UserError(f"{WHERE}: value={self.value} is not a number in [0, 1).")

    def plan(self, stats: Stats, shape: DenseShape, ffns: "FFNWeights") -> Plan:
        """UserError for a model without gates."""
        settings = ffns.checkpoint.config.get("espalier", {}).get("layers", {})
        gated = [int(layer) for layer, own in settings.items() if own["router"]["choose"] == "threshold"]
        if not gated:
            where = ffns.checkpoint.directory
            raise UserError(f"{WHERE}: {where} has no gates with a threshold. Use method=dsmoe first.")
        return Plan({"name": "threshold"} | asdict(self), {n: (split.Threshold(self.value),) for n in sorted(gated)})
