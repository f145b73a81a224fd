"""Qwen1.5-MoE and Qwen2-MoE: a sigmoid-gated shared expert beside the routed ones, no renormalisation by default."""

from espalier.families import GATE_UP_DOWN, Config, Family


def sparse_layers(config: Config) -> list[int]:
    """Return the layers that hold a MoE block: every `decoder_sparse_step`-th but those in `mlp_only_layers`."""
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    return [n for n in range(config["num_hidden_layers"]) if n not in dense and (n + 1) % step == 0]


FAMILY = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    block="model.layers.{layer}.mlp",
    experts=GATE_UP_DOWN,
    router=("gate.weight",),
    expert_keys=("num_experts", "num_local_experts"),
    moe_layers=sparse_layers,
)
