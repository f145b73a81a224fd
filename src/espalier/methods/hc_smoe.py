"""HC-SMoE: merge experts whose mean outputs are close, by hierarchical clustering.

Chen et al., "Retraining-Free Merging of Sparse MoE via Hierarchical Clustering", ICML 2025
(arXiv 2410.08589), section 3. Over all T calibration tokens, whichever expert the router chose:

    o_e = 1/T sum_t E_e(x_t)          d(e, f) = ||o_e - o_f||_2
    theta_C = sum_{e in C} n_e theta_e / sum_{e in C} n_e,   n_e = number of tokens that chose e

Clusters merge by average linkage until r are left; the router keeps its E rows, which map to clusters.
"""

from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np

from espalier.methods.agglomerate import LINKAGES, cut, linkage_matrix
from espalier.methods.grouping import group_counts, merge_groups
from espalier.methods.options import one_of
from espalier.plan import ROUTERS, Plan, survivors
from espalier.shape import ModelShape
from espalier.stats import Stats


@dataclass(frozen=True)
class HcSmoe:
    """Merge experts of similar mean output, the same number of clusters in every layer.

    `linkage` is what its name says in the literature; the paper's code differs in two: its `complete` merges
    the farthest pair, its `ward` weighs an un-squared distance. `freq_topk="model"` counts the K experts that
    the model runs, 2 the two largest logits, as the paper's code does for every model; it is read where
    `merge="frequency"`. A ratio that leaves fewer clusters than the router picks experts is refused.
    """

    ratio: float
    similarity: str = "expert_output"
    distance: str = "euclidean"
    linkage: str = "average"
    merge: str = "frequency"
    freq_topk: str | int = "model"
    router: str = "remap"
    probes: ClassVar[tuple[str, ...]] = ("mean_output", "usage")

    def __post_init__(self) -> None:
        one_of("hc_smoe", "similarity", self.similarity, ("expert_output",))
        one_of("hc_smoe", "distance", self.distance, ("euclidean",))
        one_of("hc_smoe", "linkage", self.linkage, tuple(LINKAGES))
        one_of("hc_smoe", "merge", self.merge, ("frequency", "average"))
        one_of("hc_smoe", "freq_topk", self.freq_topk, ("model", 2))
        one_of("hc_smoe", "router", self.router, ROUTERS)

    def plan(self, stats: Stats, shape: ModelShape) -> Plan:
        """Evidence per layer: the whole linkage matrix, the heights on both sides of the cut, groups' counts."""
        clusters = survivors(self.ratio, shape, "conf/method/hc_smoe.yaml")
        layers, evidence = {}, {}
        for layer, arrays in stats.layers("mean_output"):
            usage = stats.layer("usage", layer)
            counts = usage["counts" if self.freq_topk == "model" else "top2_counts"]
            merges = linkage_matrix(arrays["all_tokens"].astype(np.float64), self.linkage)
            done = shape.experts - clusters
            merge = merge_groups(cut(merges, clusters), counts if self.merge == "frequency" else None, self.router)
            layers[layer] = (merge,)
            evidence[layer] = {
                "linkage": merges.tolist(),
                "cut_heights": merges[done - 1 : done + 1, 2].tolist(),
                "group_counts": group_counts(merge, counts),
            }
        return Plan({"name": "hc_smoe"} | asdict(self), layers, evidence)
