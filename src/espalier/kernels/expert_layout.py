"""How an experts module of transformers stores its weights, and what it computes between its two products.

Nothing is known of families: the module says how its tensors lie (`is_transposed`, `is_concatenated`, `has_bias`,
`has_gate`), and its activation is found by giving it numbers and comparing with the formulas that kernels have.

Shapes: E experts, D hidden, F expert width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
}
KEY = "_espalier_layout"  # in a module's __dict__: the shape of its weights and their layout
OWN = "own"  # an activation that only the module itself can compute


@dataclass(frozen=True)
class ExpertLayout:
    """Sizes, storage and activation of stacked experts.

    `activation` is a key of ACTIVATIONS, `swish` (x sigmoid(alpha x)) or OWN. With a gate the inner activation is
    act(min(gate, limit)) * (clip(up, -limit, limit) + shift); without one it is act(up).
    """

    experts: int  # E
    hidden: int  # D
    width: int  # F
    gated: bool
    transposed: bool  # [E, D, 2F] and [E, F, D] rather than [E, 2F, D] and [E, D, F]
    interleaved: bool  # gate and up neurons take turns rather than lie in two halves
    biased: bool
    normed: bool  # a norm follows the down projection
    activation: str
    alpha: float = 1.0
    limit: float | None = None
    shift: float = 0.0

    @classmethod
    def of(cls, module: Any) -> "ExpertLayout":
        """Return the layout of a module with transformers' experts interface."""
        gated, transposed = bool(module.has_gate), bool(module.is_transposed)
        first = module.gate_up_proj if gated else module.up_proj
        rows, hidden = (first.shape[2], first.shape[1]) if transposed else (first.shape[1], first.shape[2])
        interleaved = gated and not module.is_concatenated
        layout = {
            "experts": int(first.shape[0]),
            "hidden": int(hidden),
            "width": int(rows) // (2 if gated else 1),
            "gated": gated,
            "transposed": transposed,
            "interleaved": interleaved,
            "biased": bool(module.has_bias),
            "normed": bool(getattr(module, "has_post_expert_norm", False)),
        }
        return cls(**layout, **_activation(module, gated, interleaved))  # type: ignore[arg-type]

    @classmethod
    def of_ffn(cls, activation: Any, hidden: int, width: int, *, gated: bool, biased: bool) -> "ExpertLayout":
        """Return the layout of a dense FFN with `activation`, whose projections are matrices of their own."""
        stand_in = SimpleNamespace(
            has_gate=gated,
            act_fn=activation,
            _apply_gate=lambda both: activation(both.chunk(2, dim=-1)[0]) * both.chunk(2, dim=-1)[1],
        )
        return cls(1, hidden, width, gated, False, False, biased, False, **_activation(stand_in, gated, False))

    @property
    def stacks(self) -> tuple[str, str]:
        """Names of the module's stacked weights."""
        return "gate_up_proj" if self.gated else "up_proj", "down_proj"

    def inner(self, projected: Tensor) -> Tensor:
        """Return the inner activations [..., F] for what the first product gives, [..., 2F] or [..., F]."""
        if not self.gated:
            return self.act(projected)
        if self.interleaved:
            return self.combine(projected[..., ::2], projected[..., 1::2])
        return self.combine(*projected.chunk(2, dim=-1))

    def inner_in_place(self, projected: Tensor) -> Tensor:
        """Return what `inner` does, where nobody asks for gradients and nobody else needs what is made on the way."""
        if not self.gated or self.interleaved or self.limit is not None or self.shift:
            return self.inner(projected)
        gate, up = projected.chunk(2, dim=-1)
        return self.act(gate).mul_(up)

    def act(self, x: Tensor) -> Tensor:
        """Return the activation of `x`, elementwise."""
        return x * torch.sigmoid(self.alpha * x) if self.activation == "swish" else ACTIVATIONS[self.activation](x)

    def combine(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return the inner activations of gate and up projections, both [..., F]."""
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(min=-self.limit, max=self.limit)
        return self.act(gate) * (up + self.shift if self.shift else up)


def layout_of(module: Any) -> ExpertLayout:
    """Return the layout of a module with transformers' experts interface, found once: it takes trial computations."""
    known = module.__dict__.get(KEY)
    if known is None or known[0] != module.down_proj.shape:
        known = module.__dict__[KEY] = module.down_proj.shape, ExpertLayout.of(module)
    layout: ExpertLayout = known[1]
    return layout


def own_inner(module: Any, projected: Tensor) -> Tensor:
    """Return what the module itself makes of its first product, [..., F]."""
    found: Tensor = module._apply_gate(projected) if module.has_gate else module.act_fn(projected)
    return found


def inference_inner(module: Any, layout: ExpertLayout, projected: Tensor) -> Tensor:
    """Return the inner activations [R, F] of a module's first product [R, 2F] or [R, F]; without gradients."""
    return own_inner(module, projected) if layout.activation == OWN else layout.inner_in_place(projected)


def _activation(module: Any, gated: bool, interleaved: bool) -> dict[str, Any]:
    """Return the fields of an activation that computes what the module's own does, or OWN."""
    limits, alphas = _numbers(module, "limit", "swiglu_limit"), _numbers(module, "alpha", "swiglu_alpha")
    reach = 3 * max([4.0, *limits])
    sample = torch.linspace(-reach, reach, 127)  # an odd number: gate and up meet in all pairs of signs and sizes
    gate, up = sample.repeat_interleave(len(sample)), sample.repeat(len(sample))
    given = torch.stack([gate, up], dim=-1).flatten(-2) if interleaved else torch.cat([gate, up])
    given = given if gated else sample
    with torch.no_grad(), torch.device("cpu"):
        try:
            wanted = own_inner(module, given)
        except (RuntimeError, TypeError):  # it needs its own width or device
            return {"activation": OWN}
        candidates: list[dict[str, Any]] = [{"activation": name} for name in ACTIVATIONS]
        candidates += [{"activation": "swish", "alpha": alpha} for alpha in alphas]
        ends: list[dict[str, Any]] = [{}, *({"limit": limit} for limit in limits)] if gated else [{}]
        for fields in candidates:
            for end in ends:
                for shift in (0.0, 1.0) if gated else (0.0,):
                    found = {**fields, **end, "shift": shift}
                    trial = ExpertLayout(1, 1, 1, gated, False, interleaved, False, False, **found)
                    if torch.allclose(trial.inner(given), wanted, rtol=1e-5, atol=1e-6):
                        return found
    return {"activation": OWN}


def _numbers(module: Any, *names: str) -> list[float]:
    """Return those of a module's attributes that are numbers."""
    found = [getattr(module, name, None) for name in names]
    return [float(value) for value in found if isinstance(value, (int, float))]
