"""The experts of a checkpoint for methods that look at weights: one MoE block in memory at a time.

Shapes: T tokens, E experts, D hidden, F expert width.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from espalier import runtime
from espalier.checkpoint import Checkpoint
from espalier.neurons import by_neuron
from espalier.observe import expert_output, inner_activation
from espalier.weights import WeightMap


class ExpertWeights:
    """Routers and experts of a checkpoint, read when they are asked for, in fp32; opening it reads no weight.

    UserError when the files lack a tensor or hold NaN or infinity.
    """

    def __init__(self, directory: Path) -> None:
        self.checkpoint = Checkpoint(directory)
        self.family = self.checkpoint.family
        self._model: Any = None
        self.block = lru_cache(maxsize=1)(self._block)

    def router(self, layer: int) -> Tensor:
        """Return the router's weight, float32 [E, D]."""
        name = next(iter(self.family.router_tensors(layer)))
        return self.checkpoint.finite_tensor(name).float()

    def correction(self, layer: int) -> Tensor | None:
        """Return what the router adds to the scores it chooses by, not to weights, float32 [E]; None if nothing."""
        names = [name for name in self.family.router_tensors(layer) if name.endswith("correction_bias")]
        return self.checkpoint.finite_tensor(names[0]).float().reshape(-1) if names else None

    @property
    def margin(self) -> float:
        """Relative distance to the largest logit within which Phi-3.5-MoE's router weighs rivals; 0 elsewhere."""
        return 2 * float(self.checkpoint.config.get("router_jitter_noise", 0.01))

    def expert_map(self, layer: int) -> list[int] | None:
        """Return the stored expert of each router row of a merged checkpoint, None where they are the same."""
        name = self.family.expert_map_tensor(layer)
        if name not in self.checkpoint.entries:
            return None
        found: list[int] = self.checkpoint.tensor(name).tolist()
        return found

    def neurons(self, layer: int, expert: int) -> dict[str, Tensor]:
        """Return an expert's matrices with a row for each neuron, float32: `gate`, `up` and `down` [F, D].

        `down` is the transposed down projection. Biases of neurons are left out.
        """
        family = self.family
        if family.stacked:
            tensors = [self.checkpoint.rows(name, expert)[0] for name in family.stacked_tensors(layer)]
        else:
            tensors = [self.checkpoint.finite_tensor(name) for name in family.expert_tensors(layer, expert)]
        found: dict[str, Tensor] = {}
        for tensor, axis in zip(tensors, family.neurons, strict=True):
            if axis is None or tensor.dim() < 2:
                continue
            rows = by_neuron(tensor, axis).float()  # [F, 1 or 2, D]
            names = (
                ("down",) if axis.down else ("gate", "up") if axis.fold != "one" else (("up",), ("gate",))[not found]
            )
            found |= {name: rows[:, n] for n, name in enumerate(names)}
        return found

    def _block(self, layer: int) -> "Block":
        """Return the experts of a layer, loaded; the one asked for before is forgotten."""
        if self._model is None:
            self._model = runtime.skeleton(self.checkpoint.directory, torch.float32)
            self._map = WeightMap(self._model, self.checkpoint)
            self._names = {module: name for name, module in self._model.named_modules()}
        experts = getattr(runtime.decoder(self._model).layers[layer], self.family.module).experts
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
