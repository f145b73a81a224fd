"""DSMoE: contiguous blocks of neurons with a sigmoid gate each, which training makes sparse.

Lv et al., EMNLP 2025 (arXiv 2502.12455). With q = sigmoid(x Y) and a threshold tau, a token runs the blocks of
q_i > tau and the FFN gives n / |{q_i > tau}| sum_i q_i o_i (equations 8 and 11). How many that are is an outcome of the
training: `tuning: dsmoe` has the straight-through gates, their L1 term, and a controller for an exact budget.

Where the paper is silent: Y is drawn from N(0, std^2) and has no bias by default, so that about half of the blocks run
at first; `bias` is every gate's first bias (2 or more starts close to the dense model). For a token on which no gate
fires the block of the largest gate runs, where equation 8 divides by zero.
"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from espalier.checkpoints.shape import DenseShape
from espalier.collecting.stats import Stats
from espalier.errors import UserError
from espalier.methods.options import whole_number
from espalier.methods.partition import block_size
from espalier.plans.plan import Plan
from espalier.plans.plan_tensors import PlanTensor
from espalier.plans.split import Split

if TYPE_CHECKING:
    from espalier.models.ffn_weights import FFNWeights

WHERE = "conf/method/dsmoe.yaml"


@dataclass(frozen=True)
class Dsmoe:
    """Cut the FFN into `blocks` consecutive blocks and give each a gate that is not trained yet."""

    blocks: int = 8
    threshold: float = 0.5
    std: float = 0.02
    bias: float | None = None
    seed: int = 0
    dense: ClassVar[bool] = True
    probes: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        whole_number("dsmoe", "blocks", self.blocks, 2)
        whole_number("dsmoe", "seed", self.seed, 0)
        for key, fits, wanted in (
            ("threshold", lambda value: 0 <= value < 1, "a number in [0, 1)"),
            ("std", lambda value: value > 0, "a number above 0"),
            ("bias", lambda value: True, "a number or null"),
        ):
            value = getattr(self, key)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and fits(value)) and not (key == "bias" and value is None):
                raise UserError(f"{WHERE}: {key}={value} is not {wanted}.")

    def check(self, shape: DenseShape, tokens: int) -> None:
        """Raise UserError for blocks that do not divide the neurons."""
        block_size("dsmoe", shape.width, self.blocks)

    def plan(self, stats: Stats, shape: DenseShape, ffns: "FFNWeights") -> Plan:
        size = block_size("dsmoe", shape.width, self.blocks)
        layers = {}
        tensors: dict[str, PlanTensor] = {}
        for layer in shape.layers:
            rng = np.random.default_rng([self.seed, layer])
            own = {"weight": rng.normal(0, self.std, (self.blocks, shape.hidden))}
            if self.bias is not None:
                own["bias"] = np.full(self.blocks, float(self.bias))
            names = {role: f"{layer}.router.{role}" for role in own}
            tensors |= {names[role]: PlanTensor.of(array) for role, array in own.items()}
            layers[layer] = (
                Split(
                    (size,) * self.blocks,
                    tuple((block,) for block in range(self.blocks)),
                    router="linear",
                    choose="threshold",
                    threshold=self.threshold,
                    weights="gate",
                    tensors_of=names,
                ),
            )
        return Plan({"name": "dsmoe"} | asdict(self), layers, tensors=tensors)
