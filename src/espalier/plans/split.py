"""The operation `split`: the neurons of a dense FFN become blocks of which a token runs some; imports no torch.

Shapes: D hidden, F neurons of the source's FFN, F' of them stored, S segments, U units, H of a router's own layer.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from espalier.checkpoints.shape import DenseShape, ModelShape
from espalier.errors import UserError, nearest

Tensors = dict[str, tuple[str, tuple[int, ...]]]

# Each kind of router: its tensors, those in the second tuple may be missing.
ROUTERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "none": ((), ()),
    "linear": (("weight",), ("bias",)),
    "mlp": (("first", "second"), ()),
    "analytic": (("gate",), ("up", "offset", "scale", "bias")),
    "oracle": ((), ()),
}
CHOICES = ("top_k", "threshold")
WEIGHTS = ("one", "softmax", "gate", "score")
LEVELS = ("units", "neurons")


@dataclass(frozen=True)
class Split:
    """Neurons of one FFN, in stored order, in segments; a unit is a set of segments that a token runs together.

    Because an FFN is a sum over its neurons, running some of the units is leaving neurons out: no unit has weights of
    its own, and units may share segments, which are stored once.

    `neurons` names a tensor I32 [F'], the source's neuron at each stored place (None: all, as they are). `segments`
    are consecutive sizes, of which the first `shared` run for every token. `units[u]` lists segments, ascending.

    With x [D] the FFN's input, L2-normalised where `normalise`, a token's scores of the units are, by `router`,

        none       no units: every stored neuron runs
        linear     W x + b                                    (`weight` [U, D], `bias` [U])
        mlp        B tanh(A x)                                (`first` [H, D], `second` [U, H])
        analytic   softmax |act(G x + o) * (P x)|             (`gate`, `up` [U, D], `offset` [U]; CMoE, 2502.04416)
        oracle     the sum over a unit's neurons of (h_j ||W_down,j||)^2, h the activations: an upper bound that saves
                   nothing, since it computes them all; `level=neurons` ranks neurons instead, `k` of them

    `choose`: the `k` units of largest score (of `analytic`, score plus `bias`, which balances load), or those whose
    sigmoid exceeds `threshold`, at least the one of largest score. What a chosen unit gives is multiplied by `weights`:

        one        scale
        softmax    scale times the softmax over the chosen scores         (LLaMA-MoE, arXiv 2406.16554)
        gate       sigmoid(score) U / (number of units chosen)            (DSMoE, arXiv 2502.12455, eq. 8)
        score      1 + score * `scale` [U]                                (CMoE)

    `tensors` names the router's tensors, all F32, by their role.
    """

    op: ClassVar[str] = "split"
    segments: tuple[int, ...]
    units: tuple[tuple[int, ...], ...] = ()
    neurons: str | None = None
    shared: int = 0
    router: str = "none"
    choose: str = "top_k"
    k: int | None = None
    threshold: float | None = None
    weights: str = "one"
    scale: float = 1.0
    normalise: bool = False
    level: str = "units"
    tensors_of: dict[str, str] = field(default_factory=dict)
    hidden_units: int = 0  # H of router=mlp

    @property
    def width(self) -> int:
        """F', the neurons that are stored."""
        return sum(self.segments)

    def unit_width(self, unit: int) -> int:
        """Neurons of a unit, without the shared ones."""
        return sum(self.segments[segment] for segment in self.units[unit])

    @property
    def widest(self) -> int:
        """The most neurons that one token runs."""
        always = sum(self.segments[: self.shared])
        if self.router == "none":
            return self.width
        if self.router == "oracle" and self.level == "neurons":
            return always + min(self.k or 0, self.width - always)
        if self.choose == "threshold":
            return self.width
        widths = sorted((self.unit_width(unit) for unit in range(len(self.units))), reverse=True)
        return min(self.width, always + sum(widths[: self.k]))

    def check(self, layer: int, shape: ModelShape | DenseShape) -> None:
        """Raise UserError where the operation contradicts itself or the model."""
        where = f"plan, layer {layer}: split"
        if not isinstance(shape, DenseShape):
            raise UserError(f"{where} is for the FFN of a dense model; family {shape.family} has experts already.")
        for key, known in (("router", tuple(ROUTERS)), ("choose", CHOICES), ("weights", WEIGHTS), ("level", LEVELS)):
            value = getattr(self, key)
            if value not in known:
                raise UserError(f"{where}.{key}={value!r}; {nearest(str(value), list(known))}.")
        if not self.segments or min(self.segments) < 1 or self.width > shape.width:
            raise UserError(f"{where}.segments hold {self.width} neurons; the FFN has {shape.width}.")
        if self.neurons is None and self.width != shape.width:
            raise UserError(f"{where} leaves neurons out and does not say which stay: neurons is missing.")
        if not 0 <= self.shared <= len(self.segments):
            raise UserError(f"{where}.shared={self.shared}, of {len(self.segments)} segments.")
        self._check_units(where)
        self._check_router(where)

    def _check_units(self, where: str) -> None:
        used = {segment for unit in self.units for segment in unit}
        for number, unit in enumerate(self.units):
            if not unit or list(unit) != sorted(set(unit)):
                raise UserError(f"{where}.units[{number}]={list(unit)} must be ascending segments.")
        expected = set() if self.router == "none" else set(range(self.shared, len(self.segments)))
        if self.router == "oracle" and self.level == "neurons":
            expected = set()
        if used != expected:
            raise UserError(f"{where}.units use {len(used)} segments; those that are not shared are {len(expected)}.")

    def _check_router(self, where: str) -> None:
        needed, optional = ROUTERS[self.router]
        if not set(needed) <= set(self.tensors_of) <= {*needed, *optional}:
            raise UserError(f"{where}.tensors_of={sorted(self.tensors_of)}: router={self.router} needs {list(needed)}.")
        if (self.router == "mlp") != (self.hidden_units > 0):
            raise UserError(f"{where}.hidden_units={self.hidden_units} is of router=mlp, and is there with it.")
        if self.router == "none":
            return
        if (self.choose == "top_k") != (self.k is not None) or (self.choose == "threshold") != (
            self.threshold is not None
        ):
            raise UserError(
                f"{where}: choose={self.choose} takes {'k' if self.choose == 'top_k' else 'threshold'}, and that only."
            )
        most = self.width if self.level == "neurons" else len(self.units)
        if self.k is not None and not 1 <= self.k <= most:
            raise UserError(f"{where}.k={self.k} is not a whole number in 1..{most}.")
        if self.threshold is not None and not 0 <= self.threshold < 1:
            raise UserError(f"{where}.threshold={self.threshold} lies outside [0, 1).")
        if self.weights == "score" and ("scale" not in self.tensors_of or self.router != "analytic"):
            raise UserError(f"{where}.weights=score needs router=analytic and its tensor scale.")
        if self.router == "oracle" and (self.choose, self.weights) != ("top_k", "one"):
            raise UserError(f"{where}: router=oracle takes choose=top_k and weights=one.")
        if self.level == "neurons" and self.router != "oracle":
            raise UserError(f"{where}.level=neurons is of router=oracle only.")

    def tensors(self, shape: ModelShape | DenseShape) -> Tensors:
        """The tensors that the operation names, with dtype and shape."""
        found: Tensors = {} if self.neurons is None else {self.neurons: ("I32", (self.width,))}
        return found | {self.tensors_of[role]: ("F32", size) for role, size in self.router_shapes(shape.hidden).items()}

    def router_shapes(self, hidden: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the router's tensors by role."""
        units = len(self.units)
        sizes = {
            "weight": (units, hidden),
            "gate": (units, hidden),
            "up": (units, hidden),
            "first": (self.hidden_units, hidden),
            "second": (units, self.hidden_units),
            "bias": (units,),
            "scale": (units,),
            "offset": (units,),
        }
        return {role: sizes[role] for role in self.tensors_of}

    def router_parameters(self, hidden: int) -> int:
        """Parameters of the router."""
        total = 0
        for size in self.router_shapes(hidden).values():
            total += size[0] * (size[1] if len(size) > 1 else 1)
        return total

    def settings(self) -> dict[str, Any]:
        """Return the layer's entry in config.json for the shipped modelling code."""
        return {
            "segments": list(self.segments),
            "units": [list(unit) for unit in self.units],
            "shared": self.shared,
            "router": {
                "kind": self.router,
                "choose": self.choose,
                "k": self.k,
                "threshold": self.threshold,
                "weights": self.weights,
                "scale": self.scale,
                "normalise": self.normalise,
                "level": self.level,
                "hidden": self.hidden_units,
                "tensors": sorted(self.tensors_of),
            },
        }


@dataclass(frozen=True)
class Threshold:
    """Another threshold for the gates of a FFN that was split with `choose=threshold`."""

    op: ClassVar[str] = "threshold"
    value: float

    def check(self, layer: int, shape: ModelShape | DenseShape) -> None:
        """Raise UserError where the value or the model is none for it."""
        if not isinstance(shape, DenseShape):
            raise UserError(f"plan, layer {layer}: threshold is for a split FFN; family {shape.family} has experts.")
        if not 0 <= self.value < 1:
            raise UserError(f"plan, layer {layer}: threshold.value={self.value} lies outside [0, 1).")

    def tensors(self, shape: ModelShape | DenseShape) -> Tensors:
        return {}
