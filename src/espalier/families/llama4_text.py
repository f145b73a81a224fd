"""Llama 4's language model on its own: the router scales the experts' input, and every expert runs on every token."""

from espalier.checkpoints.layer_parts import LayerParts
from espalier.errors import UserError
from espalier.families import Config, Family, NeuronAxis


def _moe_layers(config: Config) -> list[int]:
    if config.get("moe_layers") is not None:
        return list(config["moe_layers"])
    step = config.get("interleave_moe_layer_step", 1)
    return list(range(step - 1, config["num_hidden_layers"], step))


def _router_kind(config: Config) -> str:
    k = config.get("num_experts_per_tok", 1)
    if k != 1:  # then two picks of one merged expert would not be one run of it
        raise UserError(f"config.json: num_experts_per_tok={k}; of llama4_text Espalier knows models with 1.")
    return "sigmoid of the largest logit on the experts' input"


FAMILY = Family(
    model_type="llama4_text",
    architecture="Llama4ForCausalLM",
    block="model.layers.{layer}.feed_forward",
    experts=(),
    stacked=("experts.gate_up_proj", "experts.down_proj"),
    neurons=(NeuronAxis(1, "halves"), NeuronAxis(0, down=True)),
    router=("router.weight",),
    expert_keys=("num_local_experts",),
    width_shared=True,
    width_key="intermediate_size",
    module="feed_forward",
    router_module="router",
    renormalise=lambda config: False,
    moe_layers=_moe_layers,
    router_kind=_router_kind,
    parts=LayerParts(refused="its attention is in chunks of the whole sequence"),
    scales_input=True,
)
