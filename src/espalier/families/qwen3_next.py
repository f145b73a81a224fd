"""Qwen3-Next: linear attention in three of four layers; the MoE blocks are Qwen2-MoE's, renormalised."""

from espalier.families import GATE_UP_DOWN, Family
from espalier.families.qwen2_moe import sparse_layers

FAMILY = Family(
    model_type="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    block="model.layers.{layer}.mlp",
    experts=GATE_UP_DOWN,
    router=("gate.weight",),
    expert_keys=("num_experts", "num_local_experts"),
    renormalise=lambda config: bool(config.get("norm_topk_prob", True)),
    moe_layers=sparse_layers,
)
