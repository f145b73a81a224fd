"""A MoE block's experts on a GPU, in four launches: plan, gate and up, down, combine; with gradients.

Shapes: T tokens, K slots a token, R rows, E experts, D hidden, F expert width.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from espalier.kernels import device, ragged_gate_up, ragged_matmul, segment_combine
from espalier.kernels.chooser import Choice
from espalier.kernels.expert_layout import OWN, ExpertLayout, own_inner
from espalier.kernels.jit import runs_on
from espalier.kernels.ragged_gate_up import Weights
from espalier.kernels.route_plan import RoutePlan, plan
from espalier.kernels.tile import TileConfig

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unsupported(layout: ExpertLayout, dtype: torch.dtype, where: torch.device) -> str | None:
    """Return why the kernels cannot run such experts, None if they can."""
    if not runs_on(where):
        return f"Triton does not run on {where.type}"
    if dtype not in DTYPES:
        return f"kernels compute float32, float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    return None


@dataclass(frozen=True)
class Experts:
    """Stacked weights as kernels read them, and what is computed between the two products."""

    layout: ExpertLayout
    first: Weights
    down: Tensor  # [E, D, F], any strides
    down_bias: Tensor | None  # [E, D]
    own: Any = None  # the module whose activation no kernel has, or whose norm follows

    @classmethod
    def of(cls, module: Any, layout: ExpertLayout) -> "Experts":
        """Return views of a module's parameters; nothing is copied."""
        stacked, bias = (
            (module.gate_up_proj, getattr(module, "gate_up_proj_bias", None))
            if layout.gated
            else (module.up_proj, getattr(module, "up_proj_bias", None))
        )
        down = module.down_proj.transpose(1, 2) if layout.transposed else module.down_proj
        own = module if layout.activation == OWN or layout.normed else None
        return cls(
            layout,
            Weights.of(stacked, bias if layout.biased else None, layout),
            down,
            module.down_proj_bias if layout.biased else None,
            own,
        )


def forward(
    module: Any,
    layout: ExpertLayout,
    hidden: Tensor,
    indices: Tensor,
    weights: Tensor,
    *,
    choice: Choice | None = None,
) -> Tensor:
    """Return the weighted sum [T, D] of the chosen experts' outputs, in the dtype of `hidden` [T, D].

    indices int [T, K] and weights [T, K] as a router gives them; what a module's `espalier_route` (`attach`) says of
    merged and skipped experts is done to them. `choice` of tiles, by default the tuned ones, or what the chooser takes
    for as many tokens spread evenly.
    """
    experts = Experts.of(module, layout)
    if choice is None:
        choice = _tuned(module, len(hidden)) or device.choose(layout, len(hidden), indices.shape[1], hidden.device)
    route = getattr(module, "espalier_route", None)
    between = {} if route is None else {"rows": route.rows, "expert_map": route.expert_map, "skip": route.skip}
    found = plan(indices, weights.detach(), layout.experts, choice.down.block_m, **between)
    parameters = [parameter for parameter in module.parameters(recurse=False) if parameter.requires_grad]
    if torch.is_grad_enabled() and (hidden.requires_grad or weights.requires_grad or parameters):
        from espalier.kernels.ragged_autograd import differentiable

        return differentiable(experts, module, hidden, indices, weights, found, choice)
    return run(experts, hidden, found, choice)


def _tuned(module: Any, tokens: int) -> Choice | None:
    """Return the tiles that were tuned (tuning.py) for as many tokens or the next larger number, None if none were."""
    tiles = getattr(module, "espalier_tiles", None)
    if not tiles:
        return None
    found: Choice = tiles[min((number for number in tiles if number >= tokens), default=max(tiles))]
    return found


def run(experts: Experts, hidden: Tensor, found: RoutePlan, choice: Choice) -> Tensor:
    """Return the block's output [T, D] for a plan that is made, without gradients."""
    h = inner(experts, hidden, found, choice.gate_up)
    y = outputs(experts, h, found, choice.down)
    return segment_combine.forward(y, found, hidden.dtype)


def inner(experts: Experts, hidden: Tensor, found: RoutePlan, config: TileConfig) -> Tensor:
    """Return the rows' inner activations [R at most, F]."""
    if experts.layout.activation != OWN:
        return ragged_gate_up.forward(hidden, experts.first, experts.layout, found, config)
    return own_inner(experts.own, projected(experts, hidden, found, config))


def projected(experts: Experts, hidden: Tensor, found: RoutePlan, config: TileConfig) -> Tensor:
    """Return what the first product gives, [R at most, 2F] as the module stores it; without a gate [R at most, F]."""
    module = experts.own
    name = experts.layout.stacks[0]
    weight = getattr(module, name)
    weight = weight.transpose(1, 2) if experts.layout.transposed else weight
    bias = getattr(module, f"{name}_bias") if experts.layout.biased else None
    return ragged_matmul.forward(hidden, weight, found, replace(config, split=1), bias=bias, gather=True)[0]


def outputs(experts: Experts, h: Tensor, found: RoutePlan, config: TileConfig) -> Tensor:
    """Return the rows' outputs [S, R at most, D]."""
    y = ragged_matmul.forward(h, experts.down, found, config, bias=experts.down_bias)
    if not experts.layout.normed:
        return y
    normed: Tensor = experts.own.post_expert_norm(y.sum(0).to(h.dtype))
    return normed[None]
