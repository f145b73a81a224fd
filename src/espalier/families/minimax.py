"""MiniMax-Text-01, MiniMax-M1: lightning attention; the MoE blocks are Mixtral's."""

from espalier.families import Family

FAMILY = Family(
    model_type="minimax",
    architecture="MiniMaxForCausalLM",
    block="model.layers.{layer}.block_sparse_moe",
    experts=("experts.{expert}.w1.weight", "experts.{expert}.w3.weight", "experts.{expert}.w2.weight"),
    router=("gate.weight",),
    expert_keys=("num_experts", "num_local_experts"),
    width_key="intermediate_size",
    renormalise=lambda config: True,
)
