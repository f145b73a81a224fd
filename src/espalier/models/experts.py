"""The experts of a checkpoint for methods that look at weights: one MoE block in memory at a time.

Shapes: E experts, D hidden, F expert width. Opening a checkpoint imports neither torch nor transformers: a method that
asks for less than a whole block starts at once.
"""

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from espalier.checkpoints.checkpoint import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor

    from espalier.models.expert_block import Block, Blocks


class ExpertWeights:
    """Routers and experts of a checkpoint, read when they are asked for, in fp32; opening it reads no weight.

    UserError when the files lack a tensor or hold NaN or infinity.
    """

    def __init__(self, directory: Path) -> None:
        self.checkpoint = Checkpoint(directory)
        self.family = self.checkpoint.family
        self._blocks: Blocks | None = None
        self.block = lru_cache(maxsize=1)(self._block)

    def router(self, layer: int) -> "Tensor":
        """Return the router's weight, float32 [E, D]."""
        name = next(iter(self.family.router_tensors(layer)))
        return self.checkpoint.finite_tensor(name).float()

    def correction(self, layer: int) -> "Tensor | None":
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

    def neurons(self, layer: int, expert: int) -> "dict[str, Tensor]":
        """Return an expert's matrices with a row for each neuron, float32: `gate`, `up` and `down` [F, D].

        `down` is the transposed down projection. Biases of neurons are left out.
        """
        from espalier.models.neurons import by_neuron

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
        if self._blocks is None:
            from espalier.models.expert_block import Blocks

            self._blocks = Blocks(self.checkpoint)
        return self._blocks.load(layer)
