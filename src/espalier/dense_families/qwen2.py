"""Qwen1.5, Qwen2 and Qwen2.5: biases in the attention's projections."""

from espalier.dense_families import DenseFamily

FAMILY = DenseFamily(model_type="qwen2", architecture="Qwen2ForCausalLM")
