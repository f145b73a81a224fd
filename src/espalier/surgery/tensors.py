"""The tensors of a new checkpoint: which they are, in which shard they go, and how each is made of the source's."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

from espalier.checkpoints.checkpoint import Checkpoint
from espalier.checkpoints.dtypes import TORCH_NAMES
from espalier.checkpoints.shards import OutputTensor
from espalier.errors import UserError
from espalier.families import NeuronAxis
from espalier.plans.layout import BlockLayout, Slot
from espalier.plans.plan_tensors import PlanTensor

if TYPE_CHECKING:
    import torch

Layouts = dict[int, BlockLayout]
Tensors = Mapping[str, PlanTensor]


def outputs(
    checkpoint: Checkpoint, layouts: Layouts, tensors: Tensors
) -> tuple[list[list[OutputTensor]], dict[str, int]]:
    """Return the tensors to write, by source shard, and how many of the source's had which fate.

    A stored expert goes to the shard of its first part. UserError for a tensor that is missing or that the
    family does not know.
    """
    family = checkpoint.family
    experts = {
        name: (layer, expert, part)
        for layer, number in checkpoint.expert_counts.items()
        for expert in range(number)
        for part, name in enumerate(family.expert_tensors(layer, expert))
    }
    stacks = {name: (layer, part) for layer in layouts for part, name in enumerate(family.stacked_tensors(layer))}
    routers = {name: (layer, dim) for layer in layouts for name, dim in family.router_tensors(layer).items()}
    unknown = tuple(prefix for layer in layouts for prefix in family.block_prefixes(layer))
    for name in (*experts, *stacks, *routers):
        if name not in checkpoint.entries:
            raise UserError(f"{checkpoint.directory}: tensor {name} is missing. Download the model again.")
    fates = {"copied": 0, "transformed": 0, "dropped": 0}
    shards: list[list[OutputTensor]] = []
    for file in checkpoint.files:
        shard: list[OutputTensor] = []
        for name in checkpoint.tensors_of(file):
            if name in experts:
                layer, expert, part = experts[name]
                made, fate = _expert_outputs(checkpoint, layouts[layer], layer, expert, part, tensors)
            elif name in stacks:
                layer, part = stacks[name]
                made, fate = _stacked_output(checkpoint, layouts[layer], name, part, tensors)
            elif name in routers:
                layer, dim = routers[name]
                made, fate = _router_outputs(checkpoint, layouts[layer], layer, name, dim, tensors)
            elif name.startswith(unknown):
                raise UserError(f"{checkpoint.directory}: tensor {name} is unknown to family {family.model_type}.")
            else:
                made, fate = [_output(checkpoint, name, name)], "copied"
            if fate == "transformed":
                checkpoint.refuse_stored(name)
            shard += made
            fates[fate] += 1
        shards.append(shard)
    return shards, fates | {"written": sum(map(len, shards))}


def _output(checkpoint: Checkpoint, name: str, source: str) -> OutputTensor:
    entry = checkpoint.entries[source]
    return OutputTensor(name, entry.dtype, entry.shape, lambda: [checkpoint.finite_tensor(source)])


def _expert_outputs(
    checkpoint: Checkpoint, block: BlockLayout, layer: int, expert: int, part: int, tensors: Tensors
) -> tuple[list[OutputTensor], str]:
    """Return the stored tensors that begin with this source tensor, and its fate."""
    family = checkpoint.family

    def read(e: int) -> "torch.Tensor":
        return checkpoint.finite_tensor(family.expert_tensors(layer, e)[part])

    made = []
    for number, slot in enumerate(block.slots):
        if slot.parts[0][0] != expert:
            continue
        name = family.expert_tensors(layer, number)[part]
        output = _output(checkpoint, name, family.expert_tensors(layer, expert)[part])
        if not slot.is_source(expert):
            shape = _narrowed(output.shape, block, family.neurons[part])
            make = partial(_make, slot, read, family.neurons[part], tensors, checkpoint)
            output = dataclasses.replace(output, shape=shape, make=make)
        made.append(output)
    uses = [slot for slot in block.slots if any(e == expert for e, _ in slot.parts)]
    if not uses:
        return made, "dropped"
    return made, "copied" if all(slot.is_source(expert) for slot in uses) else "transformed"


def _stacked_output(
    checkpoint: Checkpoint, block: BlockLayout, name: str, part: int, tensors: Tensors
) -> tuple[list[OutputTensor], str]:
    """Return the tensor of all stored experts, made one expert at a time, and the fate of the source's."""
    entry = checkpoint.entries[name]
    axis = checkpoint.family.neurons[part]

    def make() -> "Iterator[torch.Tensor]":
        for slot in block.slots:
            (tensor,) = _make(slot, lambda e: checkpoint.rows(name, e)[0], axis, tensors, checkpoint)
            yield tensor.unsqueeze(0)

    same = len(block.slots) == entry.shape[0] and all(slot.is_source(e) for e, slot in enumerate(block.slots))
    shape = (len(block.slots), *_narrowed(entry.shape[1:], block, axis))
    return [OutputTensor(name, entry.dtype, shape, make)], "copied" if same else "transformed"


