"""Qwen3-Next: linear attention in three of four layers; the MoE blocks are Qwen2-MoE's, renormalised."""

from espalier.checkpoints.layer_parts import LayerParts, named_full
from espalier.families import GATE_UP_DOWN, Config, Family
from espalier.families.qwen2_moe import sparse_layers


def _attention_layers(config: Config) -> list[int]:
    if config.get("layer_types") is not None:
        return named_full(config)
    every = config.get("full_attention_interval", 4)
    return list(range(every - 1, config["num_hidden_layers"], every))


FAMILY = Family(
    model_type="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    block="model.layers.{layer}.mlp",
    experts=GATE_UP_DOWN,
    router=("gate.weight",),
    expert_keys=("num_experts", "num_local_experts"),
    renormalise=lambda config: bool(config.get("norm_topk_prob", True)),
    moe_layers=sparse_layers,
    parts=LayerParts(attends=_attention_layers),
)
