"""Model families: tensor names on disk and config keys, one file a family; imports no torch."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from espalier.checkpoints.layer_parts import USUAL, LayerParts, every_layer
from espalier.errors import UserError

Config = dict[str, Any]

# The two ways in which most families name one expert's tensors on disk: gate, up, down.
GATE_UP_DOWN = (
    "experts.{expert}.gate_proj.weight",
    "experts.{expert}.up_proj.weight",
    "experts.{expert}.down_proj.weight",
)
W1_W3_W2 = ("experts.{expert}.w1.weight", "experts.{expert}.w3.weight", "experts.{expert}.w2.weight")


@dataclass(frozen=True)
class NeuronAxis:
    """Where one expert's tensor on disk has its F neurons.

    `dim` is the dimension, without that of the experts. `fold` says how it holds them: `one` (F entries), `halves`
    (F of the gate, then F of the up projection) or `pairs` (gate and up of each neuron side by side). `down` marks
    the down projection.
    """

    dim: int
    fold: str = "one"
    down: bool = False


def plain_softmax(config: Config) -> str:
    """Return the name of the ordinary router: top-K of the softmax of the logits."""
    return "softmax"


def one_group(config: Config) -> tuple[int, int]:
    """Return (1, 1): a router that chooses among all experts at once."""
    return 1, 1


@dataclass(frozen=True)
class Family:
    """Where the parts of a MoE block lie in a checkpoint of one `model_type`, and how its router chooses.

    Names are templates of the tensors on disk with `{layer}` and `{expert}`. A live model is reached
    through transformers' common shape instead: `....layers[layer].{module}.{router_module}` returns
    (logits, weights, indices) and `....experts` holds stacked tensors.

    A family has either `experts` (one tensor for each expert and part) or `stacked` (all experts in one tensor).
    """

    model_type: str
    architecture: str  # the stock class in transformers
    block: str  # prefix of the MoE block on disk, ends without a dot
    experts: tuple[str, ...]  # one expert's tensors after `{block}.`, with {expert}; gate, up, down in order
    router: tuple[str, ...]  # tensors after `{block}.` whose first dimension is E; the weight first
    expert_keys: tuple[str, ...]  # config.json keys that may hold E; the first wins, as it does in transformers
    stacked: tuple[str, ...] = ()  # tensors after `{block}.` that hold all experts along their first dimension
    # Of `experts`, or of `stacked`, in their order; None for a tensor without neurons.
    neurons: tuple[NeuronAxis | None, ...] = (NeuronAxis(0), NeuronAxis(0), NeuronAxis(1, down=True))
    router_columns: tuple[str, ...] = ()  # tensors after `{block}.` whose last dimension is E
    top_k_key: str = "num_experts_per_tok"
    width_key: str = "moe_intermediate_size"
    width_shared: bool = False  # whether dense layers or shared experts take their width from that key too
    module: str = "mlp"  # the MoE block in a live decoder layer
    router_module: str = "gate"
    renormalise: Callable[[Config], bool] = lambda config: bool(config.get("norm_topk_prob", False))
    moe_layers: Callable[[Config], list[int]] = every_layer
    router_kind: Callable[[Config], str] = plain_softmax  # in words; `softmax` only for the ordinary router
    groups: Callable[[Config], tuple[int, int]] = one_group  # router groups, and how many of them a token chooses
    group_least: int = 1  # experts that the router needs in each group to score it
    scales_input: bool = False  # the weight multiplies the experts' input; the router returns (scores [T, E], logits)
    parts: LayerParts = USUAL
    least_experts: int = 1  # with fewer in config.json the stock class builds no MoE block

    def expert_count(self, config: Config) -> int:
        """Return E; UserError when config.json has none of the family's keys."""
        return self._first(config, self.expert_keys)

    def top_k(self, config: Config) -> int:
        """Return K; UserError when config.json does not say it."""
        return self._first(config, ("num_experts_per_tok", self.top_k_key))

    def _first(self, config: Config, keys: tuple[str, ...]) -> int:
        for key in keys:
            if config.get(key) is not None:
                return int(config[key])
        raise UserError(f"config.json: {self.model_type} has none of the keys {sorted(set(keys))}.")

    def _named(self, layer: int, names: tuple[str, ...], **more: int) -> list[str]:
        block = self.block.format(layer=layer)
        return [f"{block}.{name.format(**more)}" for name in names]

    def expert_tensors(self, layer: int, expert: int) -> list[str]:
        """Names on disk of one expert's own tensors, in the order gate, up, down; none where they are stacked."""
        return self._named(layer, self.experts, expert=expert)

    def stacked_tensors(self, layer: int) -> list[str]:
        """Names on disk of the tensors [E, ...] that hold all experts."""
        return self._named(layer, self.stacked)

    def router_tensors(self, layer: int) -> dict[str, int]:
        """Names on disk of the router's tensors, the weight first, with the dimension (0 or -1) that is E."""
        rows, columns = self._named(layer, self.router), self._named(layer, self.router_columns)
        return dict.fromkeys(rows, 0) | dict.fromkeys(columns, -1)

    def block_prefixes(self, layer: int) -> tuple[str, ...]:
        """Prefixes under which every tensor on disk must be one of the family's own: experts and router."""
        names = {name.rpartition(".")[0] for name in self.router_tensors(layer)} - {self.block.format(layer=layer)}
        return (f"{self.block.format(layer=layer)}.experts.", *(f"{name}." for name in sorted(names)))

    def constants_tensor(self, layer: int) -> str:
        """Name on disk of the vectors that stand for experts, which a checkpoint's own modelling code reads."""
        return f"{self.block.format(layer=layer)}.constants"

    def expert_map_tensor(self, layer: int) -> str:
        """Name on disk of the expert map that a merged checkpoint's own modelling code reads."""
        return f"{self.block.format(layer=layer)}.expert_map"

    def skip_factor_tensor(self, layer: int) -> str:
        """Name on disk of the factors by which a checkpoint's own modelling code skips alike experts."""
        return f"{self.block.format(layer=layer)}.skip_factor"

    def resize(self, config: Config, experts: int) -> Config:
        """Return config.json with E replaced in every key that holds it."""
        return config | dict.fromkeys((key for key in self.expert_keys if key in config), experts)


