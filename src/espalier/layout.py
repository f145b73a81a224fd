"""What a plan's operations leave of one MoE block: stored experts, router rows, expert map, skipping; no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from espalier.errors import UserError
from espalier.plan import Keep, Merge, Operation, Skip

Parts = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class BlockLayout:
    """A MoE block after the plan.

    `slots[i]` says of what the stored expert i is the weighted sum: (source expert, weight), in the order of
    summation. `rows` are the source's router rows that stay, in order. `expert_map` gives each row its stored
    expert when a merge remaps; `remap` is also true when the source itself was remapped.
    """

    slots: tuple[Parts, ...]
    rows: tuple[int, ...]
    expert_map: tuple[int, ...] | None = None
    remap: bool = False
    skip: Skip | None = None

    def needs_code(self, experts: int) -> bool:
        """Whether a stock model whose config says `experts` cannot stand for this block."""
        return self.remap or self.skip is not None or not len(self.slots) == len(self.rows) == experts

    def settings(self, renormalise: bool) -> dict[str, Any]:
        """Return the block's entry in config.json for the shipped modelling code."""
        skip = None
        if self.skip is not None:
            skip = {"rule": self.skip.rule, "beta": self.skip.beta, "renormalise": renormalise}
        return {"experts": len(self.slots), "router_experts": len(self.rows), "remap": self.remap, "skip": skip}


def source_layout(experts: int, settings: dict[str, Any] | None) -> BlockLayout:
    """Return the block as it is; `settings` is its entry in the config.json of a checkpoint that Espalier wrote."""
    slots = tuple(((expert, 1.0),) for expert in range(experts))
    if settings is None:
        return BlockLayout(slots, tuple(range(experts)))
    skip = settings["skip"] and Skip(settings["skip"]["beta"], settings["skip"]["rule"])
    return BlockLayout(slots, tuple(range(settings["router_experts"])), None, settings["remap"], skip)


def block_layout(layer: int, source: BlockLayout, operations: Sequence[Operation]) -> BlockLayout:
    """Return what `operations` leave of `source`; expert ids are positions in what the operation before left.

    UserError when an operation follows one that it cannot follow.
    """
    block = source
    for operation in operations:
        if block.skip is not None:
            raise UserError(f"plan, layer {layer}: {operation.op} cannot follow skip; skip comes last, and once.")
        if isinstance(operation, Skip):
            block = replace(block, skip=operation)
        elif block.remap:
            raise UserError(f"plan, layer {layer}: {operation.op} cannot follow a merge with router=remap.")
        elif isinstance(operation, Keep):
            slots = tuple(block.slots[e] for e in operation.experts)
            block = BlockLayout(slots, tuple(block.rows[e] for e in operation.experts))
        else:
            block = _merged(block, operation)
    return block


def _merged(block: BlockLayout, merge: Merge) -> BlockLayout:
    slots = tuple(
        tuple((expert, weight * part) for member, weight in zip(group, weights, strict=True)
              for expert, part in block.slots[member])
        for group, weights in zip(merge.groups, merge.weights, strict=True)
    )  # fmt: skip
    if merge.router == "slice":
        return BlockLayout(slots, tuple(block.rows[group[0]] for group in merge.groups))
    if merge.router == "tie":
        return BlockLayout(tuple(slots[g] for g in merge.expert_map()), block.rows)
    return BlockLayout(slots, block.rows, tuple(merge.expert_map()), remap=True)
