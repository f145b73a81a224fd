"""The operation `narrow_attention`: dimensions of a dense model's attention heads are left out; imports no torch.

Shapes: D hidden, h dimensions of a head, P of its h / 2 pairs kept, e embedding of the values' masks.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from espalier.checkpoints.shape import DenseShape, ModelShape
from espalier.errors import UserError
from espalier.plans.split import Tensors

ROLES = ("enter", "mean", "norm_weight", "norm_bias", "decode")


@dataclass(frozen=True)
class NarrowAttention:
    """Queries and keys lose dimensions for all tokens, values for each token its own; as ToMoE learns (2501.15316).

    Rotary embeddings turn two dimensions of a head together, so queries and keys lose whole pairs: those of the tensor
    `pairs`, I32 [P], ascending, stay, in all heads. Their rows leave the projections; the scores that heads compute
    are over P pairs, scaled as before.

    With `values` (tensors by role, all F32) a token's value keeps the dimensions where the logits

        W GELU(LN(enter x + mean)) + offset       enter [e, D], mean [e], LN with norm_weight, norm_bias [e], W = decode

    are above 0, the same in all heads; decode [h, e]. A token attends to the values of others, whose dimensions are
    others, so that this saves nothing: it is not counted.
    """

    op: ClassVar[str] = "narrow_attention"
    pairs: str | None = None
    kept: int | None = None  # P
    values: dict[str, str] = field(default_factory=dict)
    embedding: int = 0  # e
    offset: float = 0.0

    def check(self, layer: int, shape: ModelShape | DenseShape) -> None:
        """Raise UserError where the operation contradicts itself or the model."""
        where = f"plan, layer {layer}: narrow_attention"
        if not isinstance(shape, DenseShape):
            raise UserError(f"{where} is for dense models; family {shape.family} has experts.")
        if not shape.pairs:
            raise UserError(f"{where}: family {shape.family} does not say how its heads are rotated.")
        if (self.pairs is None) != (self.kept is None) or (self.pairs is None and not self.values):
            raise UserError(f"{where} needs pairs with kept, or values, or both.")
        if self.kept is not None and not 1 <= self.kept <= shape.pairs:
            raise UserError(f"{where}.kept={self.kept} is not a number of pairs in 1..{shape.pairs}.")
        if self.values and (sorted(self.values) != sorted(ROLES) or self.embedding < 1):
            raise UserError(f"{where}.values={sorted(self.values)} with embedding={self.embedding}; needs {ROLES}.")

    def tensors(self, shape: ModelShape | DenseShape) -> Tensors:
        """The tensors that the operation names, with dtype and shape."""
        found: Tensors = {} if self.pairs is None else {self.pairs: ("I32", (self.kept or 0,))}
        head = 2 * shape.pairs if isinstance(shape, DenseShape) else 0
        sizes = self.value_shapes(shape.hidden, head)
        return found | {name: ("F32", sizes[role]) for role, name in self.values.items()}

    def value_shapes(self, hidden: int, head: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors of the values' mask by role."""
        e = self.embedding
        sizes: dict[str, tuple[int, ...]] = {"enter": (e, hidden), "mean": (e,), "norm_weight": (e,), "norm_bias": (e,)}
        return sizes | {"decode": (head, e)} if self.values else {}

    def parameters(self, shape: DenseShape) -> int:
        """Parameters that a layer has more after the operation."""
        gone = 0 if self.kept is None else (shape.pairs - self.kept) * shape.pair_parameters
        sizes = self.value_shapes(shape.hidden, 2 * shape.pairs).values()
        return sum(size[0] * (size[1] if len(size) > 1 else 1) for size in sizes) - gone

    def settings(self, dimensions: list[int] | None) -> dict[str, Any]:
        """Return the layer's entry in config.json for the shipped code; `dimensions` of a head are kept, ascending."""
        values = {"embedding": self.embedding, "offset": self.offset} if self.values else None
        return {"kept": dimensions, "values": values}


def dimensions_of(pairs: list[int], head: int, rotary: int) -> list[int]:
    """Return the dimensions of a head that its `pairs` are, ascending.

    Of `rotary` dimensions j and j + rotary / 2 are turned together; the others, which nothing turns, are paired alike.
    """
    turned, rest = rotary // 2, (head - rotary) // 2
    found = []
    for pair in pairs:
        if pair < turned:
            found += [pair, pair + turned]
        else:
            found += [rotary + pair - turned, rotary + pair - turned + rest]
    return sorted(found)
