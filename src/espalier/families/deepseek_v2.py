"""DeepSeek-V2: shared experts, dense first layers, and routing within groups except in V2-Lite; never renormalises."""

from espalier.families import GATE_UP_DOWN, Config, Family


def layers_after_dense(config: Config) -> list[int]:
    """Return the layers that hold a MoE block: all from `first_k_dense_replace` on."""
    return list(range(config.get("first_k_dense_replace") or 0, config["num_hidden_layers"]))


def _grouped(config: Config) -> bool:
    return config.get("topk_method") == "group_limited_greedy"


def _groups(config: Config) -> tuple[int, int]:
    return (config.get("n_group") or 1, config.get("topk_group") or 1) if _grouped(config) else (1, 1)


def _router_kind(config: Config) -> str:
    factor = config.get("routed_scaling_factor", 1.0)
    within = " within groups" if _groups(config)[0] > 1 else ""
    return f"softmax{within}" + (f" times {factor:g}" if factor != 1 else "")


FAMILY = Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    block="model.layers.{layer}.mlp",
    experts=GATE_UP_DOWN,
    router=("gate.weight",),
    width_shared=True,
    expert_keys=("num_experts", "n_routed_experts"),
    renormalise=lambda config: False,  # transformers does not read norm_topk_prob here
    moe_layers=layers_after_dense,
    router_kind=_router_kind,
    groups=_groups,
)
