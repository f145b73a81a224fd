"""Static pruning of neurons: every token runs the same ones, the rest is removed.

What a method that decides by token has to beat. `score=activation` keeps the neurons with the largest root mean square
activation times the norm of their column of W_down (Sun et al., 2024, arXiv 2306.11695, by neuron), `score=magnitude`
those with the largest product of the norms of their weights.
"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, ClassVar

from espalier.checkpoints.shape import DenseShape
from espalier.collecting.stats import Stats
from espalier.methods import neuron_scores
from espalier.methods.options import fraction, one_of
from espalier.plans.plan import Plan
from espalier.plans.plan_tensors import PlanTensor
from espalier.plans.split import Split

if TYPE_CHECKING:
    from espalier.models.ffn_weights import FFNWeights


@dataclass(frozen=True)
class Static:
    """Keep the same number of neurons in every layer, those of the largest score."""

    ratio: float
    score: str = "activation"
    dense: ClassVar[bool] = True

    def __post_init__(self) -> None:
        one_of("static", "score", self.score, neuron_scores.SCORES)

    @property
    def probes(self) -> tuple[str, ...]:
        return ("ffn_energy",) if self.score == "activation" else ()

    def check(self, shape: DenseShape, tokens: int) -> None:
        """Raise UserError for a ratio that leaves all neurons, or none."""
        fraction("static", self.ratio, shape.width, "neurons")

    def plan(self, stats: Stats, shape: DenseShape, ffns: "FFNWeights") -> Plan:
        """Evidence per layer: the share of the summed scores that stays."""
        left = shape.width - fraction("static", self.ratio, shape.width, "neurons")
        layers, evidence, tensors = {}, {}, {}
        for layer in shape.layers:
            ffn = ffns.layer(layer)
            if self.score == "activation":
                scores = neuron_scores.activation(stats.layer("ffn_energy", layer), ffn, stats.tokens)
            else:
                scores = neuron_scores.magnitude(ffn)
            kept = neuron_scores.best(scores, left)
            name = f"{layer}.neurons"
            tensors[name] = PlanTensor.of(kept)
            layers[layer] = (Split((left,), neurons=name),)
            evidence[layer] = {"kept_score": float(scores[kept].sum() / scores.sum()) if scores.any() else 1.0}
        return Plan({"name": "static"} | asdict(self), layers, evidence, tensors=tensors)
