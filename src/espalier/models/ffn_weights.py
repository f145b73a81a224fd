"""The FFNs of a dense checkpoint for methods that look at weights: one layer in memory at a time.

Shapes: T tokens, D hidden, F neurons.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from espalier.checkpoints.checkpoint import Checkpoint


class FFNWeights:
    """The projections of each layer's FFN in fp32, read when they are asked for; opening it reads no weight.

    UserError when the files lack a tensor or hold NaN or infinity.
    """

    def __init__(self, directory: Path) -> None:
        self.checkpoint = Checkpoint(directory)
        self.family = self.checkpoint.dense_family
        self.layer = lru_cache(maxsize=1)(self._layer)

    @property
    def activation(self) -> Any:
        """The activation function of the model."""
        from transformers.activations import ACT2FN

        config = self.checkpoint.config
        return ACT2FN[config.get("hidden_activation") or config.get("hidden_act") or "gelu_pytorch_tanh"]

    def _layer(self, layer: int) -> "FFNLayer":
        names, found = self.family.tensors(layer), {}
        for role, name in names.items():
            found[role] = self.checkpoint.finite_tensor(f"{name}.weight").float()
            if f"{name}.bias" in self.checkpoint.entries:
                found[f"{role}_bias"] = self.checkpoint.finite_tensor(f"{name}.bias").float()
        return FFNLayer(found, self.activation)


class FFNLayer:
    """One FFN: `up` [F, D], `down` [D, F], `gate` [F, D] or None, and their biases or None; all float32."""

    def __init__(self, tensors: dict[str, Tensor], activation: Any) -> None:
        self.up, self.down, self.gate = tensors["up"], tensors["down"], tensors.get("gate")
        self.up_bias, self.gate_bias = tensors.get("up_bias"), tensors.get("gate_bias")
        self.down_bias, self.activation = tensors.get("down_bias"), activation

    @property
    def rows(self) -> Tensor:
        """What tells neurons apart by their input: rows of the gate, where there is one, else of `up`; [F, D]."""
        return self.up if self.gate is None else self.gate

    @torch.no_grad()
    def inner(self, hidden: Tensor) -> Tensor:
        """Return the neurons' activations [T, F] for inputs [T, D]."""
        up = functional.linear(hidden, self.up, self.up_bias)
        if self.gate is None:
            plain: Tensor = self.activation(up)
            return plain
        found: Tensor = self.activation(functional.linear(hidden, self.gate, self.gate_bias)) * up
        return found

    def down_norms(self) -> Tensor:
        """Return ||W_down[:, j]||_2 of each neuron, [F]."""
        norms: Tensor = torch.linalg.vector_norm(self.down, dim=0)
        return norms
