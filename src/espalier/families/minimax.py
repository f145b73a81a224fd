"""MiniMax-Text-01, MiniMax-M1: lightning attention; the MoE blocks are Mixtral's."""

from espalier.checkpoints.layer_parts import LayerParts, named_full
from espalier.families import W1_W3_W2, Config, Family


def _attention_layers(config: Config) -> list[int]:
    if config.get("layer_types") is not None:
        return named_full(config)
    return list(range(0, config["num_hidden_layers"], 2))  # transformers' default


FAMILY = Family(
    model_type="minimax",
    architecture="MiniMaxForCausalLM",
    block="model.layers.{layer}.block_sparse_moe",
    experts=W1_W3_W2,
    router=("gate.weight",),
    expert_keys=("num_experts", "num_local_experts"),
    width_key="intermediate_size",
    renormalise=lambda config: True,
    parts=LayerParts(attends=_attention_layers),
)
