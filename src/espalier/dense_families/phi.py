"""Phi-1, 1.5 and 2: an FFN without a gate, biases everywhere, attention and FFN side by side."""

from espalier.dense_families import DenseFamily

FAMILY = DenseFamily(
    model_type="phi", architecture="PhiForCausalLM", gate=None, up="fc1", down="fc2", activation="activation_fn"
)