def predicts_ahead(config: Config, name: str) -> bool:
    """Whether a tensor on disk belongs to a multi-token-prediction layer, which transformers does not load."""
    found = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    beyond = found is not None and int(found[1]) >= config["num_hidden_layers"]
    return beyond or re.search(r"(?:^|\.)mtp", name) is not None


def names() -> list[str]:
    """Model types that have a family file."""
    return sorted(module.name for module in iter_modules(__path__))


def family_of(config: Config) -> Family:
    """Return the family of a config.json; UserError for a dense or an unknown model, with what to do."""
    model_type = str(config.get("model_type"))
    if model_type in names():
        family: Family = import_module(f"{__name__}.{model_type}").FAMILY
        return family
    if model_type == "kimi_k2":
        raise UserError(
            "config.json: model_type='kimi_k2' is DeepSeek-V3's architecture, under a name that transformers does not "
            'know. Write "model_type": "deepseek_v3" and "architectures": ["DeepseekV3ForCausalLM"] there, without '
            '"auto_map", in your copy.'
        )
    text = config.get("text_config")
    if isinstance(text, dict) and text.get("model_type") in names():
        family = family_of(text)
        raise UserError(
            f"config.json: model_type={model_type!r} holds a language model ({family.model_type}) beside other parts, "
            "and Espalier reads language models alone. Write it out first, and then its tokenizer: "
            f"transformers.{family.architecture}.from_pretrained(SOURCE).save_pretrained(OUT)."
        )
    has_experts = any("expert" in key for key in (*config, *(text if isinstance(text, dict) else ())))
    if has_experts:
        raise UserError(
            f"config.json: model_type={model_type!r} is a Mixture-of-Experts family that Espalier does not know; "
            f"known: {', '.join(names())}. Add src/espalier/families/{model_type}.py with its tensor names."
        )
    raise UserError(
        f"config.json: model_type={model_type!r} is a dense model without experts; this method needs a "
        f"Mixture-of-Experts model of one of: {', '.join(names())}."
    )
