"""Another rule for layers that are routed and trained: another threshold of MoDification, or the predictor of MoD."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from espalier.collecting.stats import Stats
from espalier.errors import UserError
from espalier.methods.depth_layers import Shape
from espalier.methods.options import number, one_of
from espalier.plans.depth import DepthRule as Operation
from espalier.plans.plan import Plan

if TYPE_CHECKING:
    from espalier.checkpoints.checkpoint import Checkpoint

WHERE = "conf/method/depth_rule.yaml"


@dataclass(frozen=True)
class DepthRule:
    """Let tokens enter by `rule`, with `threshold` where it has one, in every layer that is routed by such a rule."""

    rule: str = "threshold"
    threshold: float = 0.5
    depth: ClassVar[bool] = True
    reads_checkpoint: ClassVar[bool] = True
    probes: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        one_of("depth_rule", "rule", self.rule, ("threshold", "predictor", "top_k"))
        number("depth_rule", "threshold", self.threshold, 0, 1)

    def plan(self, stats: Stats, shape: Shape, checkpoint: "Checkpoint") -> Plan:
        """UserError for a model that has no layer of the kind."""
        routed: dict[str, Any] = checkpoint.config.get("espalier", {}).get("depth", {"layers": {}})["layers"]
        known = ("threshold",) if self.rule == "threshold" else ("predictor", "top_k")
        layers = [int(layer) for layer, own in routed.items() if own["rule"] in known]
        if not layers:
            method = "modification" if self.rule == "threshold" else "mod"
            raise UserError(
                f"{WHERE}: {checkpoint.directory} has no layer routed by {known[0]}. Use method={method} first."
            )
        operation = Operation(self.threshold) if self.rule == "threshold" else Operation(rule=self.rule)
        return Plan({"name": "depth_rule"} | asdict(self), dict.fromkeys(sorted(layers), (operation,)))
