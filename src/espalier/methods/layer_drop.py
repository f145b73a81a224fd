"""Layer drop: decoder layers, their attention or their FFNs are gone for every token; the static baseline of depth.

A dense model that only loses whole layers is a stock model with fewer layers. Attention alone: He et al., 2024 (arXiv
2406.15786), who choose layers by similarity of input and output; here the choices are those of routed layers.
"""

from dataclasses import dataclass
from typing import ClassVar

from espalier.collecting.stats import Stats
from espalier.errors import UserError
from espalier.methods.depth_layers import RoutedLayers, Shape
from espalier.plans.depth import Depth
from espalier.plans.plan import Plan


@dataclass(frozen=True)
class LayerDrop(RoutedLayers):
    """Drop `layers`."""

    name: ClassVar[str] = "layer_drop"

    def check(self, shape: Shape, tokens: int) -> None:
        """Raise UserError for layers that the model has not, or when none would be left."""
        super().check(shape, tokens)
        assert shape.decoder is not None
        given = len(self.layers) if isinstance(self.layers, tuple) else (self.count or 0)
        if self.granularity == "block" and given >= shape.decoder.layers:
            raise UserError(f"conf/method/layer_drop.yaml: drops all {shape.decoder.layers} layers. Leave one.")

    def plan(self, stats: Stats, shape: Shape) -> Plan:
        self.check(shape, 0)
        operation = Depth("drop", self.granularity, "mask")
        return self.routed(shape, stats, lambda layer: (operation, {}))
