"""Weights of a MoE block's experts that oneDNN has laid out for its own products on a CPU.

The first call in inference packs a module's stacked weights and drops the originals, so that memory does not double:
the module's parameters are then on the meta device, and its class is a subclass whose every use of them (another
implementation, gradients, `state_dict`, `to`, a copy) first restores them, bit for bit; the next call in inference
packs again. What writes into a parameter that it got from `model.parameters()` must call `unpack` before: it would
write into nothing, which raises at the next call, but for writes through `.data`, which torch does not count.

Shapes: R rows, E experts, D hidden, F expert width.
"""

import functools
import threading
import warnings
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from espalier.errors import UserError
from espalier.kernels.expert_layout import inference_inner, layout_of
from espalier.kernels.sorted_rows import bucket, weighted_sum
from espalier.machine.processor import is_intel

KEY = "_espalier_packed"  # in a module's __dict__: its Packed
PACKABLE = (torch.float32, torch.bfloat16)  # float16 takes CPUs on which its gain was not measured
# Elements of an expert's second weights from which on oneDNN gains more than its calls cost (measured: fp32
# on Zen 4, bf16 on an Intel Xeon with AMX).
LEAST = 1 << 17
# On Intel's processors plain products in float32 are MKL's at their best. Packed ones are up to 1.5 times as fast for 8
# to 32 rows, but read weights for few rows at 0.75 to 1.05 of the speed, by where they lie in memory (measured). So it
# is without AVX-512 (Zen 3): up to 1.46 times as fast for 16 tokens, 0.87 for one and 0.93 for 4,096.
NEVER = 1 << 62
# Elsewhere oneDNN reads packed weights a fifth faster for four rows than for one, two or three (measured, Zen 4).
FAST_ROWS = 4
_LOCK = threading.RLock()  # threads that serve one model meet at the first call


def least(dtype: torch.dtype) -> int:
    """Return from how many elements of an expert's second weights on they are packed on this processor."""
    if dtype not in PACKABLE:
        return 0  # `unpackable` says why
    return NEVER if dtype is torch.float32 and (is_intel() or _narrow()) else LEAST


def fast_rows() -> int:
    """Return for how many rows packed weights are multiplied at least."""
    return 1 if is_intel() else FAST_ROWS


def _narrow() -> bool:
    """Whether torch's own products have vectors of less than 512 bits here."""
    return "AVX512" not in torch.backends.cpu.get_cpu_capability()


def unpack(model: nn.Module) -> None:
    """Give every packed experts module of the model its stacked weights back, bit for bit."""
    for module in model.modules():
        restore(module)


def warn_once(module: Any, reason: str, instead: str) -> None:
    """Say, once for each class of modules and reason, what runs instead of the kernel."""
    _warn(type(module).__name__, reason, instead)


@functools.cache
def _warn(name: str, reason: str, instead: str) -> None:
    warnings.warn(f'experts_implementation="espalier": {name}: {reason}; {instead} runs instead.', stacklevel=2)


