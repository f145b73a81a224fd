"""What probes share: their contract and sums by expert.

Shapes: T tokens, E experts, K chosen experts a token, D hidden.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from espalier.checkpoints.shape import DenseShape, ModelShape
from espalier.models.observe import BlockTrace
from espalier.models.observe_attention import AttentionTrace
from espalier.models.observe_ffn import FFNTrace

Arrays = dict[str, NDArray[Any]]


class Probe(Protocol):
    """Sums over the tokens of one layer.

    `dense` says that every expert's output on every token is needed. `merged` says that the arrays also
    make sense for a merged checkpoint, whose router has more rows than its block has experts.
    """

    dense: ClassVar[bool]
    merged: ClassVar[bool]

    def __init__(self, shape: ModelShape, tokens: int) -> None: ...

    def update(self, trace: BlockTrace) -> None: ...

    def result(self) -> Arrays: ...

    @staticmethod
    def merge(parts: Sequence[Arrays], tokens: Sequence[int]) -> Arrays:
        """Return the result over all tokens from those over consecutive parts of them, of `tokens` each."""
        ...


class DenseProbe(Protocol):
    """Sums over the tokens of one layer's FFN."""

    def __init__(self, shape: DenseShape, tokens: int) -> None: ...

    def update(self, trace: FFNTrace) -> None: ...

    def result(self) -> Arrays: ...

    @staticmethod
    def merge(parts: Sequence[Arrays], tokens: Sequence[int]) -> Arrays:
        """Return the result over all tokens from those over consecutive parts of them, of `tokens` each."""
        ...


class LayerProbe(Protocol):
    """Sums over the sequences of one decoder layer's attention."""

    def __init__(self) -> None: ...

    def update(self, trace: AttentionTrace) -> None: ...

    def result(self) -> Arrays: ...

    @staticmethod
    def merge(parts: Sequence[Arrays], tokens: Sequence[int]) -> Arrays:
        """Return the result over all tokens from those over consecutive parts of them, of `tokens` each."""
        ...


def added(parts: Sequence[Arrays]) -> Arrays:
    """Merge arrays that are sums over tokens."""
    return {key: np.sum([part[key] for part in parts], axis=0) for key in parts[0]}


def joined(parts: Sequence[Arrays]) -> Arrays:
    """Merge arrays that have a row for each token."""
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def to_numpy(tensor: Tensor) -> NDArray[Any]:
    """Return the tensor's values, from whatever device it is on."""
    array: NDArray[Any] = tensor.cpu().numpy()
    return array


def count_by_expert(indices: Tensor, experts: int) -> NDArray[Any]:
    """Count how often each expert is in `indices` [T, K], int64 [E]; index E stands for no expert."""
    return to_numpy(torch.bincount(indices.flatten(), minlength=experts + 1)[:experts])


def sum_by_expert(indices: Tensor, values: Tensor, experts: int) -> NDArray[Any]:
    """Sum `values` [T, K] by the expert in `indices` [T, K], float64 [E]; index E stands for no expert."""
    return to_numpy(torch.bincount(indices.flatten(), values.double().flatten(), minlength=experts + 1)[:experts])


def sum_outputs(trace: BlockTrace, values: Tensor) -> NDArray[Any]:
    """Sum `values` [T, K, D] by the expert that was chosen, float64 [E, D]."""
    experts = trace.experts.num_experts
    total = torch.zeros(experts + 1, values.shape[-1], dtype=torch.float64, device=values.device)
    for k in range(values.shape[1]):  # one position at a time: a float64 copy of [T, K, D] is large
        total.index_add_(0, trace.indices[:, k], values[:, k].double())
    return to_numpy(total[:experts])
