"""Parameters of every decoder layer of a model, counted from its config.json alone; imports no torch.

Legend: D hidden size, H heads, G key-value heads, h head size, F width of an expert, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from espalier.families import Config, family_of, names

TIED = ("ernie4_5_moe", "gemma", "gemma2")  # model types whose head is the embedding where config.json is silent


@dataclass(frozen=True)
class Layer:
    """Parameters of one decoder layer.

    `mixer`: attention, or what stands in its place, with the norms. `rest`: of the feed-forward part all but the
    routed experts: a dense layer's matrices, or the router and the shared experts. `attention`: mean of the widths of
    scores and sums, 0 where cost does not grow with the sequence's length.
    """

    mixer: int
    rest: int
    attention: int
    experts: int = 0
    expert: int = 0  # parameters of one routed expert
    router_row: int = 0  # parameters of the router that belong to one expert

    @property
    def feed_forward(self) -> int:
        return self.rest + self.experts * self.expert

    @property
    def total(self) -> int:
        return self.mixer + self.feed_forward


@dataclass(frozen=True)
class Count:
    """Parameters of a model: `embedding`, `head` (0 when tied to it), the final `norm`, the layers, and `idle`.

    `idle` are those of multi-token-prediction layers, which lie in the files and are not loaded.
    """

    layers: tuple[Layer, ...]
    embedding: int
    head: int
    norm: int
    idle: int = 0

    @property
    def loaded(self) -> int:
        return self.embedding + self.head + self.norm + sum(layer.total for layer in self.layers)


def is_moe(config: Config) -> bool:
    """Whether a config.json is one of a Mixture-of-Experts model, known or not."""
    return config.get("model_type") in names() or any("expert" in key for key in config)


def count(config: Config) -> Count:
    """Count the parameters of the model that transformers builds from `config`; UserError for an unknown MoE family.

    Exact for every family of espalier/families; for a dense model of another family, as if it were Llama's.
    """
    hidden, vocabulary = int(config["hidden_size"]), int(config["vocab_size"])
    family = config.get("model_type")
    moe = _moe_part(config) if is_moe(config) else {}
    layers = tuple(_layer(config, index, moe.get(index)) for index in range(int(config["num_hidden_layers"])))
    biased = config.get("lm_head_bias") if family == "phimoe" else family == "ernie4_5_moe" and config.get("use_bias")
    head = 0 if config.get("tie_word_embeddings", family in TIED) else hidden * vocabulary
    norm = _norm(config)
    ahead = int(config.get("num_nextn_predict_layers") or 0) if moe else 0
    # Each holds a decoder layer, two norms and a projection before it, one norm behind it, and copies of both ends.
    idle = ahead * (layers[-1].total + 2 * hidden * hidden + 3 * hidden + 2 * hidden * vocabulary)
    return Count(layers, hidden * vocabulary, head + (vocabulary if biased else 0), norm, idle)


def _layer(config: Config, index: int, moe: dict[str, int] | None) -> Layer:
    mixer, attention = _mixer(config, index)
    mixer += 2 * _norm(config)
    if moe is not None:
        return Layer(mixer, attention=attention, **moe)
    key = "intermediate_size_mlp" if config.get("model_type") == "llama4_text" else "intermediate_size"
    return Layer(mixer, _gated(config, int(config[key])), attention)


def _norm(config: Config) -> int:
    return int(config["hidden_size"]) * (2 if config.get("model_type") == "phimoe" else 1)


def _gated(config: Config, width: int) -> int:
    """Parameters of gate, up and down."""
    hidden, family = int(config["hidden_size"]), config.get("model_type")
    key = "use_bias" if family == "ernie4_5_moe" else "mlp_bias"
    biased = config.get(key) and family in ("ernie4_5_moe", "deepseek_v2", "llama")
    return 3 * hidden * width + (2 * width + hidden if biased else 0)


def _moe_part(config: Config) -> dict[int, dict[str, int]]:
    """What a MoE block holds, by decoder layer."""
    family, hidden = family_of(config), int(config["hidden_size"])
    experts, width = family.expert_count(config), int(config[family.width_key])
    expert = 3 * hidden * width
    router_row = hidden + len(family.router) + len(family.router_columns) - 1
    if family.model_type == "gpt_oss":
        expert += 2 * width + hidden
    rest = experts * router_row + _shared(config, width)
    block = {"rest": rest, "experts": experts, "expert": expert, "router_row": router_row}
    return dict.fromkeys(family.moe_layers(config), block)


def _shared(config: Config, width: int) -> int:
    """Parameters of the shared experts."""
    family, hidden = config["model_type"], int(config["hidden_size"])
    if family in ("qwen2_moe", "qwen3_next"):  # with their own gate
        return _gated(config, int(config["shared_expert_intermediate_size"])) + hidden
    if family == "llama4_text":
        return _gated(config, width)
    key = "moe_num_shared_experts" if family == "ernie4_5_moe" else "n_shared_experts"
    shared = int(config.get(key) or 0)
    return _gated(config, shared * width) if shared else 0


def _mixer(config: Config, index: int) -> tuple[int, int]:
    """Parameters of a layer's attention or what stands in its place, and its attention width."""
    special: dict[str, Callable[[Config, int], tuple[int, int] | None]] = {
        "deepseek_v2": _latent_attention,
        "deepseek_v3": _latent_attention,
        "jamba": _mamba,
        "minimax": _lightning,
        "qwen3_next": _delta,
    }
    own = special.get(str(config.get("model_type")))
    found = own(config, index) if own is not None else None
    return found if found is not None else _attention(config)


