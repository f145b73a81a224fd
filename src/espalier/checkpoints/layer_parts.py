"""Parts of a decoder layer that a token may skip: where a live model has them; imports no torch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Config = dict[str, Any]


def every_layer(config: Config) -> list[int]:
    """Return all decoder layers."""
    return list(range(config["num_hidden_layers"]))


def named_full(config: Config) -> list[int]:
    """Return the layers that `layer_types` says have attention over all tokens."""
    return [layer for layer in every_layer(config) if config["layer_types"][layer] == "full_attention"]


@dataclass(frozen=True)
class LayerParts:
    """What routing depth needs to know of a family's decoder layers, beside the names of attention and FFN.

    `outputs` name the modules whose outputs are added to the residual stream, where they are not attention and FFN
    themselves (norms behind them). `ffn_pair`: the FFN returns its output and something else. `attends` says which
    layers have softmax attention. `refused`: why no layer of the family can be skipped.
    """

    attention: str = "self_attn"  # on disk too
    outputs: tuple[str | None, str | None] = (None, None)
    ffn_pair: bool = False
    attends: Callable[[Config], list[int]] = every_layer
    refused: str = ""


USUAL = LayerParts()
