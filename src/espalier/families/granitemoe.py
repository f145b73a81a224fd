"""Granite-MoE (Granite 3.x 1B-A400M, 3B-A800M): all experts of a block in one tensor, softmax over chosen logits."""

from espalier.families import Family, NeuronAxis

FAMILY = Family(
    model_type="granitemoe",
    architecture="GraniteMoeForCausalLM",
    block="model.layers.{layer}.block_sparse_moe",
    experts=(),
    stacked=("input_linear.weight", "output_linear.weight"),
    neurons=(NeuronAxis(0, "halves"), NeuronAxis(1, down=True)),
    router=("router.layer.weight",),
    expert_keys=("num_local_experts",),
    width_key="intermediate_size",
    module="block_sparse_moe",
    router_module="router",
    renormalise=lambda config: True,
)
