"""Layer drop: decoder layers, their attention or their FFNs are gone for every token; the static baseline of depth.

A dense model that only loses whole layers is a stock model with fewer layers. Attention alone: He et al., 2024 (arXiv
2406.15786), who choose layers by similarity of input and output; here the choices are those of routed layers.
"""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from espalier.depth import Depth
from espalier.errors import UserError
from espalier.methods.depth_layers import Shape, check_keys, check_layers, chosen_layers, probes_for, route
from espalier.plan import Plan
from espalier.stats import Stats


@dataclass(frozen=True)
class LayerDrop:
    """Drop `layers`."""

    layers: Any = "interleave"
    count: int | None = None
    granularity: str = "block"
    depth: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", check_keys("layer_drop", self.layers, self.count, self.granularity))

    @property
    def probes(self) -> tuple[str, ...]:
        return probes_for(self.layers)

    def check(self, shape: Shape, tokens: int) -> None:
        """Raise UserError for layers that the model has not, or when none would be left."""
        check_layers("layer_drop", self.layers, self.count, self.granularity, shape)
        assert shape.decoder is not None
        given = len(self.layers) if isinstance(self.layers, tuple) else (self.count or 0)
        if self.granularity == "block" and given >= shape.decoder.layers:
            raise UserError(f"conf/method/layer_drop.yaml: drops all {shape.decoder.layers} layers. Leave one.")

    def plan(self, stats: Stats, shape: Shape) -> Plan:
        self.check(shape, 0)
        operation = Depth("drop", self.granularity, "mask")
        layers = chosen_layers("layer_drop", self.layers, self.count, self.granularity, shape, stats)
        return route({"name": "layer_drop"} | asdict(self), layers, lambda layer: (operation, {}), stats)
