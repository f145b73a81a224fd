"""Observe the FFNs of a running dense model, through forward hooks.

Shapes: T unmasked tokens, D hidden, F neurons.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from espalier.dense_families import DenseFamily
from espalier.errors import UserError
from espalier.models.runtime import decoder


@dataclass(frozen=True)
class FFNTrace:
    """What one FFN did in one forward pass, for the tokens that the mask keeps.

    hidden [T, D]: its input.   inner [T, F]: its neurons' activations, which the down projection gets.
    token int64 [T]: index of each among all tokens.
    """

    layer: int
    hidden: Tensor
    inner: Tensor
    token: Tensor


class FFNObserver:
    """Makes a FFNTrace of each forward pass of one FFN and hands it to `consume`."""

    def __init__(self, layer: int, consume: Callable[[FFNTrace], None]) -> None:
        self.layer, self.consume = layer, consume
        self.calls = 0
        self.rows = torch.empty(0, dtype=torch.int64)
        self.first = 0
        self._hidden: Tensor | None = None

    def expect(self, rows: Tensor, first: int) -> None:
        """Say which flat rows of the next batch are unmasked, and the index of the first among all tokens."""
        self.rows, self.first = rows, first

    def ffn_hook(self, module: nn.Module, args: Any) -> None:
        """Keep the input [B, L, D]."""
        self._hidden = args[0]

    def down_hook(self, module: nn.Module, args: Any) -> None:
        """Hand the trace over when the activations [B, L, F] are there."""
        hidden, self._hidden = self._hidden, None
        if hidden is None:
            raise UserError(f"model, layer {self.layer}: its FFN ran in parts; it cannot be observed.")
        self.calls += 1
        rows = self.rows.to(hidden.device)
        self.consume(
            FFNTrace(
                self.layer,
                hidden=hidden.reshape(-1, hidden.shape[-1])[rows],
                inner=args[0].reshape(-1, args[0].shape[-1])[rows],
                token=self.first + torch.arange(len(rows), device=hidden.device),
            )
        )


@contextlib.contextmanager
def observe_ffns(
    model: Any, layers: Sequence[int], family: DenseFamily, consume: Callable[[FFNTrace], None]
) -> Iterator[list[FFNObserver]]:
    """Observe the FFNs of `layers` for the duration of the context; before each forward pass call every `expect`."""
    with contextlib.ExitStack() as undo:
        observers = []
        for layer in layers:
            ffn = getattr(decoder(model).layers[layer], family.module)
            observer = FFNObserver(layer, consume)
            undo.callback(ffn.register_forward_pre_hook(observer.ffn_hook).remove)
            undo.callback(getattr(ffn, family.down).register_forward_pre_hook(observer.down_hook).remove)
            observers.append(observer)
        yield observers
