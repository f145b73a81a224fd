"""What a plan's operations leave of one MoE block: stored experts, router rows, expert map, skipping; no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from espalier.errors import UserError
from espalier.plans.operations import Constant, Keep, Merge, Narrow, Operation, Skip

SKIP_NUMBERS = ("beta", "p", "k", "protect")

Parts = tuple[tuple[int, float], ...]
Row = tuple[str, int]  # a tensor of the plan, and the row that is meant


@dataclass(frozen=True)
class Slot:
    """One stored expert: the weighted sum of source experts `parts`, (id, weight), in the order of summation.

    `neurons` gives, for each of them, the row of the plan that says which neuron of the sum its neurons go to; `down`
    the row that stands for the down projection, `kept` the one that lists the neurons that stay in the end.
    """

    parts: Parts
    neurons: tuple[Row, ...] = ()
    down: Row | None = None
    kept: Row | None = None

    def is_source(self, expert: int) -> bool:
        """Whether the stored expert is the source's `expert`, unchanged."""
        return self == Slot(((expert, 1.0),))


@dataclass(frozen=True)
class BlockLayout:
    """A MoE block after the plan.

    `rows` are the source's router rows that stay, in order. `expert_map` gives each row its stored expert when a
    merge remaps or constants stand for experts (then a number beyond the stored experts is a constant); `remap` is
    also true when the source itself was remapped. `constants` is their tensor's name and number, `width` the number
    of neurons where they were narrowed.
    """

    slots: tuple[Slot, ...]
    rows: tuple[int, ...]
    expert_map: tuple[int, ...] | None = None
    remap: bool = False
    skip: Skip | None = None
    constants: tuple[str | None, int] = (None, 0)
    width: int | None = None

    def needs_code(self, experts: int) -> bool:
        """Whether a stock model whose config says `experts` cannot stand for this block."""
        return self.remap or self.skip is not None or not len(self.slots) == len(self.rows) == experts

    def settings(self, renormalise: bool) -> dict[str, Any]:
        """Return the block's entry in config.json for the shipped modelling code."""
        skip: dict[str, Any] | None = None
        if self.skip is not None:
            given = {name: getattr(self.skip, name) for name in SKIP_NUMBERS if getattr(self.skip, name) is not None}
            skip = {"rule": self.skip.rule, "renormalise": renormalise} | given
            if self.skip.factor is not None:
                skip["factor"] = True
        return {
            "experts": len(self.slots),
            "router_experts": len(self.rows),
            "remap": self.remap,
            "skip": skip,
            "constants": self.constants[1],
            "width": self.width,
        }


def source_layout(experts: int, settings: dict[str, Any] | None) -> BlockLayout:
    """Return the block as it is; `settings` is its entry in the config.json of a checkpoint that Espalier wrote."""
    slots = tuple(Slot(((expert, 1.0),)) for expert in range(experts))
    if settings is None:
        return BlockLayout(slots, tuple(range(experts)))
    skip = settings["skip"] and _source_skip(settings["skip"])
    rows = tuple(range(settings["router_experts"]))
    constants = (None, settings.get("constants", 0))
    return BlockLayout(slots, rows, None, settings["remap"], skip, constants, settings.get("width"))


def _source_skip(settings: dict[str, Any]) -> Skip:
    """Return the operation that a config.json tells of; the factor lies in the checkpoint, and so has no name."""
    given = {name: settings[name] for name in SKIP_NUMBERS if name in settings}
    return Skip(rule=settings["rule"], factor="" if settings.get("factor") else None, **given)


def block_layout(layer: int, source: BlockLayout, operations: Sequence[Operation]) -> BlockLayout:
    """Return what `operations` leave of `source`; expert ids are positions in what the operation before left.

    UserError when an operation follows one that it cannot follow.
    """
    block = source
    for operation in operations:
        if block.skip is not None:
            raise UserError(f"plan, layer {layer}: {operation.op} cannot follow skip; skip comes last, and once.")
        if isinstance(operation, Skip):
            if operation.factor is not None and block.constants[1]:
                raise UserError(f"plan, layer {layer}: skip with a factor cannot follow constant.")
            block = replace(block, skip=operation)
        elif block.remap:
            what = "constant" if block.constants[1] else "a merge with router=remap"
            raise UserError(f"plan, layer {layer}: {operation.op} cannot follow {what}.")
        elif block.width is not None:
            raise UserError(f"plan, layer {layer}: {operation.op} cannot follow narrow.")
        elif isinstance(operation, Keep):
            slots = tuple(block.slots[e] for e in operation.experts)
            block = BlockLayout(slots, tuple(block.rows[e] for e in operation.experts))
        elif isinstance(operation, Constant):
            block = _constants(block, operation)
        elif isinstance(operation, Narrow):
            slots = tuple(replace(slot, kept=(operation.neurons, e)) for e, slot in enumerate(block.slots))
            block = replace(block, slots=slots, width=operation.width)
        elif isinstance(operation, Merge):
            block = _merged(layer, block, operation)
        else:
            raise UserError(f"plan, layer {layer}: {operation.op} is for the FFN of a dense model.")
    return block


def _constants(block: BlockLayout, operation: Constant) -> BlockLayout:
    stays = [e for e in range(len(block.slots)) if e not in operation.experts]
    order = [*stays, *operation.experts]
    expert_map = tuple(order.index(e) for e in range(len(order)))
    constants = (operation.vectors, len(operation.experts))
    return BlockLayout(tuple(block.slots[e] for e in stays), block.rows, expert_map, remap=True, constants=constants)


def _merged(layer: int, block: BlockLayout, merge: Merge) -> BlockLayout:
    if merge.neurons is not None and any(len(slot.parts) > 1 for slot in block.slots):
        raise UserError(f"plan, layer {layer}: merge by neurons cannot follow a merge.")
    slots = []
    refitted = 0
    for group, weights in zip(merge.groups, merge.weights, strict=True):
        if len(group) == 1:
            slots.append(block.slots[group[0]])
            continue
        parts = tuple(
            (expert, weight * part)
            for member, weight in zip(group, weights, strict=True)
            for expert, part in block.slots[member].parts
        )
        neurons = () if merge.neurons is None else tuple((merge.neurons, member) for member in group)
        slots.append(Slot(parts, neurons, None if merge.down is None else (merge.down, refitted)))
        refitted += 1
    if merge.router == "slice":
        ordered = sorted(zip(merge.kept_rows(), slots, strict=True), key=lambda pair: pair[0])
        return BlockLayout(tuple(slot for _, slot in ordered), tuple(block.rows[row] for row, _ in ordered))
    if merge.router == "tie":
        return BlockLayout(tuple(slots[g] for g in merge.expert_map()), block.rows)
    return BlockLayout(tuple(slots), block.rows, tuple(merge.expert_map()), remap=True)
