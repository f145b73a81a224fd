"""Random merging: HC-SMoE's construction on a random partition, the control of every merging method.

Experts are dealt at random to r groups whose sizes differ by at most one (16 to 8: pairs; 16 to 12: four
pairs and eight single experts), then merged as HC-SMoE does (arXiv 2410.08589): weights by frequency,
router rows kept and mapped to groups:

    theta_C = sum_{e in C} n_e theta_e / sum_{e in C} n_e,   n_e = number of tokens that chose e
"""

from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np

from espalier.checkpoints.shape import ModelShape
from espalier.collecting.stats import Stats
from espalier.methods.budget import survivors
from espalier.methods.grouping import group_counts, merge_groups
from espalier.methods.options import whole_number
from espalier.plans.plan import Plan


@dataclass(frozen=True)
class RandomMerge:
    """Merge experts at random. Each layer draws from its own stream, seeded by (seed, layer index)."""

    ratio: float
    seed: int = 0
    probes: ClassVar[tuple[str, ...]] = ("usage",)

    def __post_init__(self) -> None:
        whole_number("random_merge", "seed", self.seed, 0)

    def plan(self, stats: Stats, shape: ModelShape) -> Plan:
        count = survivors(self.ratio, shape, "conf/method/random_merge.yaml")
        layers, evidence = {}, {}
        for layer, arrays in stats.layers("usage"):
            dealt = np.random.default_rng([self.seed, layer]).permutation(shape.experts)
            merge = merge_groups([group.tolist() for group in np.array_split(dealt, count)], arrays["counts"], "remap")
            layers[layer] = (merge,)
            evidence[layer] = {"group_counts": group_counts(merge, arrays["counts"])}
        return Plan({"name": "random_merge"} | asdict(self), layers, evidence)