def _heads(config: Config) -> tuple[int, int, int]:
    """H, G, h."""
    heads = int(config["num_attention_heads"])
    head = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
    return heads, int(config.get("num_key_value_heads") or heads), head


def _attention(config: Config) -> tuple[int, int]:
    hidden, family = int(config["hidden_size"]), config.get("model_type")
    heads, groups, head = _heads(config)
    inner, keys = heads * head, groups * head
    gate = hidden * inner if family == "qwen3_next" else 0
    size = 2 * hidden * (inner + keys) + gate
    if family in ("qwen2", "qwen2_moe"):
        biased, out = config.get("qkv_bias", True), False
    else:
        biased = config.get("use_bias" if family == "ernie4_5_moe" else "attention_bias", family == "gpt_oss")
        out = family != "glm4_moe"
        if family in ("jamba", "minimax", "minimax_m2", "mixtral"):
            biased = False
    if biased:
        size += inner + 2 * keys + (hidden if out else 0) + (inner if gate else 0)
    if family in ("olmoe", "minimax_m2"):
        size += inner + keys
    if family in ("qwen3", "qwen3_moe", "qwen3_next") or (family == "glm4_moe" and config.get("use_qk_norm")):
        size += 2 * head
    if family == "gpt_oss":
        size += heads  # sinks
    return size, inner


def _latent_attention(config: Config, index: int) -> tuple[int, int]:
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    key, value = int(config["qk_nope_head_dim"]), int(config["v_head_dim"])
    rope, latent = int(config["qk_rope_head_dim"]), int(config["kv_lora_rank"])
    query = config.get("q_lora_rank")
    wide = heads * (key + rope)
    size = hidden * query + query + query * wide if query else hidden * wide
    size += hidden * (latent + rope) + latent + latent * heads * (key + value) + heads * value * hidden
    if config.get("attention_bias"):
        size += (query or 0) + latent + rope + hidden
    return size, heads * (key + rope + value) // 2


def _mamba(config: Config, index: int) -> tuple[int, int] | None:
    if index % config.get("attn_layer_period", 8) == config.get("attn_layer_offset", 4):
        return None
    hidden = int(config["hidden_size"])
    inner, states = hidden * config.get("mamba_expand", 2), config.get("mamba_d_state", 16)
    rank = config.get("mamba_dt_rank", "auto")
    rank = -(-hidden // 16) if rank == "auto" else int(rank)
    kernel = config.get("mamba_d_conv", 4) + bool(config.get("mamba_conv_bias", True))
    size = 3 * hidden * inner + inner * kernel + inner * (rank + 2 * states) + (rank + 1) * inner
    size += inner * (states + 1) + rank + 2 * states
    if config.get("mamba_proj_bias"):
        size += 2 * inner + hidden
    return size, 0


def _layer_type(config: Config, index: int, default: str) -> str:
    kinds: list[Any] = config.get("layer_types") or []
    return str(kinds[index]) if index < len(kinds) else default


def _lightning(config: Config, index: int) -> tuple[int, int] | None:
    listed = config.get("attn_type_list")  # MiniMax-Text-01's own config.json: 0 is lightning attention
    default = ("full_attention" if listed[index] else "linear_attention") if listed else None
    default = default or ("linear_attention" if index % 2 else "full_attention")
    if _layer_type(config, index, default) == "full_attention":
        return None
    heads, _, head = _heads(config)
    return 5 * int(config["hidden_size"]) * heads * head + heads * head, 0


def _delta(config: Config, index: int) -> tuple[int, int] | None:
    default = "linear_attention" if (index + 1) % config.get("full_attention_interval", 4) else "full_attention"
    if _layer_type(config, index, default) == "full_attention":
        return None
    hidden, value_heads = int(config["hidden_size"]), config.get("linear_num_value_heads", 32)
    keys = config.get("linear_num_key_heads", 16) * config.get("linear_key_head_dim", 128)
    value = config.get("linear_value_head_dim", 128)
    values = value_heads * value
    size = hidden * (2 * keys + 2 * values) + 2 * hidden * value_heads + values * hidden
    size += (2 * keys + values) * config.get("linear_conv_kernel_dim", 4) + 2 * value_heads + value
    return size, 0
