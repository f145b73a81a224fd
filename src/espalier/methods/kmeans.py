"""K-means merging: experts merge with the others of their k-means cluster, the baseline of hierarchical clustering.

Chen et al., ICML 2025 (arXiv 2410.08589), section 4.3 and appendix: for the vectors v_e that HC-SMoE compares,

    argmin over r clusters of sum_C sum_{e in C} ||v_e - v_C||^2,   v_C = 1 / |C| sum_{e in C} v_e
"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from espalier.checkpoints.shape import ModelShape
from espalier.collecting.stats import Stats
from espalier.methods.budget import survivors
from espalier.methods.evidence import Evidence
from espalier.methods.grouping import group_counts, used
from espalier.methods.lloyd import kmeans
from espalier.methods.merge_rules import RULES, check_rule, merge_by_rule, reads_weights, rule_probes
from espalier.methods.options import one_of, whole_number
from espalier.methods.similarity import DISTANCES, SIMILARITIES, Floats, distances, squares, vectors
from espalier.plans.operations import ROUTERS
from espalier.plans.plan import Plan
from espalier.plans.plan_tensors import PlanTensor

if TYPE_CHECKING:
    from espalier.models.experts import ExpertWeights

WHERE = "conf/method/kmeans.yaml"


@dataclass(frozen=True)
class Kmeans:
    """Merge the experts of each k-means cluster, as many clusters in every layer.

    The keys that `hc_smoe` has mean the same. `distance="cosine"` scales the vectors to length 1 first.
    `init="kmeans++"` draws the first centres, each layer from (seed, layer index): permuting experts may then change
    the clusters. `init="fixed"` starts from the r most used experts and draws nothing. This is plain k-means: the
    paper's code scales each column of its distances before it chooses a cluster, and fails on an empty one.
    """

    ratio: float
    similarity: str = "expert_output"
    distance: str = "euclidean"
    init: str = "kmeans++"
    seed: int = 0
    merge: str = "frequency"
    freq_topk: str | int = "model"
    router: str = "remap"

    def __post_init__(self) -> None:
        one_of("kmeans", "similarity", self.similarity, tuple(SIMILARITIES))
        one_of("kmeans", "distance", self.distance, DISTANCES)
        one_of("kmeans", "init", self.init, ("kmeans++", "fixed"))
        one_of("kmeans", "merge", self.merge, RULES)
        one_of("kmeans", "freq_topk", self.freq_topk, ("model", 2))
        one_of("kmeans", "router", self.router, ROUTERS)
        whole_number("kmeans", "seed", self.seed, 0)

    @property
    def probes(self) -> tuple[str, ...]:
        return (*SIMILARITIES[self.similarity], "usage", *rule_probes(self.merge))

    @property
    def reads_weights(self) -> bool:
        return self.similarity == "weight" or reads_weights(self.merge)

    def check(self, shape: ModelShape, tokens: int) -> None:
        """Raise UserError for a ratio or a merge rule that does not fit the model."""
        survivors(self.ratio, shape, WHERE)
        check_rule(self.merge, shape, WHERE)

    def apart(self, layer: int, stats: Stats, shape: ModelShape, experts: "ExpertWeights | None" = None) -> Floats:
        """Return the distances [E, E] between a layer's experts; `experts` is read for `similarity=weight` only."""
        return distances(self.similarity, self.distance, layer, stats, shape, experts)

    def plan(self, stats: Stats, shape: ModelShape, experts: "ExpertWeights | None" = None) -> Plan:
        """Evidence per layer: the groups' counts, and the sum of squares that k-means makes small."""
        self.check(shape, stats.tokens)
        clusters = survivors(self.ratio, shape, WHERE)
        layers, evidence = {}, {}
        tensors: dict[str, PlanTensor] = {}
        for layer in shape.layers:
            counts = used(stats, layer, self.freq_topk)
            points = vectors(self.similarity, self.distance, layer, stats, shape, experts)
            most_used = np.argsort(-counts, kind="stable")[:clusters]
            groups = kmeans(points, clusters, most_used if self.init == "fixed" else [self.seed, layer])
            found = self.apart(layer, stats, shape, experts)
            merge, own = merge_by_rule(
                self.merge,
                layer,
                groups,
                counts,
                squares(found, self.distance),
                self.router,
                Evidence(stats, shape, experts),
                WHERE,
            )
            layers[layer] = (merge,)
            tensors |= own
            inertia = sum(float(((points[group] - points[group].mean(axis=0)) ** 2).sum()) for group in groups)
            evidence[layer] = {"group_counts": group_counts(merge, counts), "inertia": inertia}
        return Plan({"name": "kmeans"} | asdict(self), layers, evidence, tensors=tensors)
