"""What a method may know of a model: counts and sizes, no weights, no tensor names; imports no torch."""

from dataclasses import asdict, dataclass, field
from typing import Any

from espalier.checkpoints.decoder_shape import DecoderShape

DENSE = "dense"


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Mixture-of-Experts decoder.

    `layers` are the decoder layers that hold a MoE block. `expert_parameters` counts one expert's weights
    (and biases), `neuron_parameters` what each of its F neurons adds to them (0: not known), `router_row_parameters`
    what one expert adds to a router. `total_parameters` counts every
    tensor of the checkpoint once (tied embeddings once). `always_active_parameters` are those that every
    token uses: all but the routed experts and `idle_parameters` (multi-token-prediction layers).

    Routers choose in `groups` equal groups of consecutive experts: a token takes its experts from the best
    `groups_chosen` of them, and a group is scored by its best `group_least` experts. `router` says in words how
    weights come from logits; it is `softmax` only where they are the softmax's largest K.
    """

    family: str
    layers: tuple[int, ...]
    experts: int  # E, routed experts per MoE block
    top_k: int  # K, experts per token
    hidden: int  # D
    width: int  # F, an expert's intermediate size
    renormalise: bool  # whether the K weights are made to sum to 1
    expert_parameters: int
    router_row_parameters: int
    total_parameters: int
    groups: int = 1
    groups_chosen: int = 1
    group_least: int = 1
    router: str = "softmax"
    idle_parameters: int = 0
    neuron_parameters: int = 0
    decoder: DecoderShape | None = field(default=None, compare=False)  # not in statistics, which are compared

    @property
    def always_active_parameters(self) -> int:
        routed = len(self.layers) * self.experts * self.expert_parameters
        return self.total_parameters - routed - self.idle_parameters

    def active_part(self, layer: int, granularity: str) -> float:
        """Parameters that one token uses of a decoder layer, its attention or its FFN."""
        assert self.decoder is not None
        idle = (self.experts - self.top_k) * self.expert_parameters if layer in self.layers else 0
        return self.decoder.part(layer, granularity) - (idle if granularity != "attention" else 0)

    def active_parameters(self, experts_per_token: float | None = None) -> float:
        """Parameters that one token uses, when it runs `experts_per_token` (default K) in each MoE block."""
        k = self.top_k if experts_per_token is None else experts_per_token
        return self.always_active_parameters + len(self.layers) * k * self.expert_parameters

    def document(self) -> dict[str, Any]:
        """Return the sizes as JSON, without those of `decoder`, which no statistic needs."""
        return _document(self)

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> "ModelShape":
        return cls(**(document | {"layers": tuple(document["layers"])}))


@dataclass(frozen=True)
class DenseShape:
    """Sizes of a dense decoder, whose layers all hold one feed-forward network (FFN).

    `neuron_parameters` are what each of the F neurons adds to an FFN (weights and the up projection's bias),
    `total_parameters` every tensor of the checkpoint once (tied embeddings once). Queries and keys of a head have
    `pairs` of dimensions, each of which adds `pair_parameters` to a layer's two projections, of all heads.
    """

    family: str
    layers: tuple[int, ...]
    hidden: int  # D
    width: int  # F
    gated: bool
    neuron_parameters: int
    total_parameters: int
    pairs: int = 0  # h / 2; 0: not known
    pair_parameters: int = 0
    decoder: DecoderShape | None = field(default=None, compare=False)  # not in statistics, which are compared

    def document(self) -> dict[str, Any]:
        """Return the sizes as JSON, without those of `decoder`, which no statistic needs."""
        return _document(self) | {"kind": DENSE}

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> "DenseShape":
        own = {key: value for key, value in document.items() if key != "kind"}
        return cls(**(own | {"layers": tuple(document["layers"])}))


def shape_from_document(document: dict[str, Any]) -> ModelShape | DenseShape:
    """Return the shape that `document` of either class describes."""
    if document.get("kind") == DENSE:
        return DenseShape.from_document(document)
    return ModelShape.from_document(document)


def _document(shape: ModelShape | DenseShape) -> dict[str, Any]:
    return {key: value for key, value in asdict(shape).items() if key != "decoder"} | {"layers": list(shape.layers)}
