"""MoDification: tokens skip layers of an existing model where a gate lies below a threshold.

Zhang et al., 2024 (arXiv 2410.14268). In every second layer a token of input x has the gate g = sigmoid(w x + b) and
enters where g >= p; then g multiplies what attention and FFN give it. The rule looks at the token alone, so that it is
causal and the same in training and decoding. `tuning: depth` trains gates and model, with the load term and, for an
exact share of tokens, a controller.

w starts at zero. The paper does not give b; `init_bias` 4 starts near the dense function (g = 0.982), 0 (a published
re-implementation) scales each routed layer by a half at first. granularity=attention with weights=mask is MindSkip
(He et al., EMNLP 2025, arXiv 2410.13184), whose gate sees the normalised input of attention.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from espalier.collecting.stats import Stats
from espalier.errors import UserError
from espalier.methods.depth_layers import RoutedLayers, Shape
from espalier.methods.options import number, one_of
from espalier.plans.depth import CACHES, WEIGHTS, Depth
from espalier.plans.plan import Plan

WHERE = "conf/method/modification.yaml"


@dataclass(frozen=True)
class Modification(RoutedLayers):
    """Route `layers` by a threshold, with gates that are not trained yet."""

    threshold: float = 0.5
    weights: str = "gate"
    cache: str = "kept"
    init_bias: float = 4.0
    name: ClassVar[str] = "modification"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("modification", "weights", self.weights, WEIGHTS)
        one_of("modification", "cache", self.cache, CACHES)
        if self.cache == "all" and self.granularity != "block":
            raise UserError(f"{WHERE}: cache=all is of granularity=block; without an FFN to save it saves nothing.")
        number("modification", "threshold", self.threshold, 0, 1)
        number("modification", "init_bias", self.init_bias, -100, 100)

    def plan(self, stats: Stats, shape: Shape) -> Plan:
        gate = gate_tensors(shape.hidden, self.init_bias)
        operation = Depth(
            "threshold",
            self.granularity,
            self.weights,
            self.cache,
            threshold=self.threshold,
            tensors_of=dict.fromkeys(gate, ""),
        )
        return self.routed(shape, stats, lambda layer: (operation, gate))


def gate_tensors(hidden: int, bias: float) -> Mapping[str, NDArray[Any]]:
    """Return a gate's first tensors by role: weight [D] of zeros, bias [1]."""
    return {"weight": np.zeros(hidden), "bias": np.full(1, float(bias))}
