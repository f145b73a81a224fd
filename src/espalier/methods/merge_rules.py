"""How the members of a group of experts become one expert.

Shapes: T' tokens of the probe `inputs`, E experts, D hidden, F expert width. With c_e how often expert e was chosen:

    frequency       theta_C = sum_{e in C} c_e theta_e / sum_{e in C} c_e          (HC-SMoE, arXiv 2410.08589)
    average         theta_C = 1 / |C| sum_{e in C} theta_e
    fix_dominant    each neuron is averaged with the neuron of the dominant member that it is most correlated with
    zipit           of all the members' neurons the most correlated are averaged until F are left (arXiv 2305.03053)
    least_squares   frequency, and the down projection fitted to the members' mean output on a sample of tokens
                    (MergeMoE, arXiv 2510.14436); routed_least_squares: to what tokens got of the members (`refit`)

The dominant member lies nearest to the centre of its group by the distance that made the groups. Neurons are compared
by their inner activations on the tokens of the sample that chose any member.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.checkpoints.shape import ModelShape
from espalier.errors import UserError
from espalier.methods.evidence import Evidence, chose_any, inner_activations
from espalier.methods.grouping import merge_groups
from espalier.methods.matching import Targets, to_dominant, zipped
from espalier.methods.refit import RIDGES, refitted_down
from espalier.methods.similarity import Floats
from espalier.plans.operations import Merge
from espalier.plans.plan_tensors import PlanTensor

RULES = ("frequency", "average", "fix_dominant", "zipit", "least_squares", "routed_least_squares")
BY_NEURON = ("fix_dominant", "zipit")
ZIP_BYTES = 4 * 2**30  # of the correlations between the neurons of one group

Tensors = dict[str, PlanTensor]


def rule_probes(rule: str) -> tuple[str, ...]:
    """Return the probes that a rule needs beside `usage`."""
    return () if rule in ("frequency", "average") else ("inputs",)


def reads_weights(rule: str) -> bool:
    """Whether a rule looks at weights."""
    return bool(rule_probes(rule))


def check_rule(rule: str, shape: ModelShape, where: str) -> None:
    """Raise UserError, with `where` for the file, when no group of the model's experts can be merged by `rule`."""
    if rule == "routed_least_squares" and "input" in shape.router:
        raise UserError(
            f"{where}: merge={rule} needs a router that weighs outputs; that of {shape.family} weighs inputs. "
            "Use merge=least_squares."
        )
    if rule == "zipit":
        refuse_too_wide(2, shape, "", where)


def merge_by_rule(
    rule: str,
    layer: int,
    groups: Sequence[Sequence[int]],
    counts: NDArray[Any],
    square: Floats,
    router: str,
    evidence: Evidence,
    where: str,
) -> tuple[Merge, Tensors]:
    """Return the merge of a layer's `groups` by one of RULES, and the tensors that it names.

    `counts` [E]: how often each expert was chosen. `square` [E, E]: squared distances between experts, for the
    dominant members. UserError, with `where` for the file, when ZipIt's correlations would not fit into memory.
    """
    weighted = rule == "frequency" or rule in RIDGES
    merge = merge_groups(groups, counts if weighted else None, router)
    if all(len(group) == 1 for group in merge.groups):
        return merge, {}
    if rule in BY_NEURON:
        if rule == "zipit":
            refuse_too_wide(max(map(len, merge.groups)), evidence.shape, f" in layer {layer}", where)
        targets = PlanTensor.later(
            "I32",
            (evidence.shape.experts, evidence.shape.width),
            lambda: neuron_targets(rule, layer, merge.groups, square, evidence),
        )
        return with_neurons(merge, layer, targets)
    if rule in RIDGES:
        fitted = sum(len(group) > 1 for group in merge.groups)
        name = f"{layer}.down"
        tensor = PlanTensor.later(
            "F32",
            (fitted, evidence.shape.width, evidence.shape.hidden),
            lambda: refitted_down(rule, merge, layer, evidence),
        )
        return Merge(merge.groups, merge.weights, router, down=name), {name: tensor}
    return merge, {}


def with_neurons(merge: Merge, layer: int, targets: PlanTensor) -> tuple[Merge, Tensors]:
    """Return the merge by `targets` I32 [E, F], and the tensor by its name."""
    name = f"{layer}.neurons"
    return Merge(merge.groups, merge.weights, merge.router, neurons=name, rows=merge.rows), {name: targets}


def refuse_too_wide(members: int, shape: ModelShape, place: str, where: str) -> None:
    """Raise UserError when the correlations of a group's neurons exceed ZIP_BYTES."""
    needed = 4 * (members * shape.width) ** 2
    if needed > ZIP_BYTES:
        raise UserError(
            f"{where}: merge=zipit needs {needed / 2**30:.0f} GiB for the {members} x {shape.width} neurons of a group"
            f"{place}, at most {ZIP_BYTES / 2**30:.0f} are used. Use merge=fix_dominant or a smaller ratio."
        )


def neuron_targets(
    rule: str, layer: int, groups: Sequence[Sequence[int]], square: Floats, evidence: Evidence
) -> Targets:
    """Return which neuron of its group's expert each expert's neuron goes to, int32 [E, F]."""
    shape = evidence.shape
    targets = np.tile(np.arange(shape.width, dtype=np.int32), (shape.experts, 1))
    arrays = evidence.stats.layer("inputs", layer)
    for group in groups:
        if len(group) == 1:
            continue
        inner = inner_activations(evidence, layer, group, arrays["hidden"][chose_any(arrays, group)])
        own = list(group)
        targets[own] = zipped(inner) if rule == "zipit" else to_dominant(inner, dominant(square, own))
    return targets


def dominant(square: Floats, group: Sequence[int]) -> int:
    """Return the place in `group` of the member nearest to the group's mean: the one of least summed squares.

    For ||v_i - v||^2 = 1/n sum_j ||v_i - v_j||^2 - const. Of equal ones the lower expert.
    """
    return int(np.argmin(square[np.ix_(list(group), list(group))].sum(axis=1)))
