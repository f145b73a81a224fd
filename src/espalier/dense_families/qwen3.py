"""Qwen3: queries and keys are normalised."""

from espalier.dense_families import DenseFamily

FAMILY = DenseFamily(model_type="qwen3", architecture="Qwen3ForCausalLM")
