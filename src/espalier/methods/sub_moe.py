"""Sub-MoE: experts merge with the others of their k-means cluster, found for two layers at once.

Li et al., "Sub-MoE", AAAI 2026 (arXiv 2506.23266). Experts are clustered by the cosine between their mean outputs,
jointly over two adjacent layers, so that these two share a number of experts between them. The merge decomposes each
matrix of a cluster's n members together, [W_1 .. W_n] = U S [V_1 .. V_n]^T, and takes U S V^T with the mean of the V_i
weighted by frequency f_i. Without truncation that is the frequency-weighted mean of the matrices themselves:

    U S (sum_i f_i V_i)^T / sum_i f_i = sum_i f_i (U S V_i^T) / sum_i f_i = sum_i f_i W_i / sum_i f_i

so that mean is what is computed; no matrix is decomposed. (Truncation is the paper's further compression of single
experts, which is not done here.)
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np

from espalier.checkpoints.shape import ModelShape
from espalier.collecting.stats import Stats
from espalier.methods.budget import least, survivors
from espalier.methods.grouping import group_counts, merge_groups, used
from espalier.methods.lloyd import kmeans, split
from espalier.methods.options import one_of, whole_number
from espalier.methods.similarity import Floats, distances, vectors
from espalier.plans.operations import ROUTERS
from espalier.plans.plan import Plan

WHERE = "conf/method/sub_moe.yaml"
Groups = list[list[int]]


@dataclass(frozen=True)
class SubMoe:
    """Merge the experts of each cluster; two adjacent layers keep 2 r between them.

    A cluster with experts of both layers is one expert in each: the number of clusters starts at 2 r and falls until
    they leave no more than 2 r; where they leave fewer, the experts farthest from their cluster's mean stay alone. A
    layer keeps at least what its router picks. Of an odd number of layers the last is clustered on its own. The first
    centres are drawn (k-means++), each pair from (seed, index of its first layer): permuting experts may change the
    clusters.
    """

    ratio: float
    seed: int = 0
    freq_topk: str | int = "model"
    router: str = "remap"
    probes: ClassVar[tuple[str, ...]] = ("mean_output", "usage")

    def __post_init__(self) -> None:
        whole_number("sub_moe", "seed", self.seed, 0)
        one_of("sub_moe", "freq_topk", self.freq_topk, ("model", 2))
        one_of("sub_moe", "router", self.router, ROUTERS)

    @staticmethod
    def apart(layer: int, stats: Stats, shape: ModelShape) -> Floats:
        """Return 1 - cosine of the experts' mean outputs, [E, E]: half the squared distances that k-means sees."""
        return distances("expert_output", "cosine", layer, stats, shape)

    def plan(self, stats: Stats, shape: ModelShape) -> Plan:
        """Evidence per layer: the groups' counts."""
        clusters = survivors(self.ratio, shape, WHERE)
        layers, evidence = {}, {}
        for start in range(0, len(shape.layers), 2):
            pair = shape.layers[start : start + 2]
            points = [vectors("expert_output", "cosine", layer, stats, shape) for layer in pair]
            for layer, groups in zip(pair, together(points, clusters, least(shape), [self.seed, pair[0]]), strict=True):
                counts = used(stats, layer, self.freq_topk)
                merge = merge_groups(groups, counts, self.router)
                layers[layer] = (merge,)
                evidence[layer] = {"group_counts": group_counts(merge, counts)}
        return Plan({"name": "sub_moe"} | asdict(self), layers, evidence)


def together(points: Sequence[Floats], clusters: int, floor: int, seed: list[int]) -> list[Groups]:
    """Return groups of the rows of each of `points` [E, n], `clusters` on average and at least `floor` of each."""
    stacked = np.concatenate(points)
    total = clusters * len(points)
    number = total
    while True:
        found = kmeans(stacked, number, seed)
        groups = [own_part(found, layer, len(points[0])) for layer in range(len(points))]
        groups = [split(own, rows, max(floor, len(own))) for own, rows in zip(groups, points, strict=True)]
        excess = sum(map(len, groups)) - total
        if excess <= 0:
            break
        number -= -(-excess // 2)  # a cluster of both layers counts twice
    while sum(map(len, groups)) < total:
        loosest = max(range(len(points)), key=lambda layer: (spread(groups[layer], points[layer]), -layer))
        groups[loosest] = split(groups[loosest], points[loosest], len(groups[loosest]) + 1)
    return groups


def own_part(groups: Groups, layer: int, experts: int) -> Groups:
    """Return the experts of one layer in each of the groups that have any; rows of layers follow each other."""
    parts = [[row - layer * experts for row in group if row // experts == layer] for group in groups]
    return sorted(part for part in parts if part)


def spread(groups: Groups, points: Floats) -> float:
    """Return the largest distance of a point from its group's mean; below 0 where all are alone."""
    many = [points[group] for group in groups if len(group) > 1]
    return max((float(np.linalg.norm(part - part.mean(axis=0), axis=1).max()) for part in many), default=-1.0)
