"""AIMER: drop the experts whose weights are spread most evenly; from the weights alone, without data.

Liu et al., "AIMER: Calibration-Free Task-Agnostic MoE Pruning", 2026 (arXiv 2603.18492), eq. 4. With w all N weights of
an expert's gate, up and down projections together, the absolute mean over the root mean square,

    AIMER(w) = ||w||_1 / sqrt(N ||w||_2^2),   1 / sqrt(N) <= AIMER(w) <= 1,

is 1 where all weights have one magnitude and smallest where one weight holds everything. Experts of *larger* values
are pruned, in the paper ("we prune experts with larger AIMER scores") as in its code.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from espalier.checkpoints.shape import ModelShape
from espalier.collecting.stats import Stats
from espalier.methods.ranking import keep_best
from espalier.plans.plan import Plan

if TYPE_CHECKING:
    from espalier.models.experts import ExpertWeights


@dataclass(frozen=True)
class Aimer:
    """Keep the experts of the smallest AIMER; the scores in the evidence are its negative.

    Biases are no part of it. An expert whose weights are all 0 counts as AIMER = 1.
    """

    ratio: float
    probes: ClassVar[tuple[str, ...]] = ()
    reads_weights: ClassVar[bool] = True

    def plan(self, stats: Stats, shape: ModelShape, experts: "ExpertWeights") -> Plan:
        return keep_best({"name": "aimer"} | asdict(self), self._scores(shape, experts), shape)

    def _scores(self, shape: ModelShape, experts: "ExpertWeights") -> Iterator[tuple[int, NDArray[Any]]]:
        for layer in shape.layers:
            yield layer, -np.array([_aimer(experts, layer, expert) for expert in range(shape.experts)])


def _aimer(experts: "ExpertWeights", layer: int, expert: int) -> float:
    number, absolute, square = 0, 0.0, 0.0
    for part in experts.neurons(layer, expert).values():
        number += part.numel()
        absolute += float(part.abs().double().sum())
        square += float(part.double().square().sum())
    return absolute / float(np.sqrt(number * square)) if square else 1.0
