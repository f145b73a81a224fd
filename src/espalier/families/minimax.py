"""MiniMax-Text-01, MiniMax-M1: lightning attention; the MoE blocks are Mixtral's."""

from espalier.families import W1_W3_W2, Family

FAMILY = Family(
    model_type="minimax",
    architecture="MiniMaxForCausalLM",
    block="model.layers.{layer}.block_sparse_moe",
    experts=W1_W3_W2,
    router=("gate.weight",),
    expert_keys=("num_experts", "num_local_experts"),
    width_key="intermediate_size",
    renormalise=lambda config: True,
)
