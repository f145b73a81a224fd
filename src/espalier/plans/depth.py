"""The operations on a decoder layer that tokens may skip; imports no torch.

Shapes: D hidden, H units of a predictor's own layer.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from espalier.checkpoints.shape import DenseShape, ModelShape
from espalier.errors import UserError, nearest
from espalier.plans.split import Tensors

RULES = ("threshold", "top_k", "predictor", "random", "drop")
GRANULARITIES = ("block", "attention", "ffn")
WEIGHTS = ("gate", "mask")
CACHES = ("kept", "all")
ROUTED = ("threshold", "top_k", "predictor")  # rules that have a router
GATE = ("weight", "bias")
PREDICTOR = ("first", "second", "offset")


@dataclass(frozen=True)
class Depth:
    """Let each token enter a decoder layer (`granularity=block`), its attention or its FFN, or go past it.

    With x the layer's input (of `attention` and `ffn` the normalised input of that part) and g = sigmoid(w x + b), a
    token enters by `rule`

        threshold   where g >= `threshold`                              (MoDification, p)
        top_k       where its g is among the largest of its sequence, the share `capacity` of its tokens (MoD, arXiv
                    2404.02258); in a call that continues a cache, where no later token is known, as `predictor`
        predictor   where w_2 SiLU(W_1 x) + o > 0, learnt to guess `top_k` from x alone
        random      where a number drawn from its position, the layer and `seed` is below `capacity`
        drop        never: the parameters are gone from the files

    and otherwise is left as it is. What attention and FFN give those that enter is multiplied by `weights`: g (`gate`),
    or 1 (`mask`). Attention is over the keys of tokens that enter (`cache=kept`), or of `all`: then every token runs
    the attention, and what a layer saves is its FFN.

    `tensors_of` names tensors, F32, by role: `weight` [D] and `bias` [1] of rules with a router, `first` [H, D],
    `second` [H] and `offset` [1] of the predictor.
    """

    op: ClassVar[str] = "depth"
    rule: str
    granularity: str = "block"
    weights: str = "gate"
    cache: str = "kept"
    threshold: float | None = None
    capacity: float | None = None
    seed: int | None = None
    tensors_of: dict[str, str] = field(default_factory=dict)
    hidden_units: int = 0  # H

    def check(self, layer: int, shape: ModelShape | DenseShape) -> None:
        """Raise UserError where the operation contradicts itself or the model."""
        where = f"plan, layer {layer}: depth"
        for key, known in (("rule", RULES), ("granularity", GRANULARITIES), ("weights", WEIGHTS),
                           ("cache", CACHES)):  # fmt: skip
            value = getattr(self, key)
            if value not in known:
                raise UserError(f"{where}.{key}={value!r}; {nearest(str(value), list(known))}.")
        decoder = shape.decoder
        if decoder is None or not 0 <= layer < decoder.layers:
            raise UserError(f"{where}: the model has no such layer.")
        if decoder.refused:
            raise UserError(f"{where}: layers of {shape.family} cannot be skipped token by token: {decoder.refused}.")
        if self.granularity != "ffn" and layer not in decoder.attends:
            raise UserError(f"{where}: the layer has no softmax attention. Layers with: {list(decoder.attends)}.")
        if self.cache == "all" and (self.granularity != "block" or self.rule == "drop"):
            raise UserError(f"{where}.cache=all is of granularity=block and of rules by which some tokens enter.")
        self._check_numbers(where)
        roles = {*GATE, *(PREDICTOR if self.rule in ("top_k", "predictor") else ())} if self.rule in ROUTED else set()
        if set(self.tensors_of) != roles:
            raise UserError(f"{where}.tensors_of={sorted(self.tensors_of)}: rule={self.rule} needs {sorted(roles)}.")
        if ("first" in roles) != (self.hidden_units > 0):
            raise UserError(f"{where}.hidden_units={self.hidden_units} is of rules with a predictor, and is there.")

    def _check_numbers(self, where: str) -> None:
        if (self.threshold is not None) != (self.rule == "threshold"):
            raise UserError(f"{where}.threshold={self.threshold} is of rule=threshold, and is there with it.")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise UserError(f"{where}.threshold={self.threshold} lies outside 0..1.")
        if (self.capacity is not None) != (self.rule in ("top_k", "predictor", "random")):
            raise UserError(f"{where}.capacity={self.capacity}: rule={self.rule}, of which none is asked, or one is.")
        if self.capacity is not None and not 0 < self.capacity <= 1:
            raise UserError(f"{where}.capacity={self.capacity} lies outside 0..1, or is 0.")
        if (self.seed is not None) != (self.rule == "random"):
            raise UserError(f"{where}.seed={self.seed} is of rule=random, and is there with it.")

    def tensors(self, shape: ModelShape | DenseShape) -> Tensors:
        """The tensors that the operation names, with dtype and shape."""
        sizes = self.router_shapes(shape.hidden)
        return {name: ("F32", sizes[role]) for role, name in self.tensors_of.items()}

    def router_shapes(self, hidden: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the router's tensors by role."""
        sizes: dict[str, tuple[int, ...]] = {
            "weight": (hidden,),
            "bias": (1,),
            "first": (self.hidden_units, hidden),
            "second": (self.hidden_units,),
            "offset": (1,),
        }
        return {role: sizes[role] for role in self.tensors_of}

    def parameters(self, layer: int, shape: ModelShape | DenseShape) -> int:
        """Parameters that the layer has more after the operation."""
        if self.rule == "drop":
            assert shape.decoder is not None
            return -shape.decoder.part(layer, self.granularity)
        found = self.router_shapes(shape.hidden).values()
        return sum(size[0] * (size[1] if len(size) > 1 else 1) for size in found)

    def settings(self) -> dict[str, Any]:
        """Return the layer's entry in config.json for the shipped modelling code."""
        return {
            "rule": self.rule,
            "granularity": self.granularity,
            "weights": self.weights,
            "cache": self.cache,
            "threshold": self.threshold,
            "capacity": self.capacity,
            "seed": self.seed,
            "hidden": self.hidden_units,
            "tensors": sorted(self.tensors_of),
        }


@dataclass(frozen=True)
class DepthRule:
    """Another rule for a layer that is routed already: another `threshold`, or `predictor` in place of `top_k`."""

    op: ClassVar[str] = "depth_rule"
    threshold: float | None = None
    rule: str | None = None

    def check(self, layer: int, shape: ModelShape | DenseShape) -> None:
        """Raise UserError where nothing, or both, is asked for, or what cannot be."""
        where = f"plan, layer {layer}: depth_rule"
        if (self.threshold is None) == (self.rule is None):
            raise UserError(f"{where} takes a threshold or a rule, and one of them.")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise UserError(f"{where}.threshold={self.threshold} lies outside 0..1.")
        if self.rule not in (None, "top_k", "predictor"):
            raise UserError(f"{where}.rule={self.rule!r}; known: top_k, predictor.")

    def tensors(self, shape: ModelShape | DenseShape) -> Tensors:
        return {}
