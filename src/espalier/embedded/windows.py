"""Token windows of document lists and the perplexity of a causal model on them."""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase


def token_stream(texts: list[str], tokenizer: PreTrainedTokenizerBase, seed: int) -> Tensor:
    """All texts as one int64 stream [tokens], in an order drawn with `seed`, an end-of-text token before each."""
    order = list(range(len(texts)))
    random.Random(seed).shuffle(order)
    encoded = tokenizer([texts[index] for index in order], add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([token for ids in encoded for token in (tokenizer.bos_token_id, *ids)], dtype=torch.int64)


def windows(stream: Tensor, length: int, count: int | None = None) -> Tensor:
    """The stream's first `count` (default: all) consecutive windows, int64 [N, length]."""
    available = len(stream) // length
    count = available if count is None else min(count, available)
    return stream[: count * length].view(count, length)


@torch.no_grad()
def perplexity(model: nn.Module, input_ids: Tensor, batch: int = 8) -> float:
    """exp of the mean negative log-likelihood of tokens 2..L of every window of `input_ids` [N, L]."""
    was_training = model.training
    model.eval()
    total, tokens = 0.0, 0
    for chunk in torch.split(input_ids, batch):
        logits = model(input_ids=chunk, use_cache=False).logits[:, :-1].float()
        targets = chunk[:, 1:]
        total += functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
        tokens += targets.numel()
    model.train(was_training)
    return math.exp(total / tokens)
