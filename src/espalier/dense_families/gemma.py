"""Gemma: GELU gates, embeddings tied and scaled."""

from espalier.dense_families import DenseFamily

FAMILY = DenseFamily(model_type="gemma", architecture="GemmaForCausalLM")
