"""The losses of router tuning: next-token cross entropy, KL from a teacher's likeliest tokens, router entropy.

Shapes: B sequences, L tokens, V vocabulary, T tokens, D hidden, M likeliest tokens that are kept of the teacher.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def next_token(logits: Tensor, ids: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean cross entropy, in nats, of tokens 2..L from `logits` [B, L, V]; masked tokens do not count."""
    targets = ids[:, 1:]
    if mask is not None:
        targets = targets.masked_fill(~(mask[:, 1:].bool() & mask[:, :-1].bool()), -100)
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten())


def top_and_tail(logits: Tensor, indices: Tensor) -> Tensor:
    """Return the log probabilities [..., M + 1] of the tokens `indices` [..., M] and of all others together.

    In fp32; the last is -inf where `indices` holds the whole vocabulary.
    """
    wide = logits.float()
    whole = wide.logsumexp(-1, keepdim=True)
    top = wide.gather(-1, indices) - whole
    if indices.shape[-1] == logits.shape[-1]:
        return torch.cat([top, torch.full_like(whole, float("-inf"))], -1)
    rest = wide.scatter(-1, indices, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat([top, rest - whole], -1)


def divergence(logits: Tensor, log_probs: Tensor, indices: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean of `divergences` over tokens; those where `mask` [B, L] is 0 do not count."""
    each = divergences(logits, log_probs, indices)
    return each.mean() if mask is None else each[mask.bool()].mean()


def divergences(logits: Tensor, log_probs: Tensor, indices: Tensor) -> Tensor:
    """Return the KL divergence, in nats, of the model from a teacher over M + 1 classes, [...].

    logits [..., V] of the model; log_probs [..., M + 1] and indices [..., M] as `top_and_tail` makes them of the
    teacher's. Over the whole vocabulary it is the full KL, with less a lower bound of it.
    """
    found = top_and_tail(logits, indices.long())
    # What half precision rounded away is shared out, so that the classes sum to one and the loss is never negative.
    target = log_probs.float().log_softmax(-1)
    weight = target.exp()
    terms = torch.where(weight > 0, weight * (target - found), 0.0)
    if indices.shape[-1] == logits.shape[-1]:
        terms = torch.where(weight[..., :-1] > 0, weight[..., :-1] * (target - found)[..., :-1], 0.0)
    return terms.sum(-1)


def entropy(logits: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    """Return the entropy, in nats, of the softmax of router logits [T, rows], mean over tokens and layers.

    The term of SEER-MoE (arXiv 2404.05089), which makes routing peaked; `mask` [B, L] with B x L = T.
    """
    means = []
    for each in logits:
        log = each.flatten(0, -2).float().log_softmax(-1)
        if mask is not None:
            log = log[mask.flatten().bool()]
        means.append(-(log.exp() * log).sum(-1).mean())
    return torch.stack(means).mean()


def relative_error(output: Tensor, target: Tensor, scale: Tensor) -> Tensor:
    """Return ||output - target||^2 / ||scale||^2 over all tokens of [T, D], in fp32."""
    return (output.float() - target.float()).square().sum() / scale.float().square().sum()


@contextlib.contextmanager
def router_logits(routers: Sequence[nn.Module], place: int) -> Iterator[list[Tensor]]:
    """Yield a list that gets each router's logits, item `place` of what it returns, in every forward pass inside."""
    seen: list[Tensor] = []

    def keep(router: nn.Module, inputs: Any, output: Any) -> None:
        seen.append(output[place])

    handles = [router.register_forward_hook(keep) for router in routers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
