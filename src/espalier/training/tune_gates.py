"""Training sigmoid gates to a budget (DSMoE, arXiv 2502.12455): L1 term, its controller, the threshold in the end.

Shapes: B sequences, L tokens, T = B x L, U units of a layer, F neurons.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from espalier.dense_families import DenseFamily
from espalier.errors import UserError
from espalier.training.threshold import find_threshold
from espalier.training.train import Step

FACTOR = 1.2  # per step (ReMoE, arXiv 2412.14711)
RANGE = 1e6  # at most so many times the first coefficient, or as small a part of it


class Gates:
    """The gated FFNs of a model, and what they did in the last forward pass.

    UserError when there are none.
    """

    def __init__(self, model: Any, family: DenseFamily, where: str) -> None:
        every = (getattr(layer, family.module) for layer in model.model.layers)
        self.layers = len(model.model.layers)
        self.ffns = [ffn for ffn in every if getattr(getattr(ffn, "router", None), "choose", None) == "threshold"]
        if not self.ffns:
            raise UserError(f"{where} trains gates with a threshold, and the model has none. Use method=dsmoe.")

    def loss(self, mask: Tensor | None) -> Tensor:
        """Return (1 / layers units) sum G(q) (equation 19), the mean over tokens; `mask` [B, L] or None.

        G(q) is q where the unit runs and 0 elsewhere, so that only gates of running units are pushed down.
        """
        return torch.stack([self._kept(ffn.router.gates, mask).mean() for ffn in self.ffns]).mean()

    @torch.no_grad()
    def active(self, mask: Tensor | None) -> float:
        """Return the fraction of the FFNs' neurons that a token ran, the mean over tokens and all gated layers."""
        parts = [self._kept(ffn.active_neurons(ffn.router.gates), mask).float().mean() for ffn in self.ffns]
        return float(sum(parts)) / sum(sum(ffn.segments) for ffn in self.ffns)

    @staticmethod
    def _kept(rows: Tensor, mask: Tensor | None) -> Tensor:
        return rows if mask is None else rows[mask.flatten().bool()]

    @torch.no_grad()
    def set_threshold(
        self, model: Any, batches: Sequence[tuple[Tensor, Tensor | None]], target: float
    ) -> tuple[float, float]:
        """Set one threshold for all layers at which tokens run the fraction `target` of neurons.

        Returns it and the fraction that ran. `batches`: ids and mask [B, L].
        """
        scores: list[Tensor] = []

        def observe(tau: float) -> float:
            self._set(tau)
            scores[:], found = self._observe(model, batches)
            return found

        first = float(self.ffns[0].router.threshold)
        tau, found = find_threshold(observe, lambda target: self._wanted(scores, target), first, target)
        self._set(tau)
        return tau, found

    def _set(self, tau: float) -> None:
        for ffn in self.ffns:
            ffn.router.threshold = tau

    def _observe(self, model: Any, batches: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[list[Tensor], float]:
        """Return sigmoids of all scores [T, U] by layer, and the fraction of neurons that ran."""
        seen: list[list[Tensor]] = [[] for _ in self.ffns]
        active, tokens = 0.0, 0
        handles = [
            ffn.router.register_forward_pre_hook(self._keeper(ffn, own), with_kwargs=False)
            for ffn, own in zip(self.ffns, seen, strict=True)
        ]
        try:
            for ids, mask in batches:
                start = [len(own) for own in seen]
                model(input_ids=ids, attention_mask=mask, use_cache=False)
                count = ids.numel() if mask is None else int(mask.sum())
                active, tokens = active + count * self.active(mask), tokens + count
                for own, first in zip(seen, start, strict=True):
                    own[first:] = [self._kept(part, mask) for part in own[first:]]
        finally:
            for handle in handles:
                handle.remove()
        return [torch.cat(own) for own in seen], active / tokens

    @staticmethod
    def _keeper(ffn: Any, own: list[Tensor]) -> Any:
        def keep(router: Any, inputs: Any) -> None:
            own.append(router.scores(*inputs).sigmoid().cpu())

        return keep

    def _wanted(self, scores: list[Tensor], target: float) -> float:
        """Return the threshold at which these gates would run the fraction `target`, by bisection."""
        widths = [
            torch.tensor([float(ffn.unit_width(u)) for u in range(q.shape[1])])
            for ffn, q in zip(self.ffns, scores, strict=True)
        ]
        whole = sum(sum(ffn.segments) for ffn in self.ffns)
        always = sum(sum(ffn.segments[: ffn.shared]) for ffn in self.ffns)

        def fraction(tau: float) -> float:
            total = float(always)
            for q, width in zip(scores, widths, strict=True):
                runs = q > tau
                runs |= torch.nn.functional.one_hot(q.argmax(1), q.shape[1]).bool() & ~runs.any(1, keepdim=True)
                total += float((runs.float() @ width).mean())
            return total / whole

        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if fraction(middle) > target else (low, middle)
        return (low + high) / 2


class Controller:
    """The coefficient of the L1 term: as given, or moved by 1.2 a step towards the `target` fraction of neurons."""

    def __init__(self, start: float, target: float | None) -> None:
        self.start, self.target = start, target
        self.coefficient = start

    def follow(self, curve: Sequence[Step]) -> None:
        """Set the coefficient for the step after those of `curve`, which know what fraction ran."""
        self.coefficient = self.start
        if self.target is None:
            return
        for step in curve:
            factor = FACTOR if step.measured["active"] > self.target else 1 / FACTOR
            wanted = self.coefficient * factor
            self.coefficient = min(max(wanted, self.start / RANGE), self.start * RANGE)


def batches_of(ids: Tensor, mask: Tensor | None, size: int, device: str) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield ids and mask, `size` sequences at a time."""
    for start in range(0, len(ids), size):
        part = slice(start, start + size)
        yield ids[part].to(device), None if mask is None else mask[part].to(device)
