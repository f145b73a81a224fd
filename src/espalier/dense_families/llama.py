"""Llama 2 and 3, SmolLM2 and others of their architecture."""

from espalier.dense_families import DenseFamily

FAMILY = DenseFamily(model_type="llama", architecture="LlamaForCausalLM")
