"""Random skipping: tokens enter a layer with equal chance, the control of every learnt router of depth.

Whether a token enters is drawn from its position in the sequence, the layer and the seed, so that decoding with a cache
makes the same choice as reading the whole sequence does.
"""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from espalier.depth import Depth
from espalier.methods.depth_layers import Shape, check_keys, check_layers, chosen_layers, probes_for, route
from espalier.methods.options import number, whole_number
from espalier.plan import Plan
from espalier.stats import Stats


@dataclass(frozen=True)
class RandomDepth:
    """Let the share `capacity` of tokens enter each of `layers`."""

    capacity: float = 0.5
    layers: Any = "interleave"
    count: int | None = None
    granularity: str = "block"
    seed: int = 0
    depth: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", check_keys("random_depth", self.layers, self.count, self.granularity))
        number("random_depth", "capacity", self.capacity, 0.001, 1)
        whole_number("random_depth", "seed", self.seed, 0)

    @property
    def probes(self) -> tuple[str, ...]:
        return probes_for(self.layers)

    def check(self, shape: Shape, tokens: int) -> None:
        """Raise UserError for layers that the model has not."""
        check_layers("random_depth", self.layers, self.count, self.granularity, shape)

    def plan(self, stats: Stats, shape: Shape) -> Plan:
        operation = Depth("random", self.granularity, "mask", capacity=self.capacity, seed=self.seed)
        layers = chosen_layers("random_depth", self.layers, self.count, self.granularity, shape, stats)
        return route({"name": "random_depth"} | asdict(self), layers, lambda layer: (operation, {}), stats)
