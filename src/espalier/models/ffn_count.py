"""Count the neurons that tokens run in the sparse FFNs of a model."""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from espalier.dense_families import DenseFamily
from espalier.models.runtime import TokenMask, decoder, entered_tokens


class NeuronCount(TokenMask):
    """Neurons run, by layer, over the tokens counted so far; those of masked tokens are left out (`TokenMask`)."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens: dict[int, int] = {}
        self.neurons: dict[int, int] = {}

    def means(self) -> dict[int, float]:
        """Mean number of neurons that a token ran, by layer."""
        return {layer: self.neurons[layer] / tokens for layer, tokens in self.tokens.items() if tokens}

    def _see_weights(self, router: Any, inputs: Any, weights: torch.Tensor, *, layer: int, ffn: Any, part: Any) -> None:
        runs = self.unmasked(ffn.active_neurons(weights), entered_tokens(part))
        self.tokens[layer] = self.tokens.get(layer, 0) + len(runs)
        self.neurons[layer] = self.neurons.get(layer, 0) + int(runs.sum())


@contextlib.contextmanager
def count_neurons(model: Any, family: DenseFamily) -> Iterator[NeuronCount]:
    """Count the neurons that each token runs in the forwards inside, in the layers that choose by token.

    An oracle's are not counted: it runs all of them.
    """
    counter = NeuronCount()
    handles: list[Any] = [decoder(model).register_forward_pre_hook(counter.see_mask, with_kwargs=True)]
    for layer, part in enumerate(decoder(model).layers):
        ffn = getattr(part, family.module)
        router = getattr(ffn, "router", None)
        if isinstance(router, nn.Module) and getattr(router, "kind", None) != "oracle":
            handles.append(router.register_forward_hook(partial(counter._see_weights, layer=layer, ffn=ffn, part=part)))
    try:
        yield counter
    finally:
        for handle in handles:
            handle.remove()
