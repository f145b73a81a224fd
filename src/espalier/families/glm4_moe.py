"""GLM-4.5, GLM-4.6: DeepSeek-V3's blocks and router, published with one group."""

from espalier.families import Config, Family


def _moe_layers(config: Config) -> list[int]:
    return list(range(config.get("first_k_dense_replace", 1), config["num_hidden_layers"]))


FAMILY = Family(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    block="model.layers.{layer}.mlp",
    experts=(
        "experts.{expert}.gate_proj.weight",
        "experts.{expert}.up_proj.weight",
        "experts.{expert}.down_proj.weight",
    ),
    router=("gate.weight", "gate.e_score_correction_bias"),
    expert_keys=("num_local_experts", "n_routed_experts"),
    renormalise=lambda config: bool(config.get("norm_topk_prob", True)),
    moe_layers=_moe_layers,
    router_kind=lambda config: "sigmoid with a correction bias",
    groups=lambda config: (config.get("n_group", 1), config.get("topk_group", 1)),
    group_least=2,
)
