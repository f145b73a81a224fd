"""LLaMA-MoE: equal blocks of neurons as experts, chosen by a softmax gate that training has to find.

Zhu et al., EMNLP 2024 (arXiv 2406.16554). The neurons are drawn into blocks (Independent-Random, the released models)
or clustered (Independent-Clustering); the K chosen of E blocks are weighted by the softmax over the chosen scores and
multiplied by E / K, so that what is expected of the sum stays as large. Without training the gate is random, and the
model is of no use: the authors train on 200 billion tokens. The noise on the gate in their training is left out.
"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from espalier.checkpoints.shape import DenseShape
from espalier.collecting.stats import Stats
from espalier.methods.blocks import block_layout
from espalier.methods.options import one_of, whole_number
from espalier.methods.partition import active_blocks, balanced_kmeans, block_size, random
from espalier.plans.plan import Plan
from espalier.plans.plan_tensors import PlanTensor
from espalier.plans.split import Split

if TYPE_CHECKING:
    from espalier.models.ffn_weights import FFNLayer, FFNWeights

STD = 0.02  # of the gate's first weights


@dataclass(frozen=True)
class LlamaMoe:
    """Cut the FFN into `blocks` experts, of which a token runs the fraction 1 - ratio."""

    ratio: float
    blocks: int = 8
    split: str = "random"
    seed: int = 0
    dense: ClassVar[bool] = True
    probes: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        one_of("llama_moe", "split", self.split, ("random", "clustering"))
        whole_number("llama_moe", "blocks", self.blocks, 2)
        whole_number("llama_moe", "seed", self.seed, 0)

    def check(self, shape: DenseShape, tokens: int) -> None:
        """Raise UserError for blocks that do not divide the neurons or a ratio that leaves none out, or none in."""
        block_size("llama_moe", shape.width, self.blocks)
        active_blocks("llama_moe", self.ratio, self.blocks)

    def plan(self, stats: Stats, shape: DenseShape, ffns: "FFNWeights") -> Plan:
        self.check(shape, 0)
        k = active_blocks("llama_moe", self.ratio, self.blocks)
        layers = {}
        tensors: dict[str, PlanTensor] = {}
        for layer in shape.layers:
            rng = np.random.default_rng([self.seed, layer])
            labels = self._labels(ffns.layer(layer), rng)
            layout = block_layout(labels, self.blocks, f"{layer}.neurons", tensors)
            weight = f"{layer}.router.weight"
            tensors[weight] = PlanTensor.of(rng.normal(0, STD, (self.blocks, shape.hidden)))
            layers[layer] = (
                Split(
                    **layout,
                    router="linear",
                    k=k,
                    weights="softmax",
                    scale=self.blocks / k,
                    tensors_of={"weight": weight},
                ),
            )
        return Plan({"name": "llama_moe"} | asdict(self), layers, tensors=tensors)

    def _labels(self, ffn: "FFNLayer", rng: np.random.Generator) -> NDArray[np.int64]:
        if self.split == "random":
            return random(len(ffn.up), self.blocks, rng)
        return balanced_kmeans(ffn.rows.double().numpy(), self.blocks, self.seed)
