"""Dynamic skipping of a stock block in memory, one token at a time: the reference for the code that ships."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from espalier.errors import UserError
from espalier.plans.operations import Merge, Operation, Skip, protected_tokens
from espalier.plans.plan_tensors import PlanTensor

Routed = tuple[Tensor, Tensor, Tensor]


def paid_attention(attention: nn.Module, kwargs: Mapping[str, Any], output: Any) -> tuple[Tensor, Tensor] | None:
    """Return how much attention each token is paid by those of its sequence from it on, and which tokens are real.

    float32 [B, L], the mean over heads and over those tokens, and bool [B, L]. `kwargs` and `output` are those of an
    attention module's forward. None where L is 1 or the keys are not the L tokens (a cache). UserError without
    attention weights.
    """
    weights = output[1] if isinstance(output, tuple) else None
    if weights is None or weights.dim() != 4:
        raise UserError(
            f"model: {type(attention).__name__} gives no attention weights, which tell a token's importance. Load the "
            "model with attn_implementation='eager', or use a method that protects no tokens."
        )
    batch, _, length, keys = weights.shape
    if length == 1 or length != keys:
        return None
    mask = kwargs.get("attention_mask")
    real = torch.ones(batch, length, dtype=torch.bool, device=weights.device)
    if mask is not None:  # only padding is hidden from itself
        real = torch.stack([mask[row % len(mask), 0].diagonal() >= 0 for row in range(batch)])
    paid = torch.zeros(batch, length, device=weights.device)
    for row in range(batch):
        mean = weights[row].mean(0, dtype=torch.float32)
        alive = real[row].nonzero()[:, 0]
        square = mean[alive][:, alive]  # from, to
        later = torch.arange(len(alive), 0, -1, device=weights.device)
        paid[row, alive] = square.tril().sum(0) / later
    return paid, real


class LiveSkip:
    """The hooks that make a router leave out experts: their weights become 0."""

    def __init__(
        self,
        skip: Skip,
        block: Any,
        before: Sequence[Operation],
        renormalise: bool,
        tensors: Mapping[str, PlanTensor],
    ) -> None:
        """`before` are the operations that were done to `block`; of a merge the members stand for their group."""
        self.skip = skip
        self.renormalise = renormalise
        self.factor = None if skip.factor is None else tensors[skip.factor].read()
        merges = [operation for operation in before if isinstance(operation, Merge) and operation.router == "remap"]
        self.stored: list[int] | None = merges[-1].expert_map() if merges else None
        if hasattr(block, "expert_map"):  # of a checkpoint that was merged
            self.stored = block.expert_map.tolist()
        self._paid: tuple[Tensor, Tensor] | None = None

    def watch_attention(self, attention: Any) -> None:
        """Look at an attention module's weights, which it is made to give."""
        attention.config._attn_implementation = "eager"
        attention.register_forward_hook(self._attention_hook, with_kwargs=True)

    def _attention_hook(self, attention: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        self._paid = paid_attention(attention, kwargs, output)

    def router_hook(self, router: nn.Module, inputs: Any, output: Routed) -> Routed:
        """Return the router's output with changed weights."""
        logits, weights, indices = output
        changed = weights.float().clone()
        protected = self._protected(inputs[0].reshape(len(changed), -1))
        for token, row in enumerate(changed):  # one token's K weights
            if token in protected:
                continue
            order = row.argsort(descending=True, stable=True)
            falling = row[order].clone()
            dropped = order[~self._kept(falling, indices[token][order], logits.reshape(len(changed), -1)[token])]
            row[dropped] = 0
            if self.renormalise and len(dropped):
                row *= falling.sum() / row.sum()
        return logits, changed.to(weights.dtype), indices

    def _kept(self, weights: Tensor, rows: Tensor, logits: Tensor) -> Tensor:
        """Which of the K experts stay, [K], for weights that fall, and their router rows."""
        skip, count = self.skip, len(weights)
        if skip.rule == "ratio":
            assert skip.beta is not None
            kept = [True] * count
            for j in range(1, count):
                beta = skip.beta if self.factor is None else skip.beta * float(self._factor_of(rows[0], rows[j]))
                kept[j] = bool(weights[j] >= beta * weights[0])
            return torch.tensor(kept)
        first = next(i for i in range(1, count + 1) if i == count or self._enough(weights, rows, logits, i))
        return torch.arange(count) < first

    def _factor_of(self, first: Tensor, other: Tensor) -> Any:
        assert self.factor is not None
        one, two = int(first), int(other)
        return self.factor[one, two] if self.stored is None else self.factor[self.stored[one], self.stored[two]]

    def _enough(self, weights: Tensor, rows: Tensor, logits: Tensor, kept: int) -> bool:
        """Whether the first `kept` of K experts suffice by the rule."""
        skip = self.skip
        if skip.rule == "tail":
            assert skip.beta is not None
            return bool(weights[kept:].sum() <= skip.beta * weights.sum())
        if skip.rule == "top_p":
            assert skip.p is not None
            return skip.p < 1 and bool(logits.float().softmax(-1)[rows[:kept]].sum() >= skip.p)
        return kept == skip.k

    def _protected(self, hidden: Tensor) -> set[int]:
        """Return which of the rows of `hidden` [T, D] keep all experts."""
        paid, self._paid = self._paid, None
        if paid is None or self.skip.protect is None:
            return set()
        found: set[int] = set()
        length = paid[0].shape[1]
        for sequence, (share, real) in enumerate(zip(*paid, strict=True)):
            tokens = real.nonzero()[:, 0]
            importance = hidden[sequence * length + tokens].float().abs().sum(-1) * share[tokens]
            best = importance.argsort(descending=True, stable=True)[: protected_tokens(self.skip.protect, len(tokens))]
            found |= set((sequence * length + tokens[best]).tolist())
        return found
