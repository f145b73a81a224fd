"""Projections of attention whose heads have fewer dimensions; made by Espalier.

Shipped beside `modeling_espalier_ffn.py` in a checkpoint's directory; needs torch only. What is left out is zero, so
that the stock attention runs as it is.

Shapes: D hidden, h dimensions of a head, n of them kept.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class NarrowProjection(nn.Module):
    """Stands for the projection `stock` of queries or keys, of which each head keeps the dimensions `kept`.

    Computes and stores what is kept; gives zeros in the other places.
    """

    def __init__(self, stock: nn.Linear, head: int, kept: list[int]) -> None:
        super().__init__()
        self.heads, self.head, self.kept = stock.out_features // head, head, kept
        facts: dict[str, Any] = {"device": stock.weight.device, "dtype": stock.weight.dtype}
        rows = self.heads * len(kept)
        self.weight = nn.Parameter(torch.empty(rows, stock.in_features, **facts))
        self.bias = None if stock.bias is None else nn.Parameter(torch.empty(rows, **facts))
        self._places: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """Return queries or keys [..., heads x h] of `hidden` [..., D]."""
        narrow = functional.linear(hidden, self.weight, self.bias)
        narrow = narrow.view(*narrow.shape[:-1], self.heads, len(self.kept))
        if self._places is None or self._places.device != hidden.device:
            self._places = torch.tensor(self.kept, device=hidden.device)
        whole = narrow.new_zeros(*narrow.shape[:-1], self.head)
        whole = whole.index_copy(-1, self._places, narrow)
        return whole.view(*whole.shape[:-2], -1)


class TokenValues(nn.Module):
    """Stands for the projection `stock` of values, of which each token keeps dimensions of its own, in all heads."""

    def __init__(self, stock: nn.Linear, head: int, embedding: int, offset: float) -> None:
        super().__init__()
        self.heads, self.head = stock.out_features // head, head
        facts: dict[str, Any] = {"device": stock.weight.device, "dtype": stock.weight.dtype}
        self.weight = nn.Parameter(torch.empty(stock.out_features, stock.in_features, **facts))
        self.bias = None if stock.bias is None else nn.Parameter(torch.empty(stock.out_features, **facts))
        self.router = ValueRouter(stock.in_features, head, embedding, offset)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return values [..., heads x h] of `hidden` [..., D], those dimensions 0 that the token leaves out."""
        values: Tensor = functional.linear(hidden, self.weight, self.bias)
        kept = (self.router(hidden) > 0).to(values.dtype)
        masked: Tensor = values * kept.repeat(*[1] * (kept.dim() - 1), self.heads)
        return masked


class ValueRouter(nn.Module):
    """Says which dimensions of its value a token keeps: those of positive logits; computes in float32, always."""

    def __init__(self, hidden: int, head: int, embedding: int, offset: float) -> None:
        super().__init__()
        self.offset = offset
        self.enter = nn.Parameter(torch.zeros(embedding, hidden))
        self.mean = nn.Parameter(torch.zeros(embedding))
        self.norm_weight = nn.Parameter(torch.zeros(embedding))
        self.norm_bias = nn.Parameter(torch.zeros(embedding))
        self.decode = nn.Parameter(torch.zeros(head, embedding))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits [..., h] of `hidden` [..., D]."""
        with torch.autocast(hidden.device.type, enabled=False):
            # A model that was cast as a whole (model.half()) has these in that dtype.
            mixed = functional.linear(hidden.float(), self.enter.float()) + self.mean
            normed = functional.layer_norm(mixed, mixed.shape[-1:], self.norm_weight.float(), self.norm_bias.float())
            return functional.linear(functional.gelu(normed), self.decode.float()) + self.offset


def narrow_attention(attention: Any, modules: dict[str, str], head: int, settings: dict[str, Any]) -> None:
    """Change the live `attention` of a layer to what `settings` say: `kept` dimensions, and `values`."""
    if settings["kept"] is not None:
        for role in ("query", "key"):
            stock = getattr(attention, modules[role])
            setattr(attention, modules[role], NarrowProjection(stock, head, settings["kept"]))
    if settings["values"] is not None:
        stock = getattr(attention, modules["value"])
        setattr(attention, modules["value"], TokenValues(stock, head, **settings["values"]))
