"""Random blocks: each token runs some blocks of neurons, drawn by its hidden state but for no reason.

The control of methods that route. Scores are a random projection of the normalised input, so that the same token
always runs the same blocks and evaluation is deterministic.
"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from espalier.checkpoints.shape import DenseShape
from espalier.collecting.stats import Stats
from espalier.methods.options import one_of, whole_number
from espalier.methods.partition import active_blocks, block_size, random, stored_order
from espalier.plans.plan import Plan
from espalier.plans.plan_tensors import PlanTensor
from espalier.plans.split import Split

if TYPE_CHECKING:
    from espalier.models.ffn_weights import FFNWeights


@dataclass(frozen=True)
class RandomBlocks:
    """Cut the FFN into `blocks` equal blocks, contiguous ones or drawn, of which a token runs a random choice."""

    ratio: float
    blocks: int = 32
    split: str = "contiguous"
    seed: int = 0
    dense: ClassVar[bool] = True
    probes: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        one_of("random_blocks", "split", self.split, ("contiguous", "random"))
        whole_number("random_blocks", "blocks", self.blocks, 2)
        whole_number("random_blocks", "seed", self.seed, 0)

    def check(self, shape: DenseShape, tokens: int) -> None:
        """Raise UserError for blocks that do not divide the neurons or a ratio that leaves none out, or none in."""
        block_size("random_blocks", shape.width, self.blocks)
        active_blocks("random_blocks", self.ratio, self.blocks)

    def plan(self, stats: Stats, shape: DenseShape, ffns: "FFNWeights") -> Plan:
        self.check(shape, 0)
        k, size = active_blocks("random_blocks", self.ratio, self.blocks), shape.width // self.blocks
        layers, tensors = {}, {}
        for layer in shape.layers:
            rng = np.random.default_rng([self.seed, layer])
            weight, neurons = f"{layer}.router.weight", None
            tensors[weight] = PlanTensor.of(rng.normal(size=(self.blocks, shape.hidden)))
            if self.split == "random":
                neurons = f"{layer}.neurons"
                tensors[neurons] = PlanTensor.of(stored_order(random(shape.width, self.blocks, rng)))
            layers[layer] = (
                Split(
                    (size,) * self.blocks,
                    tuple((block,) for block in range(self.blocks)),
                    neurons,
                    router="linear",
                    k=k,
                    normalise=True,
                    tensors_of={"weight": weight},
                ),
            )
        return Plan({"name": "random_blocks"} | asdict(self), layers, tensors=tensors)
