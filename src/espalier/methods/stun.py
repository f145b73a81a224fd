"""STUN, stage 1: cluster the experts of each layer by their router rows and leave one for each cluster.

Lee et al., "STUN: Structured-Then-Unstructured Pruning for Scalable MoE Pruning", ACL 2025 (arXiv 2409.06211),
section 4. With W_i the router's row of expert i and a_ij how many tokens chose both i and j,

    b_ij = -lambda1 ||W_i - W_j||_2 / mean + lambda2 a_ij / mean

(each divided by its mean over the pairs of the layer, so that layers compare), clusters merge by complete linkage while
all their pairs are more similar than one threshold for all layers. A cluster leaves the expert that is closest to the
mean of its members' weights; one of fewer than kappa members leaves that mean itself.
"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import pdist, squareform

from espalier.checkpoints.shape import ModelShape
from espalier.collecting.stats import Stats
from espalier.errors import UserError
from espalier.methods.agglomerate import cut, linkage_matrix
from espalier.methods.budget import survivors
from espalier.methods.cluster_budget import by_linkage
from espalier.methods.options import whole_number
from espalier.plans.operations import Keep, Merge, Operation
from espalier.plans.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor

    from espalier.models.experts import ExpertWeights

WHERE = "conf/method/stun.yaml"
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Stun:
    """Leave as many experts over all layers as `ratio` says, in each layer at least what its router needs.

    The paper searches the threshold by bisection until the number of experts is met. Here the merges of all layers are
    ordered by height and the first of them done, which is what a threshold does; of merges of one height, those of the
    lower layer come first, so that the number is met exactly where no threshold would. The paper's code joins the
    closest *pair* and rejects it if its clusters hold a pair beyond the threshold: near to complete linkage, but
    dependent on the threshold.

    An averaged cluster keeps the router row of its lowest expert, where the paper averages rows. `kappa` counts the
    members of a cluster, as the paper says; its code counts the clusters of a layer. Of equally close experts the lower
    id stays; biases are no part of the distance.
    """

    ratio: float
    lambda1: float = 1.0
    lambda2: float = 0.0
    kappa: int = 3
    reads_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for key, value in (("lambda1", self.lambda1), ("lambda2", self.lambda2)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise UserError(f"{WHERE}: {key}={value} is not a number >= 0.")
        if self.lambda1 == self.lambda2 == 0:
            raise UserError(f"{WHERE}: lambda1 and lambda2 are 0, so all experts are alike. Set one above 0.")
        whole_number("stun", "kappa", self.kappa, 0)

    @property
    def probes(self) -> tuple[str, ...]:
        return ("coactivation",) if self.lambda2 else ()

    def check(self, shape: ModelShape, tokens: int) -> None:
        if shape.groups > 1:
            raise UserError(f"{WHERE}: clusters do not respect the {shape.groups} router groups. Use method=reap.")
        if self.lambda2 and shape.top_k < 2:
            raise UserError(f"{WHERE}: lambda2={self.lambda2}, but a token chooses one expert. Set lambda2=0.")
        survivors(self.ratio, shape, WHERE)

    def plan(self, stats: Stats, shape: ModelShape, experts: "ExpertWeights") -> Plan:
        """Evidence per layer: the linkage matrix, the clusters, and the expert that each leaves (null: the mean)."""
        self.check(shape, stats.tokens)
        merges = {
            layer: linkage_matrix(self._distances(layer, stats, experts.router(layer)), "complete")
            for layer in shape.layers
        }
        counts = by_linkage(merges, shape, survivors(self.ratio, shape, WHERE) * len(shape.layers))
        layers, evidence = {}, {}
        for layer in shape.layers:
            clusters = cut(merges[layer], counts[layer])
            left = [self._representative(layer, cluster, experts) for cluster in clusters]
            layers[layer] = _operations(clusters, left, shape)
            evidence[layer] = {"linkage": merges[layer].tolist(), "clusters": clusters, "left": left}
        return Plan({"name": "stun"} | asdict(self), layers, evidence)

    def _distances(self, layer: int, stats: Stats, router: "Tensor") -> Floats:
        """Return -b, [E, E]."""
        found = self.lambda1 * _over_mean(squareform(pdist(router.double().numpy())))
        if self.lambda2:
            found = found - self.lambda2 * _over_mean(stats.layer("coactivation", layer)["counts"])
        return found

    def _representative(self, layer: int, cluster: list[int], experts: "ExpertWeights") -> int | None:
        """Return the expert that stays of a cluster, or None for the mean of its members."""
        if len(cluster) == 1:
            return cluster[0]
        if len(cluster) < self.kappa:
            return None
        if len(cluster) == 2:
            return cluster[0]  # both are equally far from their mean
        total = _parts(experts, layer, cluster[0])
        for expert in cluster[1:]:
            for name, part in experts.neurons(layer, expert).items():
                total[name] += part
        means = {name: part / len(cluster) for name, part in total.items()}
        distances = [
            sum(float((part - means[name]).square().sum()) for name, part in _parts(experts, layer, expert).items())
            for expert in cluster
        ]
        return cluster[int(np.argmin(distances))]


def _parts(experts: "ExpertWeights", layer: int, expert: int) -> dict[str, "Tensor"]:
    return {name: part.double() for name, part in experts.neurons(layer, expert).items()}


def _over_mean(values: NDArray[Any]) -> Floats:
    """Return a symmetric matrix without its diagonal over the mean of its pairs; zeros where that is 0."""
    pairs = values.astype(np.float64)
    np.fill_diagonal(pairs, 0)
    mean = pairs.sum() / (len(pairs) * (len(pairs) - 1))
    return pairs / mean if mean else pairs


def _operations(clusters: list[list[int]], left: list[int | None], shape: ModelShape) -> tuple[Operation, ...]:
    """Keep the representatives and the members of averaged clusters, then average those."""
    groups = [cluster if expert is None else [expert] for cluster, expert in zip(clusters, left, strict=True)]
    groups = sorted(groups)
    kept = tuple(sorted(expert for group in groups for expert in group))
    operations: list[Operation] = []
    if len(kept) < shape.experts or len(kept) == len(groups):
        operations.append(Keep(kept))
    if len(kept) > len(groups):
        position = {expert: n for n, expert in enumerate(kept)}
        merged = tuple(tuple(position[expert] for expert in group) for group in groups)
        operations.append(Merge(merged, tuple((1 / len(group),) * len(group) for group in merged), "slice"))
    return tuple(operations)
