"""A MoE block's experts on a CPU: packed where that gains, small ones together, else one after another.

Shapes: T tokens, K slots a token, R rows, E experts, D hidden.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from espalier.errors import UserError
from espalier.kernels import grouped, packed
from espalier.kernels.expert_layout import layout_of, own_inner
from espalier.kernels.sorted_rows import weighted_sum

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # of the plain loop


def unsupported(module: Any) -> str | None:
    """Return why `forward` cannot run the module, or None."""
    if packed.KEY in module.__dict__ or module.down_proj.dtype in DTYPES:
        return None
    return f"weights are {str(module.down_proj.dtype).removeprefix('torch.')}"


def forward(module: Any, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Return the experts' weighted sum [T, D] for hidden [T, D], indices [T, K] and weights [T, K].

    An index >= E means "no expert". A token may name an expert twice. Sums are in float32 at least. UserError when the
    weights hold no data, or were changed while they were packed.
    """
    if module.training or _differentiates(module, hidden, weights):
        return plain(module, hidden, indices, weights)
    held: packed.Packed | None = module.__dict__.get(packed.KEY)
    if held is None or not held.current(module):
        held = packed.pack(module)
    if held is not None:
        return held.run(module, hidden, indices, weights)
    if len(hidden) > 1 and indices.numel() <= grouped.TOGETHER * module.num_experts:
        dtype, size = module.down_proj.dtype, module.down_proj.shape[1:].numel()
        if size < packed.least(dtype) and not module.down_proj.is_meta:
            layout = layout_of(module)
            if not grouped.unsupported(layout, dtype):
                return grouped.forward(module, layout, hidden, indices, weights)
    return plain(module, hidden, indices, weights)


def plain(module: Any, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Do what `forward` does with the stacked weights as they are; has gradients."""
    packed.restore(module)
    layout = layout_of(module)
    first, second = (getattr(module, name) for name in layout.stacks)
    if second.is_meta:
        raise UserError(
            f"{type(module).__name__}: its weights hold no data (meta device): they were never loaded, or a module "
            "that shares them has packed them. Load them, or call espalier.kernels.packed.unpack(model) and set "
            "another experts implementation."
        )
    first_bias, second_bias = (getattr(module, f"{name}_bias") if layout.biased else None for name in layout.stacks)

    def product(x: Tensor, stack: Tensor, bias: Tensor | None, expert: int) -> Tensor:
        weight = stack[expert].t() if layout.transposed else stack[expert]
        return functional.linear(x, weight, None if bias is None else bias[expert])

    def run(x: Tensor, expert: int) -> Tensor:
        inner = own_inner(module, product(x, first, first_bias, expert))
        x = product(inner, second, second_bias, expert)
        if layout.normed:
            x = module.post_expert_norm(x)
        return x

    return weighted_sum(run, hidden.to(first.dtype), indices, weights, len(second)).to(hidden.dtype)


@torch.no_grad()
def reference(module: Any, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Return what `forward` does as float64 [T, D]: one token and one slot at a time."""
    names = "gate_up_proj" if module.has_gate else "up_proj", "down_proj"
    first, second = (getattr(module, name).double() for name in names)
    first_bias, second_bias = (
        getattr(module, f"{name}_bias").double() if module.has_bias else [0.0] * len(second) for name in names
    )
    if module.is_transposed:
        first, second = first.mT, second.mT
    norm = (
        copy.deepcopy(module.post_expert_norm).double()
        if getattr(module, "has_post_expert_norm", False)
        else nn.Identity()
    )
    output = torch.zeros_like(hidden, dtype=torch.float64)
    for token, slots in enumerate(indices.tolist()):
        for slot, expert in enumerate(slots):
            if expert < len(second):
                inner = own_inner(module, (first[expert] @ hidden[token].double() + first_bias[expert])[None])[0]
                result = second[expert] @ inner + second_bias[expert]
                output[token] += weights[token, slot].double() * norm(result)
    return output


def _differentiates(module: nn.Module, hidden: Tensor, weights: Tensor) -> bool:
    """Whether the output will have gradients."""
    return torch.is_grad_enabled() and (
        hidden.requires_grad or weights.requires_grad or any(p.requires_grad for p in module.parameters())
    )
