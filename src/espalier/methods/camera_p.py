"""CAMERA-P: remove the neurons that give least to the block's output ("micro-experts"), across its experts.

Xu et al., "CAMERA: Multi-Matrix Joint Compression for MoE Models via Micro-Expert Redundancy Analysis", AAAI 2026
(arXiv 2508.02322). With phi_j(t) = g(t) a_j(t), the routing weight times what neuron j of the expert hands to its down
projection, 0 where the token did not choose the expert:

    score_j = ||W_down[:, j]||_2^2 ((1 - alpha) sum_t phi_j(t)^2 + alpha max_t phi_j(t)^2)

All layers are scored on the uncompressed model; the paper's code scores each on what pruning the ones before left.
"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from espalier.checkpoints.shape import ModelShape
from espalier.collecting.stats import Stats
from espalier.errors import UserError
from espalier.methods.options import fraction, one_of
from espalier.plans.operations import Narrow
from espalier.plans.plan import Plan
from espalier.plans.plan_tensors import PlanTensor

if TYPE_CHECKING:
    from espalier.models.experts import ExpertWeights

WHERE = "conf/method/camera_p.yaml"


@dataclass(frozen=True)
class CameraP:
    """`ratio` is the fraction of neurons removed, rounded to whole neurons of the layer or of the expert.

    `scope="layer"`, as published, removes the lowest round(ratio * E * F) of a layer: experts get different widths,
    and the files hold zeros up to the widest. `scope="expert"` removes the lowest round(ratio * F) of each expert:
    equal widths, and files that are smaller by the whole ratio. Of equal scores the lower expert's, then the lower
    neuron stays.
    """

    ratio: float
    scope: str = "layer"
    alpha: float = 1.0
    probes: ClassVar[tuple[str, ...]] = ("neuron_energy",)
    reads_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        one_of("camera_p", "scope", self.scope, ("layer", "expert"))
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or not 0 <= self.alpha <= 1:
            raise UserError(f"{WHERE}: alpha={self.alpha} is not a share in 0..1 of the largest token.")

    def check(self, shape: ModelShape, tokens: int) -> None:
        if not shape.neuron_parameters:
            raise UserError(f"{WHERE}: experts of family {shape.family} cannot be narrowed. Use method=reap.")
        self._removed(shape)

    def _removed(self, shape: ModelShape) -> int:
        """Number of neurons to remove: of a layer, or of an expert."""
        of = shape.width if self.scope == "expert" else shape.experts * shape.width
        return fraction("camera_p", self.ratio, of, f"neurons of a {self.scope}")

    def plan(self, stats: Stats, shape: ModelShape, experts: "ExpertWeights") -> Plan:
        """Evidence per layer: how many neurons each expert keeps, and the share of the summed score that is lost."""
        self.check(shape, stats.tokens)
        layers, evidence, tensors = {}, {}, {}
        for layer, arrays in stats.layers("neuron_energy"):
            energy = (1 - self.alpha) * arrays["square_sum"] + self.alpha * arrays["square_max"]
            scores = _down_norms(experts, layer, shape.experts) * energy  # [E, F]
            kept = self._kept(scores, shape)
            widths = kept.sum(axis=1)
            rows = np.full((shape.experts, max(widths)), -1)
            for row, own in zip(rows, kept, strict=True):
                row[: own.sum()] = np.flatnonzero(own)
            tensors[f"{layer}.kept"] = PlanTensor.of(rows)
            layers[layer] = (Narrow(f"{layer}.kept", int(max(widths)), int(kept.sum())),)
            total = scores.sum()
            lost = float(scores[~kept].sum() / total) if total else 0.0
            evidence[layer] = {"widths": widths.tolist(), "lost_share": lost}
        return Plan({"name": "camera_p"} | asdict(self), layers, evidence, tensors=tensors)

    def _kept(self, scores: NDArray[np.float64], shape: ModelShape) -> NDArray[np.bool_]:
        """Return which neurons stay, [E, F]."""
        ranked = scores.reshape(1, -1) if self.scope == "layer" else scores
        best = np.argsort(-ranked, axis=1, kind="stable")[:, : ranked.shape[1] - self._removed(shape)]
        kept = np.zeros(ranked.shape, bool)
        np.put_along_axis(kept, best, True, axis=1)
        return kept.reshape(scores.shape)


def _down_norms(experts: "ExpertWeights", layer: int, number: int) -> NDArray[np.float64]:
    """Return ||W_down[:, j]||_2^2 of each neuron of each expert, [E, F]."""
    downs = (experts.neurons(layer, expert)["down"] for expert in range(number))
    return np.stack([down.double().square().sum(dim=1).numpy() for down in downs])
