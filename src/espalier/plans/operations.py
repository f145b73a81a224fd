"""The operations of a plan on one MoE block; imports no torch. Those on a dense FFN: `espalier.plans.split`;
on a decoder layer: `espalier.plans.depth`.

Shapes: E experts, D hidden, F expert width. Expert ids are those of the block that the operation finds.
An operation that needs more than a few numbers names tensors of the plan (`espalier.plans.plan_tensors`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from espalier.checkpoints.shape import ModelShape
from espalier.errors import UserError, nearest
from espalier.plans.depth import Depth, DepthRule
from espalier.plans.narrow_attention import NarrowAttention
from espalier.plans.split import Split, Threshold

ROUTERS = ("remap", "slice", "tie")
SKIP_RULES = {"ratio": "beta", "tail": "beta", "top_p": "p", "fixed_k": "k"}  # with the number that each takes
NO_ATTENTION_WEIGHTS = ("jamba", "minimax", "qwen3_next")  # families with layers that have none

# Tensors that an operation names, with dtype and shape; a size of 0 is any size from 1 on.
Tensors = dict[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Keep:
    """Survivors of a MoE block; the others and their router rows are removed."""

    op: ClassVar[str] = "keep"
    experts: tuple[int, ...]  # source ids, ascending

    def check(self, layer: int, shape: ModelShape) -> None:
        ids = list(self.experts)
        if ids != sorted(set(ids)) or not all(0 <= e < shape.experts for e in ids):
            raise UserError(f"plan, layer {layer}: keep.experts must ascend within 0..{shape.experts - 1}: {ids}.")
        if len(ids) < shape.top_k:
            raise UserError(
                f"plan, layer {layer}: keep leaves {len(ids)} of {shape.experts} experts, but the router picks "
                f"top_k={shape.top_k}. Keep at least {shape.top_k}."
            )
        _check_groups(layer, self.experts, shape, "keep")

    def tensors(self, shape: ModelShape) -> Tensors:
        return {}


@dataclass(frozen=True)
class Merge:
    """Groups of experts, each replaced by one expert that is made of its members.

    `groups` are ordered by their smallest member and ascend inside; `weights[g][i]` belongs to `groups[g][i]`
    and each group's weights sum to 1. `router`: `remap` keeps all router rows and maps expert ids to groups,
    `slice` keeps one row a group, `tie` keeps the file layout and repeats the merged tensors in every member.
    `rows[g]` is the member of `groups[g]` whose row `slice` keeps, by default the smallest; the merged experts are
    then stored in the order of their rows, which is that of the router groups.

    A merged expert is the weighted sum of its members' tensors. `neurons` names a tensor I32 [E, F] that says which
    of the merged expert's neurons each neuron m of expert e goes to: then neuron n is the mean of all that go to n,
    each weighted like its expert (rows of gate and up, columns of down, biases alike); no neuron may stay empty.
    `down` names a tensor F32 [M, F, D], the transposed down projections of the M groups that have more than one
    member, in place of theirs. A group of one stays as it is.
    """

    op: ClassVar[str] = "merge"
    groups: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[float, ...], ...]
    router: str = "remap"
    neurons: str | None = None
    down: str | None = None
    rows: tuple[int, ...] | None = None

    def check(self, layer: int, shape: ModelShape) -> None:
        members = sorted(e for group in self.groups for e in group)
        if members != list(range(shape.experts)):
            raise UserError(f"plan, layer {layer}: merge.groups do not hold each of {shape.experts} experts once.")
        if list(self.groups) != sorted(tuple(sorted(group)) for group in self.groups):
            raise UserError(f"plan, layer {layer}: merge.groups must ascend inside and by their smallest member.")
        if self.router not in ROUTERS:
            raise UserError(f"plan, layer {layer}: merge.router={self.router!r}; {nearest(self.router, [*ROUTERS])}.")
        for group, weights in zip(self.groups, self.weights, strict=True):
            if len(group) != len(weights) or abs(sum(weights) - 1) > 1e-6:
                raise UserError(f"plan, layer {layer}: merge.weights of group {list(group)} do not sum to 1.")
        if self.router == "slice" and len(self.groups) < shape.top_k:
            raise UserError(
                f"plan, layer {layer}: merge with router=slice leaves {len(self.groups)} router rows, but the "
                f"router picks top_k={shape.top_k}. Use router=remap or a smaller ratio."
            )
        if self.rows is not None and (
            self.router != "slice"
            or len(self.rows) != len(self.groups)
            or not all(row in group for row, group in zip(self.rows, self.groups, strict=True))
        ):
            raise UserError(
                f"plan, layer {layer}: merge.rows={list(self.rows)} must name a member of each group; router=slice."
            )
        if self.router == "slice":
            _check_groups(layer, self.kept_rows(), shape, "merge with router=slice")

    def tensors(self, shape: ModelShape) -> Tensors:
        found: Tensors = {}
        if self.neurons is not None:
            found[self.neurons] = ("I32", (shape.experts, shape.width))
        if self.down is not None:
            found[self.down] = ("F32", (sum(len(group) > 1 for group in self.groups), shape.width, shape.hidden))
        return found

    def kept_rows(self) -> tuple[int, ...]:
        """Return the router row of each group that router=slice keeps."""
        return tuple(group[0] for group in self.groups) if self.rows is None else self.rows

    def expert_map(self) -> list[int]:
        """Return the group of each source expert, [E] ints."""
        where = {expert: g for g, group in enumerate(self.groups) for expert in group}
        return [where[e] for e in range(len(where))]


@dataclass(frozen=True)
class Constant:
    """Experts replaced by constant vectors (MoNE, arXiv 2507.00390); the router keeps all its rows.

    `vectors` names a tensor F32 [n, D]: row i is the output, before the routing weight, of `experts[i]`.
    """

    op: ClassVar[str] = "constant"
    experts: tuple[int, ...]  # ascending
    vectors: str

    def check(self, layer: int, shape: ModelShape) -> None:
        ids = list(self.experts)
        if ids != sorted(set(ids)) or not all(0 <= e < shape.experts for e in ids):
            raise UserError(f"plan, layer {layer}: constant.experts must ascend within 0..{shape.experts - 1}: {ids}.")
        if not 0 < len(ids) < shape.experts:
            raise UserError(
                f"plan, layer {layer}: constant replaces {len(ids)} of {shape.experts} experts. Replace one or more, "
                "and leave one."
            )
        if shape.family == "llama4_text":
            raise UserError(
                f"plan, layer {layer}: constant needs a router that weighs outputs; that of {shape.family} weighs "
                "inputs. Use keep or merge."
            )

    def tensors(self, shape: ModelShape) -> Tensors:
        return {self.vectors: ("F32", (len(self.experts), shape.hidden))}


@dataclass(frozen=True)
class Narrow:
    """Neurons kept in each expert; the others are removed from all its matrices.

    `neurons` names a tensor I32 [E, F']: row e lists the neurons of expert e that stay, ascending, then -1 where the
    expert has fewer than F' of them: its file has zeros there.
    """

    op: ClassVar[str] = "narrow"
    neurons: str
    width: int  # F'
    kept: int  # neurons that stay in all experts together

    def check(self, layer: int, shape: ModelShape) -> None:
        if not shape.neuron_parameters:
            raise UserError(f"plan, layer {layer}: narrow cannot be done to family {shape.family}.")
        if not 0 < self.width <= shape.width or not self.width <= self.kept <= self.width * shape.experts:
            raise UserError(
                f"plan, layer {layer}: narrow.width={self.width} and narrow.kept={self.kept} do not fit "
                f"{shape.experts} experts of width {shape.width}."
            )

    def tensors(self, shape: ModelShape) -> Tensors:
        return {self.neurons: ("I32", (shape.experts, self.width))}


def _check_groups(layer: int, rows: Sequence[int], shape: ModelShape, what: str) -> None:
    """Raise UserError when the router, left with `rows` of its experts, cannot choose by groups any more."""
    size = shape.experts // shape.groups
    left = [sum(row // size == group for row in rows) for group in range(shape.groups)]
    if len(set(left)) > 1:
        raise UserError(
            f"plan, layer {layer}: {what} leaves {left} experts in the {shape.groups} router groups. "
            f"Leave the same number in each{', or use router=remap' if 'slice' in what else ''}."
        )
    problem = group_problem(left[0], shape)
    if problem:
        raise UserError(f"plan, layer {layer}: {what} leaves {problem}.")


def group_problem(left: int, shape: ModelShape) -> str:
    """Say what the router misses with `left` experts in each of its groups, if anything."""
    where = f"{left} in each router group, but the router"
    if left < shape.group_least:
        return f"{where} scores a group by its best {shape.group_least}"
    if left * shape.groups_chosen < shape.top_k:
        return f"{where} picks top_k={shape.top_k} from {shape.groups_chosen} of {shape.groups} groups"
    return ""


@dataclass(frozen=True)
class Skip:
    """Dynamic number of experts a token; with w_1 >= ... >= w_K the weights of its experts e_1 .. e_K, `rule` is

    `ratio`: every expert with w_j < beta * w_1 is dropped (NAEE, arXiv 2402.14800, section 3.3, there of two). `factor`
    names a tensor F32 [E, E]: then it is those with w_j < beta * factor[e_1, e_j] * w_1 (DiEP, arXiv 2509.16105).
    `tail`: the smallest i is kept with w_{i+1} + ... + w_K <= beta * (w_1 + ... + w_K) (NAEE, appendix A.2).
    `top_p`: the smallest i, K at most, is kept for which the softmax over all experts gives e_1 .. e_i together p or
    more (arXiv 2403.07652); p = 1 keeps all. `fixed_k`: the first k are kept.

    `protect` is a fraction of the tokens of each sequence that keep all K experts where the whole sequence is run at
    once (ODP, arXiv 2410.06270): the `protected_tokens` of largest ||t_j||_1 times the mean attention that tokens
    i >= j pay to j, averaged over heads, with t_j the block's input. With a cache no later token is protected.

    What remains is scaled to the sum of all K weights where the model renormalises. The rule looks at the router's
    own choice; in a merged block factor[e, f] is of the stored experts that the choices became, in one whose layers
    differ in size the tensor has room for the largest.
    """

    op: ClassVar[str] = "skip"
    beta: float | None = None
    rule: str = "ratio"
    p: float | None = None
    k: int | None = None
    factor: str | None = None
    protect: float | None = None

    def check(self, layer: int, shape: ModelShape) -> None:
        where = f"plan, layer {layer}: skip"
        if self.rule not in SKIP_RULES:
            raise UserError(f"{where}.rule={self.rule!r}; known: {', '.join(SKIP_RULES)}.")
        if shape.top_k < 2:
            raise UserError(f"{where} has nothing to leave out, the router picks top_k={shape.top_k}.")
        needed = SKIP_RULES[self.rule]
        for name in ("beta", "p", "k"):
            if (getattr(self, name) is not None) != (name == needed):
                raise UserError(
                    f"{where}.{name}={getattr(self, name)}: rule {self.rule} takes {needed}, and that only."
                )
        if self.factor is not None and self.rule != "ratio":
            raise UserError(f"{where}.factor belongs to rule ratio, not to {self.rule}.")
        if self.beta is not None and not 0 <= self.beta <= (1 if self.factor is None else float("inf")):
            raise UserError(f"{where}.beta={self.beta} lies outside 0..1.")
        if self.p is not None and not 0 < self.p <= 1:
            raise UserError(f"{where}.p={self.p} lies outside 0..1, or is 0.")
        if self.p is not None and not shape.router.startswith("softmax"):
            raise UserError(f"{where}.rule=top_p needs a softmax router; that of {shape.family} is {shape.router}.")
        if self.k is not None and not (isinstance(self.k, int) and 1 <= self.k <= shape.top_k):
            raise UserError(f"{where}.k={self.k} is not a whole number in 1..top_k={shape.top_k}.")
        if self.protect is not None:
            if not 0 < self.protect <= 1:
                raise UserError(f"{where}.protect={self.protect} lies outside 0..1, or is 0.")
            if shape.family in NO_ATTENTION_WEIGHTS:
                raise UserError(
                    f"{where}.protect needs attention weights in every layer; {shape.family} has layers without. "
                    "Skip without protect."
                )

    def tensors(self, shape: ModelShape) -> Tensors:
        return {} if self.factor is None else {self.factor: ("F32", (shape.experts, shape.experts))}


def protected_tokens(fraction: float, tokens: int) -> int:
    """Return how many of a sequence's tokens are protected: a part of one counts as one; a lone token is not."""
    return math.ceil(fraction * tokens - 1e-9) if tokens > 1 else 0


BlockOperation = Keep | Merge | Constant | Narrow | Skip  # on a MoE block
DenseOperation = Split | Threshold | NarrowAttention  # on a dense layer
LayerOperation = Depth | DepthRule  # on a decoder layer of either kind of model
Operation = BlockOperation | DenseOperation | LayerOperation
OPERATIONS: dict[str, type[Operation]] = {
    cls.op: cls for cls in (Keep, Merge, Constant, Narrow, Skip, Split, Threshold, NarrowAttention, Depth, DepthRule)
}
