"""OLMoE (OLMoE-1B-7B): every layer is a MoE block; `intermediate_size` is an expert's width."""

from espalier.families import GATE_UP_DOWN, Family

FAMILY = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    block="model.layers.{layer}.mlp",
    experts=GATE_UP_DOWN,
    router=("gate.weight",),
    expert_keys=("num_local_experts", "num_experts"),
    width_key="intermediate_size",
)
