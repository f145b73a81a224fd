"""DiEP's adaptive skipping: NAEE's rule, with a threshold that is higher for an expert like the first.

"DiEP", NeurIPS 2025 (arXiv 2509.16105). With e_1 .. e_K a token's experts and w_1 >= ... >= w_K their weights:

    skip e_j where w_j < gamma1 gamma2[e_1, e_j] w_1
    gamma1 = median_t w_2(t) / w_1(t),   gamma2[a, b] = CKA(y_a, y_b) / mean of CKA over all pairs a != b of the layer

The paper has K = 2; for more, gamma1 is the median of all T (K - 1) ratios w_j / w_1.

CKA is taken of the experts' outputs on one sample of tokens, at most 1,024, evenly strided from what the probe `inputs`
holds: exact for those tokens, and E N^2 numbers at once where sums over all tokens would take D^2 for each of E^2
pairs. With fewer tokens than D the CKA of unlike experts comes out larger; dividing by the mean takes most of that out.
"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from espalier.checkpoints.shape import ModelShape
from espalier.collecting.stats import Stats
from espalier.errors import UserError
from espalier.methods.cka import linear_cka, relative_to_mean, sample
from espalier.methods.thresholds import Floats, check_budget, cut_values, is_number, kept, threshold_for
from espalier.plans.operations import Skip
from espalier.plans.plan import Plan
from espalier.plans.plan_tensors import PlanTensor

if TYPE_CHECKING:
    from espalier.models.experts import ExpertWeights

WHERE = "conf/method/diep_skip.yaml"


@dataclass(frozen=True)
class DiepSkip:
    """Skip experts by a threshold times a factor for the two experts; `gamma1` or a wanted mean of experts sets it."""

    gamma1: float | None = None
    mean_k: float | None = None
    probes: ClassVar[tuple[str, ...]] = ("routing", "inputs")
    reads_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.gamma1 is not None and self.mean_k is not None:
            raise UserError(f"{WHERE}: gamma1={self.gamma1} and mean_k={self.mean_k} exclude each other. Give one.")
        if self.gamma1 is not None and not (is_number(self.gamma1) and 0 <= self.gamma1 < float("inf")):
            raise UserError(f"{WHERE}: gamma1={self.gamma1} is not a number from 0 on, nor null for the median.")

    def check(self, shape: ModelShape, tokens: int) -> None:
        """Raise UserError when there is nothing to skip or mean_k cannot be met."""
        check_budget(WHERE, self.mean_k, shape)

    def plan(self, stats: Stats, shape: ModelShape, experts: "ExpertWeights") -> Plan:
        """Evidence per layer: gamma1, the mean CKA of two experts, the mean number of experts a token keeps."""
        self.check(shape, stats.tokens)
        layers, evidence = {}, {}
        tensors: dict[str, PlanTensor] = {}
        for layer, arrays in stats.layers("routing"):
            similarity = self._similarity(stats, layer, experts)
            size = len(similarity)
            factor = np.ones((shape.experts, shape.experts))  # layers may hold fewer experts than the largest
            factor[:size, :size] = relative_to_mean(similarity)
            factor = factor.astype(np.float32).astype(np.float64)
            tokens = len(arrays["weights"])
            ratios = cut_values("ratio", arrays["weights"])
            rows = self._stored(experts, layer, size)[arrays["experts"]]
            with np.errstate(divide="ignore", invalid="ignore"):
                values = np.sort(ratios / factor[rows[:, :1], rows[:, 1:]], axis=None)
            values = np.where(np.isnan(values), np.inf, values)  # a factor of 0 keeps even a weight of 0
            if self.mean_k is not None:
                gamma = threshold_for(values, "ratio", (self.mean_k - 1) * tokens)
            else:
                gamma = float(np.median(ratios)) if self.gamma1 is None else float(self.gamma1)
            name = f"{layer}.skip_factor"
            layers[layer] = (Skip(gamma, factor=name),)
            tensors[name] = PlanTensor.of(factor)
            evidence[layer] = {
                "gamma1": gamma,
                "mean_cka": float(similarity[~np.eye(size, dtype=bool)].mean()) if size > 1 else 1.0,
                "experts_per_token": 1 + int(kept(values, "ratio", np.array([gamma]))[0]) / tokens,
            }
        return Plan({"name": "diep_skip"} | asdict(self), layers, evidence, tensors=tensors)

    def _stored(self, experts: "ExpertWeights", layer: int, size: int) -> NDArray[np.int64]:
        """Return the stored expert of each router row."""
        found = experts.expert_map(layer)
        if found is None:
            return np.arange(size)
        if max(found) >= size:
            raise UserError(f"{WHERE}: layer {layer} has constants for experts, which are like none. Use odp.")
        return np.array(found)

    def _similarity(self, stats: Stats, layer: int, experts: "ExpertWeights") -> Floats:
        import torch

        block = experts.block(layer)
        hidden = stats.layer("inputs", layer)["hidden"]
        x = torch.from_numpy(hidden[sample(len(hidden), block.number)])
        return linear_cka(lambda expert: block.output(expert, x).numpy(), block.number)
