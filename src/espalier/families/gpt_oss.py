"""GPT-OSS in bf16: all experts of a block in one tensor, biases everywhere, softmax over the chosen logits."""

from espalier.checkpoints.layer_parts import LayerParts
from espalier.families import Family, NeuronAxis

FAMILY = Family(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    block="model.layers.{layer}.mlp",
    experts=(),
    stacked=(
        "experts.gate_up_proj",
        "experts.gate_up_proj_bias",
        "experts.down_proj",
        "experts.down_proj_bias",
    ),
    neurons=(NeuronAxis(1, "pairs"), NeuronAxis(0, "pairs"), NeuronAxis(0, down=True), None),
    router=("router.weight", "router.bias"),
    expert_keys=("num_experts", "num_local_experts"),
    width_key="intermediate_size",
    router_module="router",
    parts=LayerParts(ffn_pair=True),
    renormalise=lambda config: True,
)
