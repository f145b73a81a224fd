"""Dense model families: names of FFN and attention tensors on disk and in live models; imports no torch."""

from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from espalier.checkpoints.layer_parts import USUAL, LayerParts
from espalier.errors import UserError

Config = dict[str, Any]


@dataclass(frozen=True)
class DenseFamily:
    """Where the feed-forward network (FFN) and the attention of a decoder layer lie, of one `model_type`.

    Names of tensors on disk are `model.layers.{layer}.{module}.{name}.weight` (and `.bias`), those of a live model
    `....layers[layer].{module}.{name}`. Of F neurons a gated FFN computes down(act(gate x) * up x), one without a gate
    down(act(up x)).
    """

    model_type: str
    architecture: str  # the stock class in transformers
    gate: str | None = "gate_proj"  # [F, D]
    up: str = "up_proj"  # [F, D]
    down: str = "down_proj"  # [D, F]
    activation: str = "act_fn"  # attribute of the live FFN
    module: str = "mlp"
    width_key: str = "intermediate_size"
    parts: LayerParts = USUAL
    projections: tuple[str, str, str] = ("q_proj", "k_proj", "v_proj")  # attributes of the live attention, on disk too

    def tensors(self, layer: int) -> dict[str, str]:
        """Names on disk, without `.weight`, of the FFN's projections: `gate` (unless there is none), `up`, `down`."""
        prefix = f"model.layers.{layer}.{self.module}."
        own = {"gate": self.gate, "up": self.up, "down": self.down}
        return {role: prefix + name for role, name in own.items() if name is not None}

    def router_tensor(self, layer: int, role: str) -> str:
        """Name on disk of a router's tensor, which a checkpoint's own modelling code reads."""
        return f"model.layers.{layer}.{self.module}.router.{role}"

    def attention_tensor(self, layer: int, role: str) -> str:
        """Name on disk, without `.weight`, of the projection of `query`, `key` or `value`."""
        return f"model.layers.{layer}.{self.attention}.{self.attention_modules[role]}"

    @property
    def attention(self) -> str:
        """Attribute of the live layer's attention."""
        return self.parts.attention

    @property
    def attention_modules(self) -> dict[str, str]:
        """Attributes of the live attention, for the shipped modelling code."""
        return dict(zip(("query", "key", "value"), self.projections, strict=True))

    def head(self, config: Config) -> int:
        """Dimensions of a head, h."""
        return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])

    def rotary(self, config: Config) -> int:
        """Dimensions of a head that a rotary embedding turns."""
        parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
        factor = config.get("partial_rotary_factor") or parameters.get("partial_rotary_factor")
        return int(self.head(config) * (1.0 if factor is None else float(factor)))

    @property
    def modules(self) -> dict[str, str | None]:
        """Attributes of the live FFN, for the shipped modelling code."""
        return {"gate": self.gate, "up": self.up, "down": self.down, "activation": self.activation}


def names() -> list[str]:
    """Model types that have a file here."""
    return sorted(module.name for module in iter_modules(__path__))


def dense_family_of(config: Config) -> DenseFamily:
    """Return the family of a config.json; UserError for one that is not known, with what to do."""
    model_type = str(config.get("model_type"))
    if model_type in names():
        family: DenseFamily = import_module(f"{__name__}.{model_type}").FAMILY
        return family
    raise UserError(
        f"config.json: model_type={model_type!r} is no dense family that Espalier can split; known: "
        f"{', '.join(names())}. Add src/espalier/dense_families/{model_type}.py with the names of its FFN."
    )
