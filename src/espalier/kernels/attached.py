"""Let the modules that Espalier's checkpoints bring use kernels: sparse FFNs, FFNs that tokens skip, merged experts.

The modules' code ships in the checkpoint and knows nothing of this package; here they are given what they ask for. Each
decides at every call: training, other devices and other implementations of experts run as if nothing were attached.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from espalier.kernels import depth_ffn, device, neuron_ffn
from espalier.kernels.expert_layout import ExpertLayout
from espalier.kernels.jit import runs_on
from espalier.kernels.route_plan import NO_SKIP, SkipRule

Routed = tuple[Tensor, Tensor, Tensor]
Views = WeakKeyDictionary[Any, neuron_ffn.NeuronFFN]  # by the module, so that a copy of it gets its own


@dataclass(frozen=True)
class Route:
    """What lies between a router's choice and the stored experts; `expert_map` int [rows] or None."""

    rows: int
    expert_map: Tensor | None
    skip: SkipRule


def attach(model: torch.nn.Module) -> int:
    """Give kernels to the modules of a loaded model that can use them, and return how many these are.

    A sparse FFN runs its units with `neuron_ffn`, a dense one that some tokens skip runs the others with `depth_ffn`.
    A MoE block whose checkpoint maps or skips experts does both in the launch of the route plan, where its experts'
    implementation is `espalier`.
    """
    number = 0
    views: Views = WeakKeyDictionary()
    module: Any
    for module in model.modules():
        if type(module).__name__ == "SparseFFN" and neuron_ffn.unsupported(module, module.up.weight.device) is None:
            module.kernel = partial(_ffn_kernel, views)
            number += 1
        if _finds_tokens(module) and depth_ffn.unsupported(module) is None:
            known = depth_ffn.known(module)
            assert known is not None
            module._depth.kernel = partial(_depth_kernel, *known)
            number += 1
        for name, hook in list(module._forward_pre_hooks.items()):
            original = getattr(hook, "func", None)
            if getattr(original, "__name__", "") == "_route" and (route := _route_of(hook, module)) is not None:
                module._forward_pre_hooks[name] = _fused(hook, route)
                number += 1
    return number


def _ffn_kernel(views: Views, ffn: Any, hidden: Tensor, weights: Tensor) -> Tensor | None:
    if not runs_on(hidden.device):
        found: Tensor = ffn._grouped(hidden, weights)
        return found
    view = views.get(ffn)
    if view is None or view.first.up.data_ptr() != ffn.up.weight.data_ptr():  # moved since
        view = views[ffn] = neuron_ffn.NeuronFFN.of(ffn)
    if not neuron_ffn.worth(view, len(hidden), device.target_of(hidden.device)):
        return None
    return neuron_ffn.forward(view, hidden, weights)


def _finds_tokens(module: Any) -> bool:
    """Whether a module is an FFN that runs some of the tokens that it is given, and asks for a kernel."""
    place: Any = getattr(module, "_depth", None)
    if not hasattr(place, "kernel"):
        return False
    return not place.attends or (place.keeps_all and not hasattr(module, "depth_router"))


def _depth_kernel(
    names: depth_ffn.Names, layout: ExpertLayout, module: Any, states: Tensor, kept: Tensor
) -> Tensor | None:
    if not depth_ffn.runs(module, names, states):
        return None
    place, factor = module._depth, None
    if place.factor is not None and any(hook == place.weigh for hook in module._forward_hooks.values()):
        factor, place.factor = place.factor.flatten(), None  # or the hook would multiply once more
    return depth_ffn.forward(depth_ffn.DenseFFN.of(module, names, layout), states, kept, factor)


def _route_of(hook: Any, experts: Any) -> Route | None:
    """Return what a checkpoint's own hook does, None if the route plan cannot."""
    block, skip = hook.keywords["block"], hook.keywords["skip"]
    if hasattr(block, "constants"):
        return None
    rule = NO_SKIP
    if skip is not None:
        value = {"ratio": "beta", "tail": "beta", "fixed_k": "k"}.get(skip["rule"])
        if value is None or skip.get("factor") or "protect" in skip:
            return None
        rule = SkipRule(skip["rule"], float(skip[value]), float(skip["total"]) if skip["renormalise"] else None)
    mapped = getattr(block, "expert_map", None)
    return Route(experts.num_experts if mapped is None else len(mapped), mapped, rule)


def _runs_espalier(experts: Any) -> bool:
    """Whether Espalier's implementation is what follows, for inference, and nobody else looks at what runs."""
    implementation = experts.config._experts_implementation
    return implementation == "espalier" and not torch.is_grad_enabled() and len(experts._forward_pre_hooks) == 1


def _fused(hook: Callable[[Any, Routed], Routed], route: Route) -> Callable[[Any, Routed], Routed]:
    only_map = route.expert_map if route.skip == NO_SKIP else None

    def before(experts: Any, inputs: Routed) -> Routed:
        hidden, indices, weights = inputs
        experts.espalier_route = None
        if not _runs_espalier(experts):
            return hook(experts, inputs)
        if not runs_on(hidden.device):
            if only_map is not None and hidden.is_cpu:
                return hidden, only_map[indices], weights  # picks of one expert are joined where rows are sorted
            return hook(experts, inputs)
        mapped = route.expert_map
        if mapped is not None and mapped.device != hidden.device:
            mapped = mapped.to(hidden.device)
        experts.espalier_route = Route(route.rows, mapped, route.skip)
        return inputs

    return before
