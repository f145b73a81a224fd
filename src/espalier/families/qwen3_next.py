"""Qwen3-Next: linear attention in three of four layers; the MoE blocks are Qwen2-MoE's, renormalised."""

from espalier.families import Family
from espalier.families.qwen2_moe import sparse_layers

FAMILY = Family(
    model_type="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    block="model.layers.{layer}.mlp",
    experts=(
        "experts.{expert}.gate_proj.weight",
        "experts.{expert}.up_proj.weight",
        "experts.{expert}.down_proj.weight",
    ),
    router=("gate.weight",),
    expert_keys=("num_experts", "num_local_experts"),
    renormalise=lambda config: bool(config.get("norm_topk_prob", True)),
    moe_layers=sparse_layers,
)
