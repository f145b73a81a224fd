"""Gemma 2: norms before and after the FFN."""

from espalier.checkpoints.layer_parts import LayerParts
from espalier.dense_families import DenseFamily

FAMILY = DenseFamily(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    parts=LayerParts(outputs=("post_attention_layernorm", "post_feedforward_layernorm")),
)
