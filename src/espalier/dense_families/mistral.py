"""Mistral 7B and others of its architecture."""

from espalier.dense_families import DenseFamily

FAMILY = DenseFamily(model_type="mistral", architecture="MistralForCausalLM")
