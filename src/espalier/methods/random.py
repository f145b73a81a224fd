"""Random pruning: keep experts drawn with equal chance, the control of every pruning method.

A baseline of NAEE (Lu et al., ACL 2024, arXiv 2402.14800, table 2): in each MoE block r of E experts survive,

    P(S) = 1 / C(E, r) for every set S of r experts.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from espalier.checkpoints.shape import ModelShape
from espalier.collecting.stats import Stats
from espalier.methods.options import whole_number
from espalier.methods.ranking import keep_best
from espalier.plans.plan import Plan


@dataclass(frozen=True)
class Random:
    """Keep experts at random.

    Each layer draws from its own stream, seeded by (seed, layer index), so its survivors depend neither on
    the other layers nor on the calibration; those of a larger ratio are among those of a smaller one.
    """

    ratio: float
    seed: int = 0
    probes: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        whole_number("random", "seed", self.seed, 0)

    def plan(self, stats: Stats, shape: ModelShape) -> Plan:
        return keep_best({"name": "random"} | asdict(self), self._orders(shape), shape, evidence=False)

    def _orders(self, shape: ModelShape) -> Iterator[tuple[int, NDArray[Any]]]:
        for layer in shape.layers:
            yield layer, np.random.default_rng([self.seed, layer]).permutation(shape.experts)
