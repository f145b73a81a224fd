"""Learn overlapping experts of an FFN: ToMoE (Gao et al., TMLR 2026, arXiv 2501.15316), its FFN part.

The model is frozen. A bidirectional GRU over the layers makes E embeddings a layer, v_e; a decoder a layer makes of an
embedding which of the F neurons the expert has, and a router which expert a token runs:

    masks    s = round(y), y = sigmoid((W_d GELU(LN(v)) + g + b) / T)       g = -log Exp(1), gradient of y
    router   r = one-hot argmax of softmax((W_r x + g) / T)                 its gradient that of the softmax
    FFN      W_down ((s act(W_gate x)) (s W_up x)),  s the mask of r V       an expert is not weighed by its probability

T and b stay as they are. Every token draws its own noise while this is learnt, and nobody draws any afterwards: an
exported expert has the neurons that the noise would leave on more often than not, those of W_d GELU(LN(v)) + b + m > 0
with m = -log log 2 the median of g, and the router takes its largest score. (The authors' code draws at export and
inference too.) The loss is, with coefficients of their command for LLaMA-2-7B,

    2 KD + 16 log(max(rho, p) / min(rho, p)) + 3 U + B

KD: cross entropy with the probabilities of the same model without masks. rho: neurons of the widest expert over F, mean
over layers, from masks drawn afresh; c = 0.001 is added to it and to the target p. U: the same penalty between the
fraction of neurons that some expert has and 1, summed over layers and divided by twice their number (there, attention
modules count, with 0). B: sum_e f_e P_e, with f and P the fraction of tokens of each expert, mean over layers.

The masks of attention are not learnt here, and rho counts FFNs alone.

The decoder has to travel from masks that are nearly full to the budget, which takes thousands of steps at the
authors' rate. A `prior` above 0, which they do not have, starts from what is known: prior (z_j + z) is added to the
logits of all experts, z_j the normal quantile of neuron j's rank by activity (root mean square of its activation times
the norm of its column in the down projection, on the first tokens of the text), z that of the target, so that the share
of the neurons above 0 is p. Then `offset` is best 0: experts start as static pruning by activity, and learn to differ.

Shapes: B sequences, L tokens, T' = B x L, D hidden, F neurons, E experts, M layers, e embedding.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from espalier.dense_families import DenseFamily
from espalier.observe_ffn import FFNTrace, observe_ffns
from espalier.runtime import decoder
from espalier.shape import DenseShape

SMOOTHING = 1e-3  # c
MEDIAN = -math.log(math.log(2))  # m
PRIOR_TOKENS = 4096  # on which neurons' activity is measured


class Fit(nn.Module):
    """The hypernetwork, routers and decoders of a model, whose own parameters stay as they are.

    `experts` E; `embedding` e; `target` p; `temperature` T; `offset` b; `prior`; the weights of the terms `distill`,
    `budget`, `union` and `balance`.
    """

    model: Any

    def __init__(
        self,
        model: Any,
        shape: DenseShape,
        family: DenseFamily,
        *,
        experts: int = 8,
        embedding: int = 128,
        target: float = 0.5,
        temperature: float = 0.4,
        offset: float = 3.0,
        prior: float = 0.0,
        distill: float = 2.0,
        budget: float = 16.0,
        union: float = 3.0,
        balance: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.__dict__["model"] = model  # not one of its modules: it is not learnt
        self.shape, self.family, self.experts, self.target = shape, family, experts, target
        self.temperature, self.offset, self.prior = temperature, offset, prior
        self.known = torch.zeros(len(shape.layers), shape.width)  # [M, F], what the prior adds
        self.distill, self.budget, self.union, self.balance = distill, budget, union, balance
        layers = len(shape.layers)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.inputs = nn.Parameter(torch.randn(layers, experts, embedding // 4))
            self.hypernetwork = nn.GRU(embedding // 4, embedding // 2, bidirectional=True)
            self.norms = nn.ModuleList(nn.LayerNorm(embedding) for _ in range(layers))
            self.decoders = nn.ModuleList(nn.Linear(embedding, shape.width, bias=False) for _ in range(layers))
            self.routers = nn.ModuleList(nn.Linear(shape.hidden, experts, bias=False) for _ in range(layers))
        self.noisy = True
        self._choices: list[Tensor] = []

    @torch.no_grad()
    def prepare(self, ids: Tensor, mask: Tensor | None) -> None:
        """Measure on the first tokens of `ids` [N, L] how active each neuron is, where there is a prior."""
        if not self.prior:
            return
        rows = max(1, PRIOR_TOKENS // ids.shape[1])
        device = self.inputs.device
        kept = torch.ones_like(ids[:rows], dtype=torch.bool) if mask is None else mask[:rows].bool()
        energy: dict[int, Tensor] = {}

        def see(trace: FFNTrace) -> None:
            energy[trace.layer] = energy.get(trace.layer, 0.0) + trace.inner.double().square().sum(0)

        with observe_ffns(self.model, self.shape.layers, self.family, see) as observers:
            for row, real in zip(ids[:rows], kept, strict=True):
                for observer in observers:
                    observer.expect(real.nonzero()[:, 0], 0)
                self.model.model(input_ids=row[None].to(device), use_cache=False)
        width = self.shape.width
        for n, layer in enumerate(self.shape.layers):
            ffn = getattr(decoder(self.model).layers[layer], self.family.module)
            worth = energy[layer].sqrt() * getattr(ffn, self.family.down).weight.double().norm(dim=0)
            rank = worth.argsort(stable=True).argsort()
            quantile = torch.special.ndtri((rank.double() + 0.5) / width)
            shift = torch.special.ndtri(torch.tensor(self.target, dtype=torch.float64))
            self.known[n] = (self.prior * (quantile + shift)).float().cpu()
        self.known = self.known.to(device)

    def embeddings(self) -> Tensor:
        """Return the experts' embeddings, [M, E, e]."""
        found: Tensor = self.hypernetwork(self.inputs)[0]
        return found

    def logits(self, layer: int, embeddings: Tensor) -> Tensor:
        """Return W_d GELU(LN(v)) + b and what the prior adds, for embeddings [..., e] of a layer, [..., F]."""
        decoded: Tensor = self.decoders[layer](functional.gelu(self.norms[layer](embeddings)))
        return decoded + self.offset + self.known[layer]

    def mask(self, logits: Tensor) -> Tensor:
        """Return the mask of logits [..., F], 0 or 1, with the gradient of the sigmoid."""
        soft = ((logits + (_gumbel(logits) if self.noisy else 0.0)) / self.temperature).sigmoid()
        hard = soft.round() if self.noisy else (logits + MEDIAN > 0).to(soft.dtype)
        passed: Tensor = (hard - soft).detach() + soft
        return passed

    def choice(self, layer: int, hidden: Tensor) -> Tensor:
        """Return the expert of each token [T', D] as one-hot rows [T', E], with the gradient of the softmax."""
        scores = self.routers[layer](hidden)
        soft = ((scores + (_gumbel(scores) if self.noisy else 0.0)) / self.temperature).softmax(dim=-1)
        hard = functional.one_hot(soft.argmax(dim=-1), self.experts).to(soft.dtype)
        passed: Tensor = (hard - soft).detach() + soft
        return passed

    def forward(self, ids: Tensor, mask: Tensor | None, step: int | None = None) -> dict[str, Tensor]:
        """Return the terms of the loss on `ids` int64 [B, L] with `mask` [B, L] or None."""
        with torch.no_grad():
            target = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        embeddings = self.embeddings()
        with self.masked(embeddings):
            logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        rows = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        likelihood = logits[rows].float().log_softmax(dim=-1)
        distilled = -(target[rows].float().softmax(dim=-1) * likelihood).sum(dim=-1).mean()
        masks = [self.mask(self.logits(n, embeddings[n])) for n in range(len(self.shape.layers))]  # [E, F] each
        widest = torch.stack([each.sum(dim=1).max() for each in masks]).mean() / self.shape.width
        covered = torch.stack([_apart((1 - (1 - each).prod(dim=0)).mean(), 1.0) for each in masks])
        shares = torch.stack([each[rows.flatten()].mean(dim=0) for each in self._choices])  # [M, E]
        return {
            "distill": self.distill * distilled,
            "budget": self.budget * _apart(widest, self.target),
            "union": self.union * covered.sum() / (2 * len(masks)),
            "balance": self.balance * (shares.detach() * shares).sum(dim=1).mean(),
        }

    @contextlib.contextmanager
    def masked(self, embeddings: Tensor) -> Iterator[None]:
        """Let each FFN of the model run the experts that are made of `embeddings` [M, E, e], in forwards inside."""
        self._choices = []
        ffns = [getattr(decoder(self.model).layers[layer], self.family.module) for layer in self.shape.layers]
        for n, ffn in enumerate(ffns):
            ffn.forward = partial(self._run, n, ffn, embeddings[n])
        try:
            yield
        finally:
            for ffn in ffns:
                del ffn.forward  # the class's own is seen again

    def _run(self, layer: int, ffn: Any, embeddings: Tensor, hidden: Tensor) -> Tensor:
        """Return what the FFN gives for `hidden` [B, L, D], every token with its expert's neurons."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        chosen = self.choice(layer, flat.float())
        self._choices.append(chosen)
        mask = self.mask(self.logits(layer, chosen @ embeddings)).to(flat.dtype)
        activation, up = getattr(ffn, self.family.activation), getattr(ffn, self.family.up)(flat)
        if self.family.gate is None:
            inner = mask * activation(up)
        else:  # twice, as the authors do: the value is the same, the gradient of the mask twice as large
            inner = (mask * activation(getattr(ffn, self.family.gate)(flat))) * (mask * up)
        output: Tensor = getattr(ffn, self.family.down)(inner)
        return output.view_as(hidden)

    @torch.no_grad()
    def arrays(self) -> dict[int, dict[str, NDArray[np.float32]]]:
        """Return by layer `logits` float32 [E, F], an expert having the neurons above 0, and `router` [E, D]."""
        embeddings = self.embeddings()
        return {
            layer: {
                "logits": (self.logits(n, embeddings[n]) + MEDIAN).float().cpu().numpy(),
                "router": self.routers[n].weight.detach().float().cpu().numpy(),  # type: ignore[union-attr,operator]
            }
            for n, layer in enumerate(self.shape.layers)
        }


def _gumbel(like: Tensor) -> Tensor:
    return -torch.empty_like(like).exponential_().log()


def _apart(value: Tensor, target: float) -> Tensor:
    """Return |log((value + c) / (target + c))|."""
    return ((value + SMOOTHING) / (target + SMOOTHING)).log().abs()
