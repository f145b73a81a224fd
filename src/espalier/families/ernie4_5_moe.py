"""ERNIE 4.5 (21B-A3B, 300B-A47B): softmax weights, chosen with a correction bias; dense first layers."""

from espalier.families import GATE_UP_DOWN, Config, Family


def _moe_layers(config: Config) -> list[int]:
    last, step = config.get("moe_layer_end_index", -1), config.get("moe_layer_interval", 1)
    last = config["num_hidden_layers"] - 1 if last == -1 else last
    every = range(config.get("moe_layer_start_index", 1), min(last + 1, config["num_hidden_layers"]))
    return [layer for layer in every if (layer + 1) % step == 0]


FAMILY = Family(
    model_type="ernie4_5_moe",
    architecture="Ernie4_5_MoeForCausalLM",
    block="model.layers.{layer}.mlp",
    experts=GATE_UP_DOWN,
    router=("gate.weight",),
    router_columns=("moe_statics.e_score_correction_bias",),  # [1, E]
    width_shared=True,
    expert_keys=("num_experts", "moe_num_experts"),
    top_k_key="moe_k",
    renormalise=lambda config: True,
    moe_layers=_moe_layers,
    router_kind=lambda config: "softmax with a correction bias",
)
