"""Learn a mask of the experts: DiEP, differentiable expert pruning (Bai et al., NeurIPS 2025, arXiv 2509.16105).

The paper relaxes a block to F'(x) = beta_l sum_i softmax(alpha_l)_i FFN_i(x) and learns alpha and beta, all weights
frozen. What it leaves open is settled here as follows. Routing stays: of the experts that the router chose, with its
weights w_i, each is multiplied by its mask,

    F'(x) = sum_{i in TopK(x)} m_i w_i FFN_i(x),   m_i = start E beta_l softmax(alpha_l)_i

and the weights are not scaled to sum to 1 again, since a single chosen expert would then feel no mask. alpha starts at
0 and beta at 1, so that every mask starts at `start`, and start beta_l stays the mean mask of a layer. F in the loss is
what the block gives without masks on the same input: F' and F share the experts' outputs, so that it costs no second
pass, and what earlier blocks changed is left to the next-token loss.

With start = 1 the block is the original's at first. Hardly anything is learnt from there: the norm has its kink at
F' = F and holds every mask where it is, the next-token loss of a trained model has no slope to speak of, and an expert
that adds nothing may rank first. With start = 1 / E, the formula above to the letter, the model is no language model
any more. From start = 1 / 2, the default, the masks of a layer share out less than there was, every expert that gets
less than it needs pulls, and those that add nothing lose. Perplexity of the embedded model (13.8), 25 % and 50 %
dropped: start = 1/2 18.1 and 34.9 with a global budget, 20.5 and 34.7 with a uniform one; start = 1 21.0 and 37.0,
29.7 and 75.6; start = 1/E (rate 0.005) 40.3 and 54.0, 29.7 and 61.6.

Shapes: B sequences, L tokens, T = B x L, E experts, K chosen, D hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from espalier.checkpoints.shape import ModelShape
from espalier.errors import UserError
from espalier.families import Family
from espalier.models.runtime import moe_blocks
from espalier.training.tune_losses import next_token

NAME = "espalier_masked"


class Fit(nn.Module):
    """Masks alpha float32 [layers, E] and beta [layers] of a model, whose own parameters stay as they are.

    `start` is every mask at the start, `penalty` what sum_l ||F'_l - F_l||_F counts beside the next-token loss,
    `alternate` how many updates of alpha come before each of beta. The norm is over all unmasked tokens of a
    micro-batch.
    """

    model: Any

    def __init__(
        self,
        model: Any,
        shape: ModelShape,
        family: Family,
        *,
        start: float = 1.0,
        penalty: float = 0.01,
        alternate: int = 3,
    ) -> None:
        super().__init__()
        self.__dict__["model"] = model  # not one of its modules: only masks are learnt
        self.shape, self.family = shape, family
        self.start, self.penalty, self.alternate = start, penalty, alternate
        self.alpha = nn.Parameter(torch.zeros(len(shape.layers), shape.experts))
        self.beta = nn.Parameter(torch.ones(len(shape.layers)))

    def masks(self, step: int | None = None) -> Tensor:
        """Return m float32 [layers, E]; at a `step` only alpha, or only beta, has a gradient."""
        alpha: Tensor = self.alpha
        beta: Tensor = self.beta
        if step is not None:
            second = step % (self.alternate + 1) == self.alternate
            alpha, beta = (alpha.detach(), beta) if second else (alpha, beta.detach())
        return self.start * self.shape.experts * alpha.softmax(-1) * beta[:, None]

    def forward(self, ids: Tensor, mask: Tensor | None, step: int | None = None) -> dict[str, Tensor]:
        """Return the terms of the loss on `ids` int64 [B, L] with `mask` [B, L] or None."""
        rows = None if mask is None else mask.flatten().bool()
        norms: list[Tensor] = []
        with masked(self.model, dict(zip(self.shape.layers, self.masks(step), strict=True)), self.family, norms, rows):
            logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        if len(norms) != len(self.shape.layers):
            missing = len(self.shape.layers) - len(norms)
            raise UserError(
                f"model: {missing} MoE blocks do not use transformers' experts interface, so that no mask can be "
                "learnt. Use a stock class of transformers."
            )
        return {"lm": next_token(logits, ids, mask), "output": self.penalty * torch.stack(norms).sum()}

    def arrays(self) -> dict[int, dict[str, NDArray[np.float32]]]:
        """Return what was learnt: by layer `alpha` float32 [E] and `beta` float32 [1]."""
        alpha, beta = self.alpha.detach().cpu().numpy(), self.beta.detach().cpu().numpy()
        return {layer: {"alpha": alpha[n], "beta": beta[n : n + 1]} for n, layer in enumerate(self.shape.layers)}


@contextlib.contextmanager
def masked(
    model: Any, masks: Mapping[int, Tensor], family: Family, norms: list[Tensor], rows: Tensor | None = None
) -> Iterator[None]:
    """Multiply what each chosen expert adds by its mask [E], by layer, in the forward passes inside.

    `norms` gets ||F' - F||_F of each block, float32, over the tokens that `rows` bool [T] keeps.
    """
    ALL_EXPERTS_FUNCTIONS.register(NAME, _masked_experts)
    with contextlib.ExitStack() as undo:
        configs = {}
        for layer, block in moe_blocks(model, family).items():
            experts, apply = block.experts, _Masked(masks[layer], norms, rows)
            if family.scales_input:  # every expert runs on every token, on nothing where it was not chosen
                undo.callback(experts.register_forward_hook(partial(_mask_outputs, apply)).remove)
                continue
            experts.espalier_mask = apply
            undo.callback(delattr, experts, "espalier_mask")
            configs[id(experts.config)] = experts.config
        for config in configs.values():
            undo.callback(setattr, config, "_experts_implementation", config._experts_implementation)
            config._experts_implementation = NAME
        yield


class _Masked:
    """The mask of one block, and where the norm of what it changes goes."""

    def __init__(self, mask: Tensor, norms: list[Tensor], rows: Tensor | None) -> None:
        self.mask, self.norms, self.rows = mask, norms, rows

    def change(self, difference: Tensor) -> None:
        """Hear F' - F, [T, D]."""
        kept = difference if self.rows is None else difference[self.rows]
        self.norms.append(torch.linalg.vector_norm(kept.float()))


def _masked_experts(experts: Any, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    apply: _Masked = experts.espalier_mask
    tokens, chosen = indices.shape
    each, ones = hidden.repeat_interleave(chosen, dim=0), hidden.new_ones(tokens * chosen, 1)
    routed = grouped_mm_experts_forward(experts, each, indices.reshape(-1, 1), ones).view(tokens, chosen, -1)
    nobody = (indices >= experts.num_experts).unsqueeze(-1)
    routed = routed.masked_fill(nobody, 0.0)  # "no expert" rows are uninitialised
    mask = torch.cat([apply.mask, apply.mask.new_ones(1)])[indices].unsqueeze(-1)  # [T, K, 1]
    each_weight = weights.unsqueeze(-1)  # times a float32 mask is float32 where it is narrower
    apply.change((routed * (each_weight * (mask - 1)).to(weights.dtype)).sum(dim=1))
    output: Tensor = (routed * (each_weight * mask).to(weights.dtype)).sum(dim=1).to(hidden.dtype)
    return output


def _mask_outputs(apply: _Masked, experts: Any, inputs: Any, output: Tensor) -> Tensor:
    by_expert = output.view(experts.num_experts, -1, output.shape[-1])  # [E, T, D]
    mask = apply.mask.to(output.dtype)[:, None, None]
    apply.change((by_expert * (mask - 1)).sum(dim=0))
    return (by_expert * mask).view_as(output)
