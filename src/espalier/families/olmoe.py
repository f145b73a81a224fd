"""OLMoE (OLMoE-1B-7B): every layer is a MoE block; `intermediate_size` is an expert's width."""

from espalier.families import Family

FAMILY = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    block="model.layers.{layer}.mlp",
    experts=(
        "experts.{expert}.gate_proj.weight",
        "experts.{expert}.up_proj.weight",
        "experts.{expert}.down_proj.weight",
    ),
    router=("gate.weight",),
    expert_keys=("num_local_experts", "num_experts"),
    width_key="intermediate_size",
)
