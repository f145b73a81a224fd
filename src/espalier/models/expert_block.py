"""The stacked experts of a MoE block, loaded from its files into transformers' own module to compute with.

Shapes: T tokens, E experts, D hidden, F expert width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from espalier.checkpoints.checkpoint import Checkpoint
from espalier.checkpoints.weights import WeightMap
from espalier.models import runtime
from espalier.models.observe import expert_output, inner_activation


class Blocks:
    """The MoE blocks of a checkpoint, in fp32; only the one that is loaded takes memory."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._model = runtime.skeleton(checkpoint.directory, torch.float32)
        self._map = WeightMap(self._model, checkpoint)
        self._names = {module: name for name, module in self._model.named_modules()}
        self._module = checkpoint.family.module

    def load(self, layer: int) -> "Block":
        """Return the experts of a layer; UserError when the files lack a tensor or hold NaN or infinity."""
        experts = getattr(runtime.decoder(self._model).layers[layer], self._module).experts
        prefix = f"{self._names[experts]}."
        tensors = {
            name: torch.empty(meta.shape, dtype=torch.float32)
            for name, meta in experts.state_dict(prefix=prefix).items()
        }
        with torch.no_grad():
            self._map.fill(tensors)
        return Block(experts, {name.removeprefix(prefix): tensor for name, tensor in tensors.items()})


class Block:
    """The stacked experts of one MoE block."""

    def __init__(self, experts: Any, tensors: dict[str, Tensor]) -> None:
        self._experts = experts
        self._tensors = tensors
        self.number = int(experts.num_experts)  # E

    def inner(self, expert: int, hidden: Tensor) -> Tensor:
        """Return what the down projection of `expert` gets, float32 [T, F], for `hidden` [T, D]."""
        return inner_activation(_Loaded(self._experts, self._tensors), hidden, expert)

    def output(self, expert: int, hidden: Tensor) -> Tensor:
        """Return the unweighted output float32 [T, D] of `expert` on `hidden` [T, D]."""
        return expert_output(_Loaded(self._experts, self._tensors), hidden, expert)

    def merged(self, members: Sequence[int], weights: Sequence[float]) -> "Block":
        """Return a block whose expert 0 has the weighted sums of the members' tensors."""
        tensors = {}
        for name, tensor in self._tensors.items():
            stacked = len(tensor) == self.number
            tensors[name] = (
                torch.einsum("e,e...->...", torch.tensor(weights), tensor[list(members)])[None] if stacked else tensor
            )
        return Block(self._experts, tensors)


class _Loaded:
    """A module of the skeleton with loaded tensors in the place of its own."""

    def __init__(self, module: Any, tensors: dict[str, Tensor]) -> None:
        self.__dict__.update(tensors, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
