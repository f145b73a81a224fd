"""MiniMax-M2: Mixtral's names, sigmoid scores, a correction bias beside the gate that only chooses."""

from espalier.families import W1_W3_W2, Family

FAMILY = Family(
    model_type="minimax_m2",
    architecture="MiniMaxM2ForCausalLM",
    block="model.layers.{layer}.block_sparse_moe",
    experts=W1_W3_W2,
    router=("gate.weight", "e_score_correction_bias"),
    expert_keys=("num_experts", "num_local_experts"),
    width_key="intermediate_size",
    renormalise=lambda config: True,
    router_kind=lambda config: "sigmoid with a correction bias",
)
