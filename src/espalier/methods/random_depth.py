"""Random skipping: tokens enter a layer with equal chance, the control of every learnt router of depth.

Whether a token enters is drawn from its position in the sequence, the layer and the seed, so that decoding with a cache
makes the same choice as reading the whole sequence does.
"""

from dataclasses import dataclass
from typing import ClassVar

from espalier.collecting.stats import Stats
from espalier.methods.depth_layers import RoutedLayers, Shape
from espalier.methods.options import number, whole_number
from espalier.plans.depth import Depth
from espalier.plans.plan import Plan


@dataclass(frozen=True)
class RandomDepth(RoutedLayers):
    """Let the share `capacity` of tokens enter each of `layers`."""

    capacity: float = 0.5
    seed: int = 0
    name: ClassVar[str] = "random_depth"

    def __post_init__(self) -> None:
        super().__post_init__()
        number("random_depth", "capacity", self.capacity, 0.001, 1)
        whole_number("random_depth", "seed", self.seed, 0)

    def plan(self, stats: Stats, shape: Shape) -> Plan:
        operation = Depth("random", self.granularity, "mask", capacity=self.capacity, seed=self.seed)
        return self.routed(shape, stats, lambda layer: (operation, {}))
