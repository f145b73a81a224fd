"""One MoE block of a checkpoint, loaded alone to be timed, and the inputs that it is given.

Shapes: T tokens, K chosen, E experts, D hidden.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from espalier import families, kernels
from espalier.checkpoints.checkpoint import Checkpoint
from espalier.collecting.stats import Stats
from espalier.errors import UserError
from espalier.kernels import routings
from espalier.kernels.chooser import Work
from espalier.kernels.expert_layout import ExpertLayout
from espalier.models.observe import expert_output
from espalier.models.runtime import moe_blocks
from espalier.models.stream import StreamedModel
from espalier.timing.kernel_settings import KernelBench

Routed = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Inputs:
    """Hidden states [T, D] and a router's choice, int64 [T, K] and [T, K]; the rows of experts that come of it."""

    hidden: Tensor
    indices: Tensor
    weights: Tensor
    work: Work

    @property
    def routed(self) -> Routed:
        """What the experts are called with."""
        return self.hidden, self.indices, self.weights


class LoadedBlock:
    """The experts of one MoE block, with what a checkpoint's own code does before them."""

    def __init__(self, model: Any, block: Any) -> None:
        self.model, self.block, self.experts = model, block, block.experts
        self.layout = ExpertLayout.of(self.experts)
        mapped = getattr(block, "expert_map", None)
        self.rows = int(self.experts.num_experts if mapped is None else len(mapped))  # of the router

    def call(self, implementation: str, inputs: Inputs) -> Tensor:
        """Return the block's output [T, D], without a shared expert, by an experts implementation."""
        if self.experts.config._experts_implementation != implementation:
            self.model.set_experts_implementation(implementation)
        found: Tensor = self.experts(*inputs.routed)
        return found

    def inputs(self, routing: str, tokens: int, trace: Stats | None, layer: int) -> Inputs:
        """Return inputs of a routing (kernels/routings.py); hidden states are drawn, the same each time."""
        down = self.experts.down_proj
        if routing == "trace":
            assert trace is not None
            arrays = trace.layer("routing", layer)
            picks = routings.traced(arrays["experts"], arrays["weights"], tokens)
        else:
            k = int(self.experts.config.num_experts_per_tok)
            picks = routings.draw(routing, tokens, self.rows, min(k, self.rows))
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(tokens, self.layout.hidden, generator=generator).to(down)
        indices, weights = torch.from_numpy(picks.experts).to(down.device), torch.from_numpy(picks.weights).to(down)
        _, stored, _ = self._routed(hidden, indices, weights)
        experts = self.layout.experts
        distinct = torch.zeros(tokens, experts + 1, dtype=torch.bool, device=down.device)
        distinct.scatter_(1, stored.clamp(max=experts), True)
        rows = tuple(distinct[:, :-1].sum(0).tolist())
        return Inputs(hidden, indices, weights, Work(self.layout.hidden, self.layout.width, rows, self.layout.gated))

    def plain_output(self, inputs: Inputs) -> Tensor:
        """Return what `call` should, float32 [T, D], one expert after another in fp32."""
        hidden, indices, weights = self._routed(*inputs.routed)
        out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        wide = _Wide(self.experts)
        for expert in range(self.experts.num_experts):
            token, slot = (indices == expert).nonzero(as_tuple=True)
            if len(token):
                y = expert_output(wide, hidden[token].float(), expert)
                out.index_add_(0, token, y * weights[token, slot, None].float())
        for after in self.experts._forward_hooks.values():  # vectors that stand for experts
            changed = after(self.experts, (hidden, indices, weights), out)
            out = out if changed is None else changed
        return out

    def _routed(self, hidden: Tensor, indices: Tensor, weights: Tensor) -> Routed:
        """Return what the experts get from their checkpoint's own code."""
        inputs = (hidden, indices, weights)
        self.model.set_experts_implementation("eager")  # whose picks nothing else maps or skips
        for hook in self.experts._forward_pre_hooks.values():
            changed = hook(self.experts, inputs)
            inputs = inputs if changed is None else changed
        return inputs


class _Wide:
    """A module whose experts' tensors are in fp32, one at a time."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        return _Rows(found) if isinstance(found, Tensor) and name.endswith(("proj", "bias")) else found


class _Rows:
    """A stacked tensor whose rows are in fp32."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __getitem__(self, expert: int) -> Tensor:
        return self._tensor[expert].float()


def block_layer(directory: Path, bench: KernelBench) -> int:
    """Return the decoder layer whose block is timed; UserError where there is none, or the settings name another."""
    checkpoint = Checkpoint(directory)
    if checkpoint.config.get("model_type") not in families.names() or checkpoint.family.scales_input:
        raise UserError(f"{directory}: has no MoE block whose kernels could be timed. Use kernel=none.")
    layers = list(checkpoint.family.moe_layers(checkpoint.config))
    if bench.layer is None:
        return layers[len(layers) // 2]
    if bench.layer not in layers:
        raise UserError(f"conf/kernel/{bench.name}.yaml: layer={bench.layer} has no MoE block. Use one of {layers}.")
    return bench.layer


@contextlib.contextmanager
def loaded_block(directory: Path, layer: int, dtype: str, place: str) -> Iterator[LoadedBlock]:
    """Load the MoE block of one decoder layer, so that the model may be larger than memory.

    UserError where the checkpoint skips by a rule that looks at more than its experts are given.
    """
    streamed = StreamedModel(directory, dtype, place, prefetch=False)
    with streamed.layer(layer) as part:
        block = moe_blocks(streamed.model, streamed.checkpoint.family)[layer]
        for hook in block.experts._forward_pre_hooks.values():
            skip = getattr(hook, "keywords", {}).get("skip")
            if skip and (skip["rule"] == "top_p" or "protect" in skip):
                raise UserError(
                    f"{directory}: its rule of skipping looks at more than its experts are given, so that kernels "
                    "cannot be timed alone. Use kernel=none and speed=one_thread."
                )
        for parameter in block.experts.parameters():  # stays until the block is left: it may be packed
            del parameter._espalier_meta
        kernels.attach(part)
        yield LoadedBlock(streamed.model, block)
