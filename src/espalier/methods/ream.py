"""REAM: the most salient experts take in the others that are most like them, few of them many.

Samsung SAIL Montreal, 2026 (arXiv 2604.04356). With REAP's saliency s_e, z_e the mean of what expert e adds to the
block and l_e its router logits, unit length each:

    sim(e, f) = 1/2 [ (cos(z_e, z_f) + 1) / 2  +  1 - ||l_e - l_f|| / max ||l - l'|| ]
    the r most salient are centroids; in descending saliency each takes its nearest free experts, up to C in a group
    theta_C = sum_{e in C} s_e theta_e / sum_{e in C} s_e,   neurons permuted to those of the centroid

Only the rows of the centroids stay in the router. Most experts stay alone, few groups are large: "pseudo-pruning".
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from espalier.checkpoints.shape import ModelShape
from espalier.collecting.stats import Stats
from espalier.errors import UserError
from espalier.methods.budget import survivors
from espalier.methods.evidence import Evidence, inner_activations
from espalier.methods.grouping import group_counts, merge_groups
from espalier.methods.m_smoe import neuron_rows
from espalier.methods.matching import Targets, by_weights_and_activations
from espalier.methods.merge_rules import with_neurons
from espalier.methods.options import one_of, whole_number
from espalier.methods.ranking import mean
from espalier.methods.similarity import Floats, cosine_distances, distances
from espalier.plans.operations import ROUTERS
from espalier.plans.plan import Plan
from espalier.plans.plan_tensors import PlanTensor

if TYPE_CHECKING:
    from espalier.models.experts import ExpertWeights

WHERE = "conf/method/ream.yaml"
UNUSED = 0.5  # an expert of saliency 0 gets the least of the others, at most this (the paper's code)


@dataclass(frozen=True)
class Ream:
    """Merge experts into the r most salient.

    The paper compresses one layer after the other and observes each with those before it merged; here all layers are
    planned from one calibration of the whole model. Other departures: the saliency uses the weights that the model's
    router gives; z_e is the mean over the tokens that chose e, weighted as the model does, where the paper's code
    takes the softmax over all tokens; neurons are compared by all their weights, not by 64 principal components, and
    by their activations on the same tokens (the code draws other tokens for each expert).
    `group_size` is C, the centroid among them. `align="none"` leaves neurons where they are.
    """

    ratio: float
    group_size: int = 16
    align: str = "activations_and_weights"
    router: str = "slice"

    def __post_init__(self) -> None:
        whole_number("ream", "group_size", self.group_size, 2)
        one_of("ream", "align", self.align, ("activations_and_weights", "none"))
        one_of("ream", "router", self.router, ROUTERS)

    @property
    def probes(self) -> tuple[str, ...]:
        return ("output_norm", "routed_moments", "logit_gram", *(("inputs",) if self.reads_weights else ()))

    @property
    def reads_weights(self) -> bool:
        return self.align != "none"

    def check(self, shape: ModelShape, tokens: int) -> None:
        """Raise UserError for a ratio or a group size that does not fit the model."""
        kept = survivors(self.ratio, shape, WHERE)
        if kept * self.group_size < shape.experts:
            raise UserError(
                f"{WHERE}: {kept} groups of at most group_size={self.group_size} cannot hold {shape.experts} experts. "
                f"Use group_size >= {-(-shape.experts // kept)}."
            )

    def plan(self, stats: Stats, shape: ModelShape, experts: "ExpertWeights | None" = None) -> Plan:
        """Evidence per layer: the centroid of each group, the experts' saliency, the groups' counts."""
        self.check(shape, stats.tokens)
        kept = survivors(self.ratio, shape, WHERE)
        layers, evidence = {}, {}
        tensors: dict[str, PlanTensor] = {}
        for layer, norms in stats.layers("output_norm"):
            saliency = filled(mean(norms["gate_norm_sum"], norms["counts"]))
            groups = pseudo_groups(saliency, self.apart(layer, stats, shape), kept, self.group_size, shape.groups)
            merge = merge_groups(groups, saliency, self.router)
            centroids = [next(g[0] for g in groups if g[0] in group) for group in merge.groups]
            if self.router == "slice":
                merge = replace(merge, rows=tuple(centroids))
            if self.align != "none":
                targets = PlanTensor.later(
                    "I32",
                    (shape.experts, shape.width),
                    lambda layer=layer, groups=merge.groups, centroids=centroids: aligned(  # type: ignore[misc]
                        Evidence(stats, shape, experts), layer, groups, centroids
                    ),
                )
                merge, own = with_neurons(merge, layer, targets)
                tensors |= own
            layers[layer] = (merge,)
            evidence[layer] = {
                "centroids": centroids,
                "saliency": saliency.tolist(),
                "group_counts": group_counts(merge, norms["counts"]),
            }
        return Plan({"name": "ream"} | asdict(self), layers, evidence, tensors=tensors)

    @staticmethod
    def apart(layer: int, stats: Stats, shape: ModelShape) -> Floats:
        """Return 1 - sim [E, E]."""
        added = stats.layer("routed_moments", layer)["gate_sum_outputs"].astype(np.float64)
        logits = np.sqrt(2 * distances("router_logits", "cosine", layer, stats, shape))
        largest = float(logits.max())
        return np.asarray((cosine_distances(added) / 2 + logits / (largest or 1)) / 2)


def filled(saliency: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the saliencies [E] with a small one for experts that no token chose, so that they may be merged."""
    used = saliency[saliency > 0]
    return np.where(saliency > 0, saliency, min(UNUSED, float(used.min())) if len(used) else 1.0)


def pseudo_groups(saliency: NDArray[Any], apart: Floats, number: int, size: int, router_groups: int) -> list[list[int]]:
    """Return `number` groups, each with its centroid first, then the members that it took, nearest first.

    `apart` [E, E]: distances. Each router group has the same number of centroids. Ties go to the lower expert.
    """
    by_group = saliency.reshape(router_groups, -1)
    best = np.argsort(-by_group, axis=1, kind="stable")[:, : number // router_groups]
    centroids = (best + by_group.shape[1] * np.arange(router_groups)[:, None]).ravel()
    ordered = sorted(centroids.tolist(), key=lambda e: (-saliency[e], e))
    free = set(range(len(saliency))) - set(ordered)
    groups = []
    for centroid in ordered:
        taken = sorted(free, key=lambda e: (apart[centroid, e], e))[: size - 1]
        groups.append([centroid, *taken])
        free -= set(taken)
    return groups


def aligned(evidence: Evidence, layer: int, groups: Sequence[Sequence[int]], centroids: Sequence[int]) -> Targets:
    """Return the neuron of its group's centroid that each expert's neuron goes to, int32 [E, F]."""
    shape = evidence.shape
    targets = np.tile(np.arange(shape.width, dtype=np.int32), (shape.experts, 1))
    hidden = evidence.stats.layer("inputs", layer)["hidden"]
    for group, centroid in zip(groups, centroids, strict=True):
        if len(group) == 1:
            continue
        (inner,) = inner_activations(evidence, layer, [centroid], hidden)
        rows = neuron_rows(evidence, layer, centroid)
        for expert in group:
            if expert != centroid:
                (other,) = inner_activations(evidence, layer, [expert], hidden)
                other_rows = neuron_rows(evidence, layer, expert)
                targets[expert] = by_weights_and_activations((rows, other_rows), (inner, other))
    return targets
