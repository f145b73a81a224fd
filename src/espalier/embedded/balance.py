"""Per-layer load-balancing loss of a top-k router (Shazeer et al. 2017; Switch Transformers, eq. 4).

    L = sum over layers of E * sum_i f_i * P_i

f_i is the share of the T*K chosen (token, expert) pairs that went to expert i and P_i the mean router
probability of expert i; each layer's term is 1 when both are uniform. transformers' own
`load_balancing_loss_func` averages f and P over all layers before it multiplies, which lets single
layers collapse onto a few experts as long as the sum looks even.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import OlmoeForCausalLM


def layer_balance(logits: Tensor, indices: Tensor) -> Tensor:
    """Balance of one layer from router logits [T, E] and chosen experts [T, K]; a scalar, 1.0 if uniform."""
    experts = logits.shape[-1]
    share = torch.bincount(indices.reshape(-1), minlength=experts).float() / indices.numel()  # [E]
    probability = torch.softmax(logits.float(), dim=-1).mean(dim=0)  # [E]
    return experts * torch.sum(share * probability)


@contextmanager
def router_outputs(model: OlmoeForCausalLM) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collect (logits [T, E], indices [T, K]) of every router, in layer order, at each forward pass.

    The caller clears the list between forward passes; the hooks are removed on leaving the context.
    """
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(_module: nn.Module, _inputs: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
        seen.append((output[0], output[2]))

    handles = [layer.mlp.gate.register_forward_hook(keep) for layer in model.model.layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
