"""Phi-3.5-MoE: Mixtral's names; sparsemixer always picks two experts, each weighted against its near rivals."""

from espalier.errors import UserError
from espalier.families import W1_W3_W2, Config, Family


def _router_kind(config: Config) -> str:
    if config.get("num_experts_per_tok", 2) != 2:
        raise UserError(
            f"config.json: num_experts_per_tok={config['num_experts_per_tok']}, but the phimoe router picks 2 "
            "whatever it says. Set it to 2."
        )
    return "sparsemixer"


FAMILY = Family(
    model_type="phimoe",
    architecture="PhimoeForCausalLM",
    block="model.layers.{layer}.block_sparse_moe",
    experts=W1_W3_W2,
    router=("gate.weight",),
    expert_keys=("num_local_experts",),
    width_key="intermediate_size",
    router_module="router",
    renormalise=lambda config: False,
    router_kind=_router_kind,
)
