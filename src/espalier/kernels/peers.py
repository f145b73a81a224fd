"""Other projects' kernels for a MoE block, to be timed beside ours on a GPU: vLLM's and ScatterMoE's.

They stand in transformers' experts interface like our own, under their projects' names. Neither knows skipped picks: an
index of "no expert" is computed as expert 0 with weight 0, as their users would have to. Nothing of them is installed.
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from espalier.kernels.expert_layout import ExpertLayout

Forward = Callable[[Any, Tensor, Tensor, Tensor], Tensor]
MODULES = {"vllm": "vllm.model_executor.layers.fused_moe", "scattermoe": "scattermoe.parallel_experts"}


def register_peers() -> None:
    """Make the names of MODULES known to transformers, in this process."""
    for name, forward in (("vllm", vllm), ("scattermoe", scattermoe)):
        ALL_EXPERTS_FUNCTIONS.register(name, forward)


def unsupported(name: str, layout: ExpertLayout, where: torch.device) -> str | None:
    """Return why a peer cannot run experts of this layout on a device, None if it can."""
    if where.type != "cuda":
        return "runs on a GPU only"
    if importlib.util.find_spec(name) is None:
        return "is not installed"
    plain = layout.gated and not (layout.transposed or layout.interleaved or layout.biased or layout.normed)
    if not plain or layout.activation != "silu" or layout.limit is not None or layout.shift:
        return "is given SwiGLU experts in two halves, without biases, only"
    return None


def vllm(module: Any, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sum [T, D] of experts by vLLM's `fused_experts`; arguments as of `experts_forward`."""
    fused = importlib.import_module(MODULES["vllm"])
    index, weight = _all_run(module, indices, weights)
    given = {"topk_weights": weight.float(), "topk_ids": index.to(torch.int32)}
    output: Tensor = fused.fused_experts(hidden, module.gate_up_proj, module.down_proj, **given)
    return output


def scattermoe(module: Any, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Return the same by ScatterMoE's `parallel_linear`, which sorts rows by expert and scatters them back."""
    parallel = importlib.import_module(MODULES["scattermoe"])
    index, weight = _all_run(module, indices, weights)
    order = parallel.flatten_sort_count(index, module.num_experts)
    first, second = module.gate_up_proj.transpose(1, 2), module.down_proj.transpose(1, 2)
    gate, up = parallel.parallel_linear(hidden, first, index.shape[1], *order, grouped_out=True).chunk(2, dim=-1)
    inner = functional.silu(gate) * up
    output: Tensor = parallel.parallel_linear(inner, second, 1, *order, grouped_in=True, gates=weight.to(hidden.dtype))
    return output


def _all_run(module: Any, indices: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    none = indices >= module.num_experts
    return indices.masked_fill(none, 0), weights.masked_fill(none, 0.0)
