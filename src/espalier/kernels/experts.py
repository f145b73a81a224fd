"""transformers' experts implementation `espalier`: on a CPU packed weights, on a GPU ragged kernels.

What neither runs, transformers' own functions do, and a warning says why.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from espalier.kernels import cpu_experts, jit, packed
from espalier.kernels.expert_layout import layout_of

NAME = "espalier"


def register_experts() -> None:
    """Make `experts_implementation="espalier"` known to transformers, in this process."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def experts_forward(module: Any, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sum [T, D] of the experts of a module with transformers' experts interface.

    `hidden` [T, D], `indices` [T, K] and `weights` [T, K] are what a router chose: an index of E, the number of
    experts, means "no expert", and a token may name an expert twice. Has gradients where they are needed. UserError
    for weights that hold no data.
    """
    if hidden.is_cpu and not jit.INTERPRETED:
        on_cpu = _uncompiled if torch.compiler.is_compiling() else _on_cpu
        output: Tensor = on_cpu(module, hidden, indices, weights)
        return output
    layout = layout_of(module)
    try:
        from espalier.kernels import ragged

        reason = ragged.unsupported(layout, hidden.dtype, hidden.device)
    except ImportError as error:
        reason = str(error)
    if reason is None:
        output = ragged.forward(module, layout, hidden, indices, weights)
        return output
    packed.warn_once(module, reason, "grouped_mm")
    output = grouped_mm_experts_forward(module, hidden, indices, weights)
    return output


def _on_cpu(module: Any, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    reason = cpu_experts.unsupported(module)
    if reason is None:
        return cpu_experts.forward(module, hidden, indices, weights)
    packed.warn_once(module, reason, "the module's own loop")
    output: Tensor = type(module).forward.__wrapped__(module, hidden, indices, weights)
    return output


# How many rows an expert has is not known when a graph is made.
_uncompiled = torch.compiler.disable(_on_cpu)
