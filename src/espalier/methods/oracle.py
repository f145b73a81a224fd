"""The oracle: each token runs the neurons that matter most to it, which is known only once all have run.

An upper bound for methods that choose neurons by token, and no faster than the dense model: of the neurons with the
largest |a_j| ||W_down,j||_2 each token keeps a fixed number.
"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, ClassVar

from espalier.checkpoints.shape import DenseShape
from espalier.collecting.stats import Stats
from espalier.methods.options import fraction
from espalier.plans.plan import Plan
from espalier.plans.split import Split

if TYPE_CHECKING:
    from espalier.models.ffn_weights import FFNWeights


@dataclass(frozen=True)
class Oracle:
    """Let each token run the fraction 1 - ratio of the neurons, those that give most."""

    ratio: float
    dense: ClassVar[bool] = True
    probes: ClassVar[tuple[str, ...]] = ()

    def check(self, shape: DenseShape, tokens: int) -> None:
        """Raise UserError for a ratio that leaves all neurons, or none."""
        fraction("oracle", self.ratio, shape.width, "neurons")

    def plan(self, stats: Stats, shape: DenseShape, ffns: "FFNWeights") -> Plan:
        left = shape.width - fraction("oracle", self.ratio, shape.width, "neurons")
        split = Split((shape.width,), router="oracle", k=left, level="neurons")
        return Plan({"name": "oracle"} | asdict(self), dict.fromkeys(shape.layers, (split,)))
