"""Gradients of a MoE block's experts: every product forwards and backwards is a ragged kernel.

With g = dL/dout, rows r of token t and weight w: dL/dw = y . g, dL/dy = w g, dL/dh = (dL/dy) Wd, dL/dWd = (dL/dy)^T h,
then through the activation, which torch differentiates, and dL/dx = sum over a token's rows of (dL/dz) Wz,
dL/dWz = (dL/dz)^T x. What the first product gives is kept, [R, 2F]; matrices that do not train cost no gradients.

Shapes: T tokens, K slots a token, R rows, E experts, D hidden, F expert width.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from espalier.kernels import ragged_matmul, ragged_outer, segment_combine
from espalier.kernels.chooser import Choice
from espalier.kernels.expert_layout import own_inner
from espalier.kernels.ragged import Experts
from espalier.kernels.route_plan import RoutePlan


def differentiable(
    experts: Experts,
    module: Any,
    hidden: Tensor,
    indices: Tensor,
    weights: Tensor,
    plan: RoutePlan,
    choice: Choice,
) -> Tensor:
    """Return the block's output [T, D] as `ragged.run` does, with gradients for all that wants them."""
    layout = experts.layout
    first = getattr(module, layout.stacks[0])
    first_bias = getattr(module, "gate_up_proj_bias" if layout.gated else "up_proj_bias") if layout.biased else None
    down_bias = module.down_proj_bias if layout.biased else None
    down = module.down_proj.transpose(1, 2) if layout.transposed else module.down_proj  # [E, D, F]
    by_neuron = first.transpose(1, 2) if layout.transposed else first  # [E, 2F, D]
    row_weight = _row_weights(indices, weights, plan)
    config = replace(choice.down, split=1)
    z = _Product.apply(hidden, by_neuron, first_bias, plan, config, True)
    h = own_inner(module, z) if experts.own is not None else layout.inner(z)
    y = _Product.apply(h, down, down_bias, plan, config, False)
    if layout.normed:
        y = module.post_expert_norm(y)
    combined: Tensor = _Combine.apply(y, row_weight, plan, hidden.dtype)
    return combined


def _row_weights(indices: Tensor, weights: Tensor, plan: RoutePlan) -> Tensor:
    """Return the rows' weights [R at most], as the plan has them, with gradients for those of slots.

    A row's weight is the sum of those of its token's slots that chose its expert, so that each has its gradient.
    """
    tokens, slots = indices.shape
    row_expert = torch.zeros(tokens * slots, dtype=torch.int64, device=indices.device)
    place = plan.slot_row.long()
    there = place >= 0
    row_expert[place[there]] = indices[there].long()
    token = torch.arange(tokens, device=indices.device)[:, None].expand_as(place)
    row_token = torch.zeros_like(row_expert)
    row_token[place[there]] = token[there]
    same = indices.long()[row_token] == row_expert[:, None]  # [R at most, K]
    return (weights.float()[row_token] * same).sum(1)


def _used(plan: RoutePlan) -> Tensor:
    """Return which of the rows there are, bool [R at most, 1]: the others hold anything, even NaN."""
    rows = torch.arange(len(plan.row_token), device=plan.offsets.device)
    return (rows < plan.offsets[-1])[:, None]


class _Product(torch.autograd.Function):
    """The rows' products with their experts' matrices [E, N, K]; rows beyond R are zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Any, plan: RoutePlan, config: Any, gather: bool) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.plan, ctx.config, ctx.gather = plan, config, gather
        y = ragged_matmul.forward(x, weight, plan, config, bias=bias, gather=gather)[0]
        return y.masked_fill_(~_used(plan), 0.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight, bias = ctx.saved_tensors
        plan, config, gather = ctx.plan, ctx.config, ctx.gather
        (given,) = gradients
        given = given.masked_fill(~_used(plan), 0.0)
        for_x = for_weight = for_bias = None
        if ctx.needs_input_grad[0]:
            rows = ragged_matmul.forward(given, weight.transpose(1, 2), plan, config)
            if gather:  # a token's rows are summed
                for_x = segment_combine.forward(rows, plan, x.dtype, weighted=False)
            else:
                for_x = rows[0].masked_fill_(~_used(plan), 0.0)
        if ctx.needs_input_grad[1]:
            for_weight = ragged_outer.forward(given, x, plan, torch.empty_like(weight), gather=gather)
        if ctx.needs_input_grad[2]:
            ones = given.new_ones(len(given), 1)
            for_bias = ragged_outer.forward(given, ones, plan, bias.new_empty(*bias.shape, 1))[..., 0]
        return for_x, for_weight, for_bias, None, None, None


class _Combine(torch.autograd.Function):
    """The weighted sums of tokens' rows."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, row_weight: Tensor, plan: RoutePlan, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(y, row_weight)
        ctx.plan = plan
        return segment_combine.forward(y[None], replace(plan, row_weight=row_weight), dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        y, row_weight = ctx.saved_tensors
        used = _used(ctx.plan)
        rows = gradients[0].float()[ctx.plan.row_token.long().masked_fill(~used[:, 0], 0)]
        for_y = (rows * row_weight[:, None]).masked_fill(~used, 0.0).to(y.dtype)
        for_weight = (rows * y.float().masked_fill(~used, 0.0)).sum(1)
        return for_y, for_weight, None, None
