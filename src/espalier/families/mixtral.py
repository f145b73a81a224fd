"""Mixtral (Mixtral-8x7B, Mixtral-8x22B): w1 gate, w3 up, w2 down; always renormalises."""

from espalier.families import W1_W3_W2, Family

FAMILY = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    block="model.layers.{layer}.block_sparse_moe",
    experts=W1_W3_W2,
    router=("gate.weight",),
    expert_keys=("num_experts", "num_local_experts"),
    width_key="intermediate_size",
    renormalise=lambda config: True,
)
