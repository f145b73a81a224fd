"""Mixture-of-Depths (MoD): the tokens of largest gate in their sequence enter a layer.

Raposo et al., 2024 (arXiv 2404.02258): in every second layer the share `capacity` of a sequence's tokens enters, those
of largest g = sigmoid(w x + b), which multiplies what they get (the paper multiplies by w x itself; a sigmoid starts an
existing model near its dense function). Which they are depends on later tokens: a sequence can only be read, not
sampled, by this rule. Sampling asks a predictor, a small network that learns to guess the choice from x alone
(`tuning: depth` trains it beside); `method@after: depth_rule` with rule=predictor uses it everywhere.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from espalier.collecting.stats import Stats
from espalier.methods.depth_layers import RoutedLayers, Shape
from espalier.methods.options import number, one_of, whole_number
from espalier.plans.depth import WEIGHTS, Depth
from espalier.plans.plan import Plan


@dataclass(frozen=True)
class Mod(RoutedLayers):
    """Route `layers` by rank, with gates and predictors that are not trained yet."""

    capacity: float = 0.125
    weights: str = "gate"
    init_bias: float = 4.0
    predictor: int = 64
    seed: int = 0
    name: ClassVar[str] = "mod"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("mod", "weights", self.weights, WEIGHTS)
        number("mod", "capacity", self.capacity, 0.001, 1)
        number("mod", "init_bias", self.init_bias, -100, 100)
        whole_number("mod", "predictor", self.predictor, 1)
        whole_number("mod", "seed", self.seed, 0)

    def plan(self, stats: Stats, shape: Shape) -> Plan:
        roles = ("weight", "bias", "first", "second", "offset")
        operation = Depth(
            "top_k",
            self.granularity,
            self.weights,
            capacity=self.capacity,
            tensors_of=dict.fromkeys(roles, ""),
            hidden_units=self.predictor,
        )

        def make(layer: int) -> tuple[Depth, Mapping[str, NDArray[Any]]]:
            rng = np.random.default_rng([self.seed, layer])
            # Gates that are all alike would rank tokens by their place.
            gate = {"weight": rng.normal(0, 1e-3, shape.hidden), "bias": np.full(1, float(self.init_bias))}
            first = rng.normal(0, shape.hidden**-0.5, (self.predictor, shape.hidden))
            second = rng.normal(0, self.predictor**-0.5, self.predictor)
            return operation, gate | {"first": first, "second": second, "offset": np.zeros(1)}

        return self.routed(shape, stats, make)
