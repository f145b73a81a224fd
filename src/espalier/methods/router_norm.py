"""Router-norm change: drop the experts whose router rows grew least in fine-tuning.

Chowdhury et al., "A Provably Effective Method for Pruning Experts in Fine-tuned Sparse Mixture-of-Experts", ICML 2024
(PMLR 235). With w_e the router's row of expert e, in the model and in the base model that it was fine-tuned from:

    Delta_e = ||w_e||_2 - ||w_e^base||_2

The guarantee is for binary classification by a simplified block and was tried on vision models.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from espalier.checkpoints.shape import ModelShape
from espalier.collecting.stats import Stats
from espalier.errors import UserError
from espalier.methods.ranking import keep_best
from espalier.plans.plan import Plan

if TYPE_CHECKING:
    from espalier.models.experts import ExpertWeights

WHERE = "conf/method/router_norm.yaml"


@dataclass(frozen=True)
class RouterNorm:
    """Keep the experts of the largest change.

    `base` names the model before fine-tuning: a name of conf/model, a directory, or `org/name@COMMIT`. UserError when
    its routers have another shape or none of their norms differs.
    """

    ratio: float
    base: str | None = None
    probes: ClassVar[tuple[str, ...]] = ()
    reads_weights: ClassVar[bool] = True

    def plan(self, stats: Stats, shape: ModelShape, experts: "ExpertWeights", base: "ExpertWeights") -> Plan:
        scores = list(self._scores(shape, experts, base))
        if not any(values.any() for _, values in scores):
            raise UserError(f"{WHERE}: base={self.base}: its routers have the norms of this model's. Name another.")
        return keep_best({"name": "router_norm"} | asdict(self), scores, shape)

    def _scores(
        self, shape: ModelShape, experts: "ExpertWeights", base: "ExpertWeights"
    ) -> Iterator[tuple[int, NDArray[Any]]]:
        for layer in shape.layers:
            after, before = experts.router(layer).double(), base.router(layer).double()
            if after.shape != before.shape:
                raise UserError(
                    f"{WHERE}: base={self.base}: the router of layer {layer} is {list(before.shape)} there and "
                    f"{list(after.shape)} here. Name the model that this one was fine-tuned from."
                )
            yield layer, np.asarray(after.norm(dim=1) - before.norm(dim=1))
