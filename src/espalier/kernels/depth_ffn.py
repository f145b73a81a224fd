"""Run a dense FFN on the tokens that enter it (mixture of depths): factor * FFN(x) for these, zeros for the others.

The rows are those of a route plan with one expert, which tokens that do not enter do not pick: one launch finds the
rows, moves the factors to them and marks the tiles that are not used, which end at once. (`compact` counts tokens in
fewer reads, but would leave factors and tiles to four launches more, and a step of decoding is made of launches.)
Nothing is read back by the host, and grids follow from the number of all tokens.

Shapes: N tokens, D hidden, F neurons.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from espalier import dense_families
from espalier.kernels import device, ragged_gate_up, ragged_matmul, segment_combine
from espalier.kernels.chooser import Choice
from espalier.kernels.expert_layout import OWN, ExpertLayout
from espalier.kernels.jit import runs_on
from espalier.kernels.ragged import DTYPES
from espalier.kernels.ragged_gate_up import Weights
from espalier.kernels.route_plan import plan

Names = tuple[str | None, str, str, str]  # attributes of an FFN: gate (or None), up, down, activation


@dataclass(frozen=True)
class DenseFFN:
    """An FFN's weights as kernels read them; nothing is copied."""

    layout: ExpertLayout
    first: Weights
    down: Tensor  # [1, D, F]
    down_bias: Tensor | None  # [1, D]

    @classmethod
    def of(cls, module: Any, names: Names, layout: ExpertLayout) -> "DenseFFN":
        """Return views of the parameters of a stock FFN, whose `names` and `layout` are those that `known` returns."""
        gate = None if names[0] is None else getattr(module, names[0])
        up, down = getattr(module, names[1]), getattr(module, names[2])
        return cls(layout, Weights.of_ffn(gate, up), down.weight[None], None if down.bias is None else down.bias[None])


@cache
def _names() -> tuple[Names, ...]:
    found = [dense_families.dense_family_of({"model_type": name}) for name in dense_families.names()]
    return tuple(dict.fromkeys((family.gate, family.up, family.down, family.activation) for family in found))


def known(module: Any) -> tuple[Names, ExpertLayout] | None:
    """Return the names and the layout of a stock FFN; None for MoE blocks, other FFNs and those of other layers."""
    parts = {name: child for name, child in module.named_children() if name != "depth_router"}
    for names in _names():
        linear = {name: parts.get(name) for name in names[:3] if name is not None}
        only = parts.keys() <= {*linear, names[3]} and not module._parameters and hasattr(module, names[3])
        if only and all(type(part) is nn.Linear for part in linear.values()):  # a subclass may compute another thing
            gate, up = names[0], getattr(module, names[1])
            return names, ExpertLayout.of_ffn(
                getattr(module, names[3]), up.in_features, up.out_features, gated=gate is not None,
                biased=up.bias is not None,
            )  # fmt: skip
    return None


def unsupported(module: Any) -> str | None:
    """Return why the kernels cannot run an FFN where it is, None if they can."""
    found = known(module)
    if found is None:
        return "is no dense FFN that a family names"
    if found[1].activation == OWN:
        return "no kernel has its activation"
    weight = getattr(module, found[0][1]).weight
    if not runs_on(weight.device):
        return f"Triton does not run on {weight.device.type}"
    return None if weight.dtype in DTYPES else f"kernels compute floats, not {weight.dtype}"


def runs(module: Any, names: Names, states: Tensor) -> bool:
    """Whether the kernels may run a supported FFN for `states` [N, D] now, where nothing looks at its parts."""
    parts = [getattr(module, name) for name in names if name is not None]
    return (
        runs_on(states.device)
        and not (torch.is_grad_enabled() or module.training or torch.is_autocast_enabled(states.device.type))
        and all(type(part) is nn.Linear for part in parts[:-1])
        and all(part.weight.dtype == states.dtype and part.weight.device == states.device for part in parts[:-1])
        and not any(getattr(part, "_forward_hooks", ()) or getattr(part, "_forward_pre_hooks", ()) for part in parts)
    )


def forward(
    ffn: DenseFFN, states: Tensor, kept: Tensor, factor: Tensor | None = None, choice: Choice | None = None
) -> Tensor:
    """Return [N, D]: factor * FFN(states) where `kept` bool [N], zeros elsewhere, for `states` [N, D].

    `factor` [N] is 1 where it is None. `choice` of tiles, or what the chooser takes if all tokens enter.
    """
    if choice is None:
        choice = device.choose(ffn.layout, len(states), 1, states.device)
    index = (~kept).view(torch.uint8)[:, None]  # of the expert that a token picks: there is only number 0
    weights = (kept.float() if factor is None else factor)[:, None]
    found = plan(index, weights, 1, choice.down.block_m, distinct=True)
    h = ragged_gate_up.forward(states, ffn.first, ffn.layout, found, choice.gate_up)
    y = ragged_matmul.forward(h, ffn.down, found, choice.down, bias=ffn.down_bias)
    return segment_combine.forward(y, found, states.dtype)
