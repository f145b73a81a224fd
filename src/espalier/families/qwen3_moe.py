"""Qwen3-MoE (Qwen3-30B-A3B): Qwen2-MoE's tensor names without the shared expert."""

from espalier.families import GATE_UP_DOWN, Family
from espalier.families.qwen2_moe import sparse_layers

FAMILY = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    block="model.layers.{layer}.mlp",
    experts=GATE_UP_DOWN,
    router=("gate.weight",),
    expert_keys=("num_local_experts", "num_experts"),
    moe_layers=sparse_layers,
)
