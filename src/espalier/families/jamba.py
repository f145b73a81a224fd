"""Jamba (Mini, Large): Mamba and attention layers; every second layer's feed-forward part is a MoE block."""

from espalier.checkpoints.layer_parts import LayerParts
from espalier.families import GATE_UP_DOWN, Config, Family


def _moe_layers(config: Config) -> list[int]:
    period, offset = config.get("expert_layer_period", 2), config.get("expert_layer_offset", 1)
    return [layer for layer in range(config["num_hidden_layers"]) if layer % period == offset]


def _attention_layers(config: Config) -> list[int]:
    period, offset = config.get("attn_layer_period", 8), config.get("attn_layer_offset", 4)
    return [layer for layer in range(config["num_hidden_layers"]) if layer % period == offset]


FAMILY = Family(
    model_type="jamba",
    architecture="JambaForCausalLM",
    block="model.layers.{layer}.feed_forward",
    experts=GATE_UP_DOWN,
    router=("router.weight",),
    width_shared=True,
    expert_keys=("num_local_experts", "num_experts"),
    width_key="intermediate_size",
    module="feed_forward",
    router_module="router",
    renormalise=lambda config: False,
    moe_layers=_moe_layers,
    parts=LayerParts(attends=_attention_layers),
    least_experts=2,  # with one the class builds a dense layer
)
