"""Training the gates of routed depth: load term, predictor's loss, the threshold in the end.

Shapes: B sequences, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from espalier.errors import UserError
from espalier.models.depth_count import depth_routers
from espalier.training.threshold import find_threshold

TERMS = ("product", "excess")


class DepthGates:
    """The routers of depth of a model, and what they did in the last forward pass.

    `load`: whether a term for the share of tokens that enter is asked for. UserError, which begins with `where`, when
    it is and no router has a threshold, or where nothing of what is trained would learn.
    """

    def __init__(self, model: Any, where: str, *, load: bool, straight_through: bool) -> None:
        self.routers = depth_routers(model)
        learnt = [router for router in self.routers.values() if router.rule == "threshold"]
        if load and not learnt:
            raise UserError(f"{where} trains gates with a threshold, and the model has none. Use method=modification.")
        masks = [router for router in learnt if router.weights == "mask"]
        if masks and not straight_through:
            raise UserError(
                f"{where}: weights=mask multiplies by nothing that a gate could learn from. Use straight_through=true."
            )
        self.gated = learnt
        for router in self.routers.values():
            router.straight_through = straight_through and "weight" in router._parameters
            router.predict = router.rule == "top_k"

    def load(self, mask: Tensor | None, kind: str, target: float | None) -> Tensor:
        """Return the load term over the routed layers; `mask` [B, L] or None.

        `product` is sum_j F_j G_j (MoDification, arXiv 2410.14268), with F_j the share of tokens that enter layer j, of
        no gradient, and G_j their mean gate. With a target it is sum_j (F - target) G_j instead, F the mean of all F_j:
        once too few tokens enter it lifts the gates, which the published term never does. `excess` is the mean of
        max(0, F_j - target), F_j with the gradient of the gates (MindSkip, arXiv 2410.13184).
        """
        terms = []
        over = None if target is None else self.kept(mask) - target
        for router in self.gated:
            gates, kept = _real(router.gates, mask), _real(router.kept, mask).float()
            if kind == "product":
                terms.append(gates.mean() * (kept.mean() if over is None else over))
            else:
                assert target is not None
                terms.append(functional.relu((kept + gates - gates.detach()).mean() - target) / len(self.gated))
        return torch.stack(terms).sum()

    def predictors(self, mask: Tensor | None) -> Tensor | None:
        """Return the mean cross entropy, in nats, of the predictors' guesses at who is among the largest; or None."""
        terms = [
            functional.binary_cross_entropy_with_logits(
                _real(router.predicted, mask), _real(router.kept, mask).to(router.predicted.dtype)
            )
            for router in self.routers.values()
            if router.predict
        ]
        return torch.stack(terms).mean() if terms else None

    @torch.no_grad()
    def kept(self, mask: Tensor | None) -> float:
        """Return the share of tokens that entered, the mean over routed layers."""
        return float(torch.stack([_real(r.kept, mask).float().mean() for r in self.routers.values()]).mean())

    @torch.no_grad()
    def set_threshold(
        self, model: Any, batches: Sequence[tuple[Tensor, Tensor | None]], target: float
    ) -> tuple[float, float]:
        """Set one threshold for all layers at which the share `target` of tokens enters.

        Returns it and the share that entered. `batches`: ids and mask [B, L].
        """
        gates = torch.empty(0)

        def observe(tau: float) -> float:
            nonlocal gates
            self._set(tau)
            gates, share = self._observe(model, batches)
            return share

        def propose(target: float) -> float:
            return float(gates.sort(descending=True).values[min(len(gates) - 1, round(target * len(gates)))])

        for router in self.gated:
            router.straight_through = False
        tau, share = find_threshold(observe, propose, float(self.gated[0].threshold), target)
        self._set(tau)
        return tau, share

    def _set(self, tau: float) -> None:
        for router in self.gated:
            router.threshold = tau

    def _observe(self, model: Any, batches: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, float]:
        """Return all gates of all layers [n], and the share of tokens that entered."""
        seen, kept = [], []
        for ids, mask in batches:
            model(input_ids=ids, attention_mask=mask, use_cache=False)
            seen += [_real(router.gates, mask).cpu() for router in self.gated]
            kept += [_real(router.kept, mask).cpu() for router in self.gated]
        return torch.cat(seen), float(torch.cat(kept).float().mean())


def _real(values: Tensor, mask: Tensor | None) -> Tensor:
    return values.flatten() if mask is None else values.flatten()[mask.flatten().bool()]
