"""Tiny random models of each family and their tokenizer, written as ordinary Hugging Face directories."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

FAMILIES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
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
}


def tiny_config(family_name: str, **changes: Any) -> PreTrainedConfig:
    """Return the config of a tiny model: 3 layers, D=32, F=24, E=8, K=2, 96 tokens.

    `changes` replaces keys. `experts=N` and `top_k=N` work for every family. Layer 1 of the qwen families is
    dense unless `mlp_only_layers=[]` is given.
    """
    if "experts" in changes:
        changes["num_local_experts" if family_name == "mixtral" else "num_experts"] = changes.pop("experts")
    if "top_k" in changes:
        changes["num_experts_per_tok"] = changes.pop("top_k")
    return AutoConfig.for_model(family_name, **(COMMON | OWN[family_name] | changes))


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
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight"):  # spread logits, so that a small error cannot change the chosen experts
                torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    save_tokenizer(directory)
    return Path(directory)
