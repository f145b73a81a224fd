"""Observe the attention weights of a running model's decoder layers, through forward hooks.

Shapes: B sequences, H heads, L tokens.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from espalier.errors import UserError
from espalier.modeling.routed_depth import ROUTER
from espalier.models.runtime import decoder


@dataclass(frozen=True)
class AttentionTrace:
    """What one layer's attention did in one forward pass.

    weights [B, H, L, L]: after the softmax.   mask bool [B, L]: the tokens that count.
    """

    layer: int
    weights: Tensor
    mask: Tensor


class AttentionObserver:
    """Makes an AttentionTrace of each forward pass of one layer's attention and hands it to `consume`."""

    def __init__(self, layer: int, consume: Callable[[AttentionTrace], None]) -> None:
        self.layer, self.consume = layer, consume
        self.calls = 0
        self._mask: Tensor | None = None

    def expect(self, mask: Tensor) -> None:
        """Say which tokens of the next batch count, bool [B, L]."""
        self._mask = mask

    def hook(self, module: nn.Module, args: Any, output: Any) -> None:
        """Hand the trace over; UserError for attention that gives no weights."""
        weights = output[1] if isinstance(output, tuple) else None
        if weights is None or self._mask is None:
            raise UserError(f"model, layer {self.layer}: its attention gives no weights, so it cannot be observed.")
        self.calls += 1
        self.consume(AttentionTrace(self.layer, weights, self._mask.to(weights.device)))


@contextlib.contextmanager
def observe_attention(
    model: Any, layers: Sequence[int], attention: str, consume: Callable[[AttentionTrace], None]
) -> Iterator[list[AttentionObserver]]:
    """Observe the `attention` of `layers` for the duration of the context; call every `expect` before a forward pass.

    The model then computes attention the plain way (`eager`), which differs by rounding. UserError for a layer that
    tokens skip, or that was dropped: maps of some of the tokens say nothing of the layer.
    """
    with contextlib.ExitStack() as undo:
        observers = []
        for layer in layers:
            observer, part = AttentionObserver(layer, consume), decoder(model).layers[layer]
            module = getattr(part, attention, None)
            if module is None or any(hasattr(place, ROUTER) for place in (part, module)):
                raise UserError(
                    f"model, layer {layer}: tokens skip its attention, so it cannot be observed. Collect from the "
                    "model whose layers all tokens enter."
                )
            undo.callback(module.register_forward_hook(observer.hook).remove)
            observers.append(observer)
        config = decoder(model).config
        undo.callback(setattr, config, "_attn_implementation", config._attn_implementation)
        config._attn_implementation = "eager"
        yield observers
