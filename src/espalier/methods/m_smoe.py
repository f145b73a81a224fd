"""M-SMoE: experts join the dominant expert whose router logits are most like theirs.

Li et al., "Merge, Then Compress", ICLR 2024 (arXiv 2310.01334), section 3.2, without its low-rank step and
fine-tuning. With n_e the tokens that chose e and l_e the logits of e over all tokens:

    dominant: the r L experts of largest n_e over all L layers, the most used of each layer among them
    group of e = argmax over dominant d of cos(l_e, l_d)
    theta_C = sum_{e in C} n_e theta_e / sum_{e in C} n_e
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from espalier.checkpoints.shape import ModelShape
from espalier.collecting.stats import Stats
from espalier.methods.budget import global_survivors, survivors
from espalier.methods.evidence import Evidence
from espalier.methods.grouping import group_counts, merge_groups, used
from espalier.methods.matching import Targets, by_weights
from espalier.methods.merge_rules import with_neurons
from espalier.methods.options import one_of
from espalier.methods.similarity import distances
from espalier.plans.operations import ROUTERS
from espalier.plans.plan import Plan
from espalier.plans.plan_tensors import PlanTensor

if TYPE_CHECKING:
    from espalier.models.experts import ExpertWeights

WHERE = "conf/method/m_smoe.yaml"


@dataclass(frozen=True)
class MSmoe:
    """Merge each expert into a dominant one; layers keep different numbers, `ratio` holds over all of them.

    A layer keeps at least what its router picks. `permute="weights"` first permutes the neurons of each member so
    that its matrices lie closest to the dominant expert's (the paper's alignment; its Mixtral script leaves it out,
    which is `none`). `freq_topk="model"` counts the K experts that the model runs, 2 the two largest logits, as the
    paper's code.
    """

    ratio: float
    permute: str = "none"
    freq_topk: str | int = "model"
    router: str = "remap"

    def __post_init__(self) -> None:
        one_of("m_smoe", "permute", self.permute, ("none", "weights"))
        one_of("m_smoe", "freq_topk", self.freq_topk, ("model", 2))
        one_of("m_smoe", "router", self.router, ROUTERS)

    @property
    def probes(self) -> tuple[str, ...]:
        return ("usage", "logit_gram")

    @property
    def reads_weights(self) -> bool:
        return self.permute == "weights"

    @staticmethod
    def apart(layer: int, stats: Stats, shape: ModelShape) -> NDArray[np.float64]:
        """Return 1 - cosine of the experts' logits over all tokens, [E, E]."""
        return distances("router_logits", "cosine", layer, stats, shape)

    def plan(self, stats: Stats, shape: ModelShape, experts: "ExpertWeights | None" = None) -> Plan:
        """Evidence per layer: the dominant expert of each group, and the groups' counts."""
        total = survivors(self.ratio, shape, WHERE) * len(shape.layers)
        counts = {layer: used(stats, layer, self.freq_topk) for layer in shape.layers}
        sizes = global_survivors(counts, shape, total)
        layers, evidence = {}, {}
        tensors: dict[str, PlanTensor] = {}
        for layer, size in sizes.items():
            dominant = np.sort(np.argsort(-counts[layer], kind="stable")[:size])
            groups = joined(self.apart(layer, stats, shape), dominant)
            merge = merge_groups(groups, counts[layer], self.router)
            leaders = [next(e for e in dominant.tolist() if e in group) for group in merge.groups]
            if self.permute == "weights" and size < shape.experts:
                targets = PlanTensor.later(
                    "I32",
                    (shape.experts, shape.width),
                    lambda layer=layer, groups=merge.groups, leaders=leaders: aligned(  # type: ignore[misc]
                        Evidence(stats, shape, experts), layer, groups, leaders
                    ),
                )
                merge, own = with_neurons(merge, layer, targets)
                tensors |= own
            layers[layer] = (merge,)
            evidence[layer] = {"dominant": leaders, "group_counts": group_counts(merge, counts[layer])}
        return Plan({"name": "m_smoe"} | asdict(self), layers, evidence, tensors=tensors)


def joined(apart: NDArray[np.float64], dominant: NDArray[np.int64]) -> list[list[int]]:
    """Return the groups of the `dominant` experts, each with those nearest to it by `apart` [E, E].

    Of equally near ones the lower.
    """
    groups = {e: [e] for e in dominant.tolist()}
    for expert in range(len(apart)):
        if expert not in groups:
            groups[int(dominant[np.argmin(apart[expert, dominant])])].append(expert)
    return list(groups.values())


def aligned(evidence: Evidence, layer: int, groups: Sequence[Sequence[int]], leaders: Sequence[int]) -> Targets:
    """Return the neuron of its leader that each expert's neuron goes to, int32 [E, F], by the weights."""
    targets = np.tile(np.arange(evidence.shape.width, dtype=np.int32), (evidence.shape.experts, 1))
    for group, leader in zip(groups, leaders, strict=True):
        if len(group) == 1:
            continue
        first = neuron_rows(evidence, layer, leader)
        for expert in group:
            if expert != leader:
                targets[expert] = by_weights(first, neuron_rows(evidence, layer, expert))
    return targets


def neuron_rows(evidence: Evidence, layer: int, expert: int) -> NDArray[np.float32]:
    """Return an expert's weights with a row for each neuron: gate, up, down, float32 [F, 3 D]."""
    return np.concatenate([part.numpy() for part in evidence.weights.neurons(layer, expert).values()], axis=1)
