"""GLM-4.5, GLM-4.6: DeepSeek-V3's blocks and router, published with one group."""

from dataclasses import replace

from espalier.families import Config, deepseek_v3


def _moe_layers(config: Config) -> list[int]:
    return list(range(config.get("first_k_dense_replace", 1), config["num_hidden_layers"]))


FAMILY = replace(
    deepseek_v3.FAMILY,
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    moe_layers=_moe_layers,
    groups=lambda config: (config.get("n_group", 1), config.get("topk_group", 1)),
)
