"""Model families: tensor names on disk and config keys, one file a family; imports no torch."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from espalier.errors import UserError

Config = dict[str, Any]


def every_layer(config: Config) -> list[int]:
    """Return all decoder layers."""
    return list(range(config["num_hidden_layers"]))


@dataclass(frozen=True)
class Family:
    """Where the parts of a MoE block lie in a checkpoint of one `model_type`.

    Names are templates of the tensors on disk with `{layer}` and `{expert}`. A live model is reached
    through transformers' common shape instead: `model.model.layers[layer].{module}.{router_module}` returns
    (logits, weights, indices) and `....experts` holds stacked tensors.
    """

    model_type: str
    architecture: str  # the stock class in transformers
    block: str  # prefix of the MoE block on disk, ends without a dot
    experts: tuple[str, ...]  # one expert's tensors after `{block}.`, with {expert}; gate, up, down in order
    router: tuple[str, ...]  # tensors after `{block}.` whose first dimension is E
    expert_keys: tuple[str, ...]  # config.json keys that may hold E; those present are all rewritten
    top_k_key: str = "num_experts_per_tok"
    width_key: str = "moe_intermediate_size"
    module: str = "mlp"  # the MoE block in a live decoder layer
    router_module: str = "gate"
    renormalise: Callable[[Config], bool] = lambda config: bool(config.get("norm_topk_prob", False))
    moe_layers: Callable[[Config], list[int]] = every_layer

    def expert_count(self, config: Config) -> int:
        """Return E; UserError when config.json has none of the family's keys."""
        for key in self.expert_keys:
            if config.get(key) is not None:
                return int(config[key])
        raise UserError(f"config.json: {self.model_type} has none of the keys {list(self.expert_keys)}.")

    def expert_tensors(self, layer: int, expert: int) -> list[str]:
        """Names on disk of one expert's tensors, in the order gate, up, down."""
        block = self.block.format(layer=layer)
        return [f"{block}.{name.format(expert=expert)}" for name in self.experts]

    def router_tensors(self, layer: int) -> list[str]:
        """Names on disk of the tensors that hold one row per expert."""
        block = self.block.format(layer=layer)
        return [f"{block}.{name}" for name in self.router]

    def expert_map_tensor(self, layer: int) -> str:
        """Name on disk of the expert map that a merged checkpoint's own modelling code reads."""
        return f"{self.block.format(layer=layer)}.expert_map"

    def resize(self, config: Config, experts: int) -> Config:
        """Return config.json with E replaced in every key that holds it."""
        present = [key for key in self.expert_keys if key in config]
        return config | dict.fromkeys(present or self.expert_keys[:1], experts)


def names() -> list[str]:
    """Model types that have a family file."""
    return sorted(module.name for module in iter_modules(__path__))


def family_of(config: Config) -> Family:
    """Return the family of a config.json; UserError for a dense or an unknown model, with what to do."""
    model_type = str(config.get("model_type"))
    if model_type in names():
        family: Family = import_module(f"{__name__}.{model_type}").FAMILY
        return family
    has_experts = any("expert" in key for key in config)
    if has_experts:
        raise UserError(
            f"config.json: model_type={model_type!r} is a Mixture-of-Experts family that Espalier does not know; "
            f"known: {', '.join(names())}. Add src/espalier/families/{model_type}.py with its tensor names."
        )
    raise UserError(
        f"config.json: model_type={model_type!r} is a dense model without experts; this method needs a "
        f"Mixture-of-Experts model of one of: {', '.join(names())}."
    )