class Packed:
    """The weights of one experts module as oneDNN laid them out."""

    def __init__(self, module: Any) -> None:
        self.stock: Any = type(module)
        self.layout = layout_of(module)
        self.dtype: torch.dtype = module.down_proj.dtype
        self.weights: dict[str, list[Tensor]] = {}  # of each stack, one an expert
        self.seen: dict[str, tuple[nn.Parameter, int]] = {}  # the parameters without data, and their versions
        self.product: Any = torch.ops.mkldnn._linear_pointwise.default
        self.first, self.second = self.layout.stacks

    def current(self, module: Any) -> bool:
        """Whether the module's weights still are the packed ones. UserError when a change to them was lost."""
        for name, (parameter, version) in self.seen.items():
            if module._parameters.get(name) is not parameter or not parameter.is_meta:
                return False
            if parameter._version != version:
                raise UserError(
                    f"{type(module).__name__}: {name} was changed in place while its weights were packed, and the "
                    "change is lost. Call espalier.kernels.packed.unpack(model) before changing weights."
                )
        return len(self.seen) == 2

    def inner(self, module: Any, projected: Tensor) -> Tensor:
        """Return the inner activations [R, F] of the first product, [R, 2F] or [R, F]."""
        return inference_inner(module, self.layout, projected)

    def run(self, module: Any, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Return what `forward` does."""
        layout, product = self.layout, self.product
        firsts, seconds = self.weights[self.first], self.weights[self.second]
        first_bias, second_bias = (
            (getattr(module, f"{name}_bias") for name in (self.first, self.second)) if layout.biased else (None, None)
        )

        fast = fast_rows()

        def run(x: Tensor, expert: int) -> Tensor:
            rows = len(x)
            more = max(bucket(rows), fast)
            if more > rows:
                x = functional.pad(x, (0, 0, 0, more - rows))
            bias = None if first_bias is None else first_bias[expert]
            x = self.inner(module, product(x, firsts[expert], bias, "none", (), ""))
            bias = None if second_bias is None else second_bias[expert]
            x = product(x, seconds[expert], bias, "none", (), "")[:rows]
            if layout.normed:
                x = module.post_expert_norm(x)
            return x

        x = hidden if hidden.dtype is self.dtype else hidden.to(self.dtype)  # autocast has other ideas of it
        return weighted_sum(run, x, indices, weights, layout.experts, split=True).to(hidden.dtype)


class PackedModule:
    """What a module's class has before its own while its weights are packed: every use of them restores them."""

    def _apply(self: Any, *args: Any, **kwargs: Any) -> Any:
        return restore(self)._apply(*args, **kwargs)

    def _save_to_state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        return restore(self)._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        return restore(self)._load_from_state_dict(*args, **kwargs)

    def register_parameter(self: Any, *args: Any, **kwargs: Any) -> Any:
        return restore(self).register_parameter(*args, **kwargs)

    def train(self: Any, mode: bool = True) -> Any:
        return restore(self).train(mode) if mode else super().train(mode)  # type: ignore[misc]

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        return restore(self).__reduce_ex__(protocol)


def _use(name: str) -> property:
    def weights(self: Any) -> Any:
        return getattr(restore(self), name)

    return property(weights)


@functools.cache
def _packed_class(stock: type, stacks: tuple[str, ...]) -> type:
    """Return the class of packed modules of the class `stock`."""
    names = {name: getattr(stock, name) for name in ("__module__", "__qualname__", "__doc__")}
    uses = {name: _use(name) for name in stacks}
    return type(stock.__name__, (PackedModule, stock), names | uses)


def pack(module: Any) -> Packed | None:
    """Pack the module's weights, one stack at a time; None where that cannot be, or gains nothing."""
    if KEY not in module.__dict__ and module.down_proj.shape[1:].numel() < least(module.down_proj.dtype):
        return None
    with _LOCK, torch.inference_mode(False), torch.no_grad():
        packed: Packed | None = module.__dict__.get(KEY)
        if packed is not None and packed.current(module):
            return packed  # by another thread, just now
        restore(module)
        if _obstacle(module):
            return None
        packed = Packed(module)
        module.__class__ = _packed_class(packed.stock, (packed.first, packed.second))
        module.__dict__[KEY] = packed
        try:
            for name in (packed.first, packed.second):
                parameter = module._parameters[name]
                stack = parameter.detach().mT if packed.layout.transposed else parameter.detach()
                packed.weights[name] = [torch.ops.mkldnn._reorder_linear_weight(w.contiguous()) for w in stack]
                del stack
                packed.seen[name] = parameter, 0  # from here on an interrupt leaves all that restores it
                _exchange(parameter, torch.empty_like(parameter, device="meta"))
                packed.seen[name] = parameter, parameter._version
        except BaseException:
            restore(module)
            raise
        return packed


def restore(module: Any) -> Any:
    """Return the module, with its class and its stacked weights given back if they were packed."""
    if KEY not in module.__dict__:
        return module
    with _LOCK, torch.inference_mode(False), torch.no_grad():
        packed = module.__dict__.get(KEY)
        if packed is None:
            return module
        for name, (parameter, _) in list(packed.seen.items()):
            if module._parameters.get(name) is parameter and parameter.is_meta:  # else there are other weights by now
                stack = torch.empty_like(parameter, device="cpu")
                rows = stack.mT if packed.layout.transposed else stack
                for row, weight in zip(rows, packed.weights[name], strict=True):
                    row.copy_(weight.to_dense())
                try:
                    _exchange(parameter, stack)
                except RuntimeError:  # something holds on to its tensor
                    module._parameters[name] = nn.Parameter(stack, parameter.requires_grad)
            del packed.seen[name], packed.weights[name]
        module.__class__ = packed.stock
        del module.__dict__[KEY]
    return module


def _exchange(parameter: nn.Parameter, data: Tensor) -> None:
    """Give the parameter other data: it stays the object that an optimizer knows, or a module that shares it."""
    other = nn.Parameter(data, parameter.requires_grad)
    other.__dict__.update(parameter.__dict__)
    torch.utils.swap_tensors(parameter, other)


def _obstacle(module: Any) -> bool:
    """Whether the module's weights cannot be packed; warns of what will not change by itself."""
    stacks = [module._parameters.get(name) for name in layout_of(module).stacks]
    reason = None
    if any(type(stack) is not nn.Parameter for stack in stacks):
        reason = "its weights are not plain parameters"
    elif any(stack.is_meta for stack in stacks):
        return True
    elif hasattr(module, "_hf_hook") or any(hasattr(stack, "_espalier_meta") for stack in stacks):
        reason = "its weights come and go (offloaded or streamed)"
    else:
        reason = unpackable(stacks[0].dtype)
    if reason is not None:
        warn_once(module, reason, "a loop with plain products")
        return True
    return any(_in_use(stack) for stack in stacks)


def _in_use(parameter: Any) -> bool:
    """Whether something beside Python's names knows the parameter's tensor: a graph, a gradient, a hook."""
    hooks = parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None)
    known = parameter._use_count() > 1 or bool(weakref.getweakrefs(parameter))
    return bool(known or hooks or parameter.grad is not None)


@functools.cache
def unpackable(dtype: torch.dtype) -> str | None:
    """Return why this torch and this CPU cannot run packed weights of a dtype, or None: tries it."""
    if dtype not in PACKABLE:
        return f"{_name(dtype)} weights are not packed"
    weight = torch.linspace(-1, 1, 15, dtype=dtype).view(3, 5)
    x = torch.linspace(1, 2, 10, dtype=dtype).view(2, 5)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        found = torch.ops.mkldnn._linear_pointwise.default(x, packed, None, "none", (), "")
        exact = torch.equal(packed.to_dense(), weight)
    except (AttributeError, RuntimeError, TypeError) as error:
        return f"torch {torch.__version__} cannot pack {_name(dtype)} weights here ({str(error).splitlines()[0]})"
    if not exact or not torch.allclose(found, functional.linear(x, weight), rtol=2e-2, atol=2e-2):
        return f"torch {torch.__version__} packs {_name(dtype)} weights wrongly here"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
