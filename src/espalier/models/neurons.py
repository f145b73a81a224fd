"""An expert's tensor seen by its neurons: select them, or make those of a merged expert.

Shapes: F neurons, P entries of each neuron along its dimension (1, or 2 where gate and up share a tensor).
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from espalier.families import NeuronAxis


def by_neuron(tensor: Tensor, axis: NeuronAxis) -> Tensor:
    """Return one expert's tensor as [F, P, rest]."""
    first = tensor.movedim(axis.dim, 0)
    if axis.fold == "halves":
        return first.reshape(2, -1, *first.shape[1:]).transpose(0, 1)
    return first.reshape(-1, 2, *first.shape[1:]) if axis.fold == "pairs" else first.unsqueeze(1)


def from_neurons(neurons: Tensor, axis: NeuronAxis) -> Tensor:
    """Return the tensor as it lies on disk, for [F, P, rest]."""
    if axis.fold == "halves":
        neurons = neurons.transpose(0, 1)
    return neurons.flatten(0, 1).movedim(0, axis.dim).contiguous()


def select(tensor: Tensor, axis: NeuronAxis, kept: Tensor) -> Tensor:
    """Return the tensor with the neurons `kept` int [F'] of it, in that order; zeros stand for a negative number."""
    rows = by_neuron(tensor, axis)
    found = rows[kept.clamp(min=0).long()]
    found[kept < 0] = 0
    return from_neurons(found, axis)


def combine(members: Iterable[tuple[Tensor, Tensor, float]], axis: NeuronAxis) -> Tensor:
    """Return the tensor of a merged expert, in the dtype of the first member, summed in fp64.

    `members` gives each one's tensor, the neuron of the result [F] that each of its neurons goes to, and its weight:
    a neuron of the result is the weighted mean of those that go to it.
    """
    total = share = None
    dtype = torch.float32
    for tensor, target, weight in members:
        rows = by_neuron(tensor, axis)
        if total is None or share is None:
            dtype = tensor.dtype
            total = torch.zeros(rows.shape, dtype=torch.float64)
            share = torch.zeros(len(rows), dtype=torch.float64)
        total.index_add_(0, target.long(), rows.double().mul_(weight))
        share.index_add_(0, target.long(), torch.full((len(rows),), weight, dtype=torch.float64))
    assert total is not None
    assert share is not None
    total /= share.reshape(-1, *[1] * (total.dim() - 1))
    return from_neurons(total, axis).to(dtype)
