"""HC-SMoE: merge experts whose mean outputs are close, by hierarchical clustering.

Chen et al., "Retraining-Free Merging of Sparse MoE via Hierarchical Clustering", ICML 2025
(arXiv 2410.08589), section 3. Over all T calibration tokens, whichever expert the router chose:

    o_e = 1/T sum_t E_e(x_t)          d(e, f) = ||o_e - o_f||_2
    theta_C = sum_{e in C} n_e theta_e / sum_{e in C} n_e,   n_e = number of tokens that chose e

Clusters merge by average linkage until r are left; the router keeps its E rows, which map to clusters.
"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from espalier.checkpoints.shape import ModelShape
from espalier.collecting.stats import Stats
from espalier.errors import UserError
from espalier.methods.agglomerate import LINKAGES, Floats, cut, linkage_matrix
from espalier.methods.budget import survivors
from espalier.methods.cluster_budget import BUDGETS, GLOBAL_BY, by_linkage, by_loss, by_usage, loss_curve
from espalier.methods.evidence import Evidence
from espalier.methods.grouping import group_counts, used
from espalier.methods.merge_rules import RULES, check_rule, merge_by_rule, reads_weights, rule_probes
from espalier.methods.options import one_of
from espalier.methods.similarity import DISTANCES, SIMILARITIES, distances, squares
from espalier.plans.operations import ROUTERS
from espalier.plans.plan import Plan
from espalier.plans.plan_tensors import PlanTensor

if TYPE_CHECKING:
    from espalier.models.experts import ExpertWeights

WHERE = "conf/method/hc_smoe.yaml"


@dataclass(frozen=True)
class HcSmoe:
    """Merge experts that are alike.

    `similarity` and `distance`: see `espalier.methods.similarity`; `merge`: see `espalier.methods.merge_rules`.
    `linkage` is what its name says in the literature; the paper's code differs in two: its `complete` merges
    the farthest pair, its `ward` weighs an un-squared distance. `freq_topk="model"` counts the K experts that
    the model runs, 2 the two largest logits, as the paper's code does for every model.

    `budget="uniform"` leaves r clusters in every layer. The others leave as many in total: `global` with
    `global_by="usage"` gives a layer as many as it has among the r L most used experts of all L layers (the paper's
    code, which may leave a layer none), with `global_by="linkage"` one cut through the dendrograms of all layers;
    `knapsack` the numbers with the least sum of within-cluster losses. A layer keeps at least what its router picks,
    and a ratio that leaves fewer is refused.
    """

    ratio: float
    similarity: str = "expert_output"
    distance: str = "euclidean"
    linkage: str = "average"
    merge: str = "frequency"
    freq_topk: str | int = "model"
    router: str = "remap"
    budget: str = "uniform"
    global_by: str = "usage"

    def __post_init__(self) -> None:
        one_of("hc_smoe", "similarity", self.similarity, tuple(SIMILARITIES))
        one_of("hc_smoe", "distance", self.distance, DISTANCES)
        one_of("hc_smoe", "linkage", self.linkage, tuple(LINKAGES))
        one_of("hc_smoe", "merge", self.merge, RULES)
        one_of("hc_smoe", "freq_topk", self.freq_topk, ("model", 2))
        one_of("hc_smoe", "router", self.router, ROUTERS)
        one_of("hc_smoe", "budget", self.budget, BUDGETS)
        one_of("hc_smoe", "global_by", self.global_by, GLOBAL_BY)
        if self.linkage == "ward" and self.distance != "euclidean":
            raise UserError(
                f"{WHERE}: linkage=ward needs distance=euclidean, not {self.distance}. Use linkage=average."
            )

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
        """Evidence per layer: the whole linkage matrix, the heights on both sides of the cut, groups' counts, and
        the within-cluster loss of the cut (`cluster_budget.loss_curve`).
        """
        self.check(shape, stats.tokens)
        clusters = survivors(self.ratio, shape, WHERE)
        evidence_of = Evidence(stats, shape, experts)
        square, merges, counts = {}, {}, {}
        for layer in shape.layers:
            found = self.apart(layer, stats, shape, experts)
            square[layer] = squares(found, self.distance)
            merges[layer] = linkage_matrix(found, self.linkage)
            counts[layer] = used(stats, layer, self.freq_topk)
        curves = {layer: loss_curve(merges[layer], square[layer], counts[layer]) for layer in shape.layers}
        sizes = self._sizes(merges, counts, curves, shape, clusters)
        layers, evidence = {}, {}
        tensors: dict[str, PlanTensor] = {}
        for layer, size in sizes.items():
            groups = cut(merges[layer], size)
            merge, own = merge_by_rule(
                self.merge, layer, groups, counts[layer], square[layer], self.router, evidence_of, WHERE
            )
            layers[layer] = (merge,)
            tensors |= own
            done = shape.experts - size
            evidence[layer] = {
                "linkage": merges[layer].tolist(),
                "cut_heights": merges[layer][max(done - 1, 0) : done + 1, 2].tolist(),
                "group_counts": group_counts(merge, counts[layer]),
                "loss": float(curves[layer][size]),
            }
        return Plan({"name": "hc_smoe"} | asdict(self), layers, evidence, tensors=tensors)

    def _sizes(
        self,
        merges: dict[int, Floats],
        counts: dict[int, NDArray[Any]],
        curves: dict[int, Floats],
        shape: ModelShape,
        clusters: int,
    ) -> dict[int, int]:
        """Return the number of clusters of each layer."""
        total = clusters * len(merges)
        if self.budget == "knapsack":
            return by_loss(curves, shape, total)
        if self.budget == "global":
            return by_usage(counts, shape, total) if self.global_by == "usage" else by_linkage(merges, shape, total)
        return dict.fromkeys(merges, clusters)