def _narrowed(shape: tuple[int, ...], block: BlockLayout, axis: NeuronAxis | None) -> tuple[int, ...]:
    """Return the shape of one expert's tensor when its neurons are fewer."""
    if block.width is None or axis is None:
        return shape
    sizes = list(shape)
    sizes[axis.dim] = block.width * (1 if axis.fold == "one" else 2)
    return tuple(sizes)


def _make(
    slot: Slot,
    read: "Callable[[int], torch.Tensor]",
    axis: NeuronAxis | None,
    tensors: Tensors,
    checkpoint: Checkpoint,
) -> "list[torch.Tensor]":
    """Return, in a list, one tensor of a stored expert.

    `read` gives that of a source expert, `axis` says where its neurons are.
    """
    import torch

    from espalier.models import neurons

    def row(place: tuple[str, int]) -> "torch.Tensor":
        name, index = place
        return torch.from_numpy(tensors[name].row(index))

    first = read(slot.parts[0][0])
    if slot.down is not None and axis is not None and axis.down:
        tensor = neurons.from_neurons(row(slot.down).unsqueeze(1), axis).to(first.dtype)
    elif slot.neurons and axis is not None:
        members = zip(slot.parts, slot.neurons, strict=True)
        tensor = neurons.combine(((read(e), row(place), weight) for (e, weight), place in members), axis)
    else:
        tensor = _weighted_sum(slot, first, read, checkpoint)
    if slot.kept is not None and axis is not None:
        tensor = neurons.select(tensor, axis, row(slot.kept))
    return [tensor]


def _router_outputs(
    checkpoint: Checkpoint, block: BlockLayout, layer: int, name: str, dim: int, tensors: Tensors
) -> tuple[list[OutputTensor], str]:
    """Return the router's tensor with the rows that stay of `dim`, and its fate.

    With the router's first tensor come those that only the shipped code knows: expert map, constants, skip factor.
    """
    import torch

    output = _output(checkpoint, name, name)
    fate = "copied"
    if block.rows != tuple(range(output.shape[dim])):
        rows = torch.tensor(block.rows)
        shape = list(output.shape)
        shape[dim] = len(rows)
        output = dataclasses.replace(
            output, shape=tuple(shape), make=lambda: [checkpoint.finite_tensor(name).index_select(dim, rows)]
        )
        fate = "transformed"
    made = [output]
    family = checkpoint.family
    if name == next(iter(family.router_tensors(layer))):
        if block.expert_map is not None:
            map_name = family.expert_map_tensor(layer)
            made.append(OutputTensor(map_name, "I64", (len(block.rows),), lambda: [torch.tensor(block.expert_map)]))
        vectors = block.constants[0]
        if vectors is not None:
            dtype = getattr(torch, TORCH_NAMES[output.dtype])
            constants = tensors[vectors]
            made.append(
                OutputTensor(
                    family.constants_tensor(layer),
                    output.dtype,
                    constants.shape,
                    lambda: [torch.from_numpy(constants.read()).to(dtype)],
                )
            )
        if block.skip is not None and block.skip.factor:
            factor, size = tensors[block.skip.factor], len(block.slots)
            made.append(
                OutputTensor(
                    family.skip_factor_tensor(layer),
                    "F32",
                    (size, size),
                    lambda: [torch.from_numpy(factor.read()[:size, :size].copy())],
                )
            )
    return made, fate


def _weighted_sum(
    slot: Slot, tensor: "torch.Tensor", read: "Callable[[int], torch.Tensor]", checkpoint: Checkpoint
) -> "torch.Tensor":
    """Return the sum of the members in fp64, rounded once to the dtype of `tensor`, the first of them."""
    if len(slot.parts) == 1 and slot.parts[0][1] == 1:
        return tensor
    total = tensor.double().mul_(slot.parts[0][1])
    for expert, weight in slot.parts[1:]:
        other = read(expert)
        if other.shape != tensor.shape:
            raise UserError(
                f"{checkpoint.directory}: expert {expert} {list(other.shape)} cannot be merged with expert "
                f"{slot.parts[0][0]} {list(tensor.shape)}."
            )
        total += other.double().mul_(weight)  # not add_(alpha=): fused multiply-add differs by processor
    return total.to(tensor.dtype)
