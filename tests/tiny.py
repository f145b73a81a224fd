"""Tiny random models of each family and their tokenizer, written as ordinary Hugging Face directories."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

CLASSIC = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")  # softmax routers, one tensor an expert
FAMILIES = (
    *CLASSIC,
    "deepseek_v2",
    "deepseek_v3",
    "ernie4_5_moe",
    "glm4_moe",
    "gpt_oss",
    "granitemoe",
    "jamba",
    "llama4_text",
    "minimax",
    "minimax_m2",
    "phimoe",
    "qwen3_next",
)
ONE_EXPERT = ("llama4_text",)  # a token: nothing to skip, and no second weight to compare with
DENSE_LAYERS = {  # of three; the others hold a MoE block
    "deepseek_v2": (0,),
    "deepseek_v3": (0,),
    "ernie4_5_moe": (0,),
    "glm4_moe": (0,),
    "jamba": (1,),
    "llama4_text": (1,),
    "qwen2_moe": (1,),
    "qwen3_moe": (1,),
    "qwen3_next": (1,),
}
VOCABULARY = 96

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}

LATENT_ATTENTION = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}

OWN: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8, "intermediate_size": 24, "sliding_window": None},
    "olmoe": {"num_experts": 8, "intermediate_size": 24, "norm_topk_prob": False},
    "qwen2_moe": {
        "num_experts": 8,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "norm_topk_prob": False,
        "mlp_only_layers": [1],
    },
    "qwen3_moe": {
        "num_experts": 8,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "head_dim": 16,
        "mlp_only_layers": [1],
    },
    "deepseek_v2": {
        "n_routed_experts": 8,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.5,
        "topk_method": "group_limited_greedy",
        "n_group": 2,
        "topk_group": 1,
        "num_key_value_heads": 4,
        "head_dim": 8,
    }
    | LATENT_ATTENTION,
    "deepseek_v3": {
        "n_routed_experts": 8,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
        "num_key_value_heads": 4,
    }
    | LATENT_ATTENTION,
    "ernie4_5_moe": {
        "moe_num_experts": 8,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
    },
    "glm4_moe": {
        "n_routed_experts": 8,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "head_dim": 8,
        "n_group": 1,
        "topk_group": 1,
    },
    "gpt_oss": {
        "num_local_experts": 8,
        "intermediate_size": 24,
        "head_dim": 8,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "granitemoe": {"num_local_experts": 8, "intermediate_size": 24},
    "jamba": {
        "num_experts": 8,
        "intermediate_size": 24,
        "expert_layer_period": 2,
        "expert_layer_offset": 0,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
    },
    "llama4_text": {
        "num_local_experts": 8,
        "intermediate_size": 24,
        "intermediate_size_mlp": 48,
        "num_experts_per_tok": 1,
        "head_dim": 8,
        "moe_layers": [0, 2],
        "attention_chunk_size": 6,
        "no_rope_layer_interval": 2,
        "floor_scale": 4,
    },
    "minimax": {"num_local_experts": 8, "intermediate_size": 24, "head_dim": 8, "block_size": 16},
    "minimax_m2": {"num_local_experts": 8, "intermediate_size": 24, "head_dim": 8},
    "phimoe": {"num_local_experts": 8, "intermediate_size": 24, "router_jitter_noise": 0.2},
    "qwen3_next": {
        "num_experts": 8,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "norm_topk_prob": True,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "mlp_only_layers": [1],
    },
}


def tiny_config(family_name: str, **changes: Any) -> PreTrainedConfig:
    """Return the config of a tiny model: 3 layers, D=32, F=24, E=8, K=2 (1 in ONE_EXPERT), 96 tokens.

    `changes` replaces keys. `experts=N` and `top_k=N` work for every family. Some layers are dense
    (DENSE_LAYERS); for the qwen families not when `mlp_only_layers=[]` is given.
    """
    own = OWN[family_name]
    keys = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    if "experts" in changes:
        changes[next(key for key in keys if key in own)] = changes.pop("experts")
    if "top_k" in changes:
        changes["num_experts_per_tok"] = changes.pop("top_k")
    return AutoConfig.for_model(family_name, **(COMMON | own | changes))


def save_tokenizer(directory: Path) -> None:
    """Write a word-level tokenizer whose words are w3 .. w95, with pad 0, bos 1 and eos 2."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{n}": n for n in range(3, VOCABULARY - 1)}
    words["<unk>"] = VOCABULARY - 1
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(directory)


def save_tiny(
    family_name: str,
    directory: Path,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    max_shard_size: str = "5GB",
    **changes: Any,
) -> Path:
    """Write a tiny random model with its tokenizer into `directory` and return it.

    Equal arguments give equal bytes. `max_shard_size="20KB"` makes many shards.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family_name, **changes), dtype=dtype)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            # Spread logits, so that a small error cannot change the chosen experts.
            if name.endswith(("gate.weight", "router.weight", "router.bias")):
                torch.nn.init.normal_(tensor, std=0.5)
            elif name.endswith("e_score_correction_bias"):  # zeros in a new model
                torch.nn.init.normal_(tensor, std=0.1 if "moe_statics" in name else 0.5)
            elif name.endswith("proj_bias"):
                torch.nn.init.normal_(tensor, std=0.2)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    save_tokenizer(directory)
    return Path(directory)
