"""Gemma 2: norms before and after the FFN."""

from espalier.dense_families import DenseFamily

FAMILY = DenseFamily(model_type="gemma2", architecture="Gemma2ForCausalLM")
