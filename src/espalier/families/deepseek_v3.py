"""DeepSeek-V3, DeepSeek-R1: sigmoid scores, a bias that only chooses, groups scored by their two best experts."""

from espalier.families import GATE_UP_DOWN, Config, Family


def _moe_layers(config: Config) -> list[int]:
    return list(range(config.get("first_k_dense_replace", 3), config["num_hidden_layers"]))


FAMILY = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    block="model.layers.{layer}.mlp",
    experts=GATE_UP_DOWN,
    router=("gate.weight", "gate.e_score_correction_bias"),
    width_shared=True,
    expert_keys=("num_local_experts", "n_routed_experts"),
    renormalise=lambda config: bool(config.get("norm_topk_prob", True)),
    moe_layers=_moe_layers,
    router_kind=lambda config: "sigmoid with a correction bias",
    groups=lambda config: (config.get("n_group", 8), config.get("topk_group", 4)),
    group_least=2,
)
