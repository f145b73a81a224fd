"""Count the tokens that enter the routed layers of a model."""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor

from espalier.models.runtime import TokenMask, decoder


class DepthCount(TokenMask):
    """Tokens seen and tokens that entered, by routed layer; those of masked tokens are left out (`TokenMask`)."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens: dict[int, int] = {}
        self.entered: dict[int, int] = {}

    def shares(self) -> dict[int, float]:
        """Share of tokens that entered, by layer."""
        return {layer: self.entered[layer] / tokens for layer, tokens in self.tokens.items() if tokens}

    def _see(self, router: Any, inputs: Any, output: tuple[Tensor, Tensor | None], *, layer: int) -> None:
        kept = self.unmasked(output[0].flatten())
        self.tokens[layer] = self.tokens.get(layer, 0) + len(kept)
        self.entered[layer] = self.entered.get(layer, 0) + int(kept.sum())


def depth_routers(model: Any) -> dict[int, Any]:
    """Return the routers of depth of a model, by decoder layer; one a layer at most."""
    found = {}
    for layer, part in enumerate(decoder(model).layers):
        for module in (part, *part.children()):
            router = getattr(module, "depth_router", None)
            if router is not None:
                found[layer] = router
    return found


@contextlib.contextmanager
def count_depth(model: Any) -> Iterator[DepthCount]:
    """Count the tokens that enter each routed layer in the forwards inside."""
    counter = DepthCount()
    handles: list[Any] = [decoder(model).register_forward_pre_hook(counter.see_mask, with_kwargs=True)]
    for layer, router in depth_routers(model).items():
        handles.append(router.register_forward_hook(partial(counter._see, layer=layer)))
    try:
        yield counter
    finally:
        for handle in handles:
            handle.remove()
