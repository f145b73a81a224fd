"""Learn overlapping experts of an FFN, and what attention leaves out: ToMoE (Gao et al., TMLR 2026, arXiv 2501.15316).

The model is frozen. A bidirectional GRU over the layers makes E embeddings a layer, v_e; a decoder a layer makes of an
embedding which of the F neurons the expert has, and a router which expert a token runs:

    masks    s = round(y), y = sigmoid((W_d GELU(LN(v)) + g + b) / T)       g = -log Exp(1), gradient of y
    router   r = one-hot argmax of softmax((W_r x + g) / T)                 its gradient that of the softmax
    FFN      W_down ((s act(W_gate x)) (s W_up x)),  s the mask of r V       an expert is not weighed by its probability

With `attention` the GRU's sequence is attention 0, FFN 0, attention 1, ... The logits of an attention come from a
decoder of its own, W_a GELU(LN(u)): of u = mean_e v_e one for each of the h / 2 rotary pairs, whose mask, the same for
all tokens and heads, multiplies queries and keys before they are turned; with `all`, of u = W_ra x + mean_e v_e one for
each of the h dimensions, whose mask, a token's own, multiplies its values.

T and b stay as they are. Every token draws its own noise while this is learnt (pairs once a pass), and nobody draws any
afterwards: an exported expert has the neurons that the noise would leave on more often than not, those of
W_d GELU(LN(v)) + b + m > 0 with m = -log log 2 the median of g, and the router takes its largest score. (The authors'
code draws at export and inference too, and there multiplies the output of attention by the query's mask of values,
which it does not learn with. Its AdamW has betas 0.9 and 0.999 and lets vectors decay; ours has 0.9 and 0.95, and does
not.) The loss is, with coefficients of their command for LLaMA-2-7B,

    2 KD + 16 log(max(rho, p) / min(rho, p)) + 3 U + B

KD: cross entropy with the probabilities of the same model without masks. rho: parameters in use over all, from masks
drawn afresh: the neurons of the widest expert, the pairs, and with `all` the values' dimensions (with their columns of
the output projection) of the token that keeps most; c = 0.001 is added to it and to the target p. U: the same penalty
between the fraction of neurons that some expert has and 1, summed over layers and divided by twice their number
(there, attention modules count, with 0). B: sum_e f_e P_e, with f and P the fraction of tokens of each expert, mean
over layers.

The decoder has to travel from masks that are nearly full to the budget, which takes thousands of steps at the
authors' rate. A `prior` above 0, which they do not have, starts from what is known (`collecting.activity`): the inputs
of each FFN on the first tokens of the text are put into E clusters by direction, the router starts as 20 cosines with
their centres, and prior (z_j + z) is added to the logits of each expert: z_j the normal quantile of neuron j's rank by
activity on the expert's own tokens (root mean square of its activation times the norm of its column in the down
projection), z that of the target, so that the share of the neurons above 0 is p. Then `offset` is best 0. With one
expert, training starts from static pruning by activity. Pairs likewise, by the root mean squares of their queries times
those of their keys. Values always start from b = 3.

Shapes: B sequences, L tokens, T' = B x L, D hidden, F neurons, E experts, M modules (layers; with
attention twice as many), e embedding, h dimensions of a head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from espalier.checkpoints.shape import DenseShape
from espalier.collecting.activity import measure_activity
from espalier.dense_families import DenseFamily
from espalier.methods.tomoe import MEDIAN, VALUE_OFFSET
from espalier.models.runtime import decoder
from espalier.plans.narrow_attention import dimensions_of

SMOOTHING = 1e-3  # c
PRIOR_TOKENS = 4096  # on which activity is measured
PEAKED = 20.0  # scores of a prior's router: so many times the cosine with the middle of an expert's tokens


class Fit(nn.Module):
    """The hypernetwork, routers and decoders of a model, whose own parameters stay as they are.

    `experts` E; `embedding` e; `target` p; `temperature` T; `offset` b; `prior`; `attention`: `none`, `pairs` of
    queries and keys, or `all`, values too; the weights of the terms `distill`, `budget`, `union` and `balance`.
    """

    model: Any
    known_neurons: Tensor  # [L, E, F], what the prior adds to logits
    known_pairs: Tensor

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
        attention: str = "none",
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
        self.distill, self.budget, self.union, self.balance = distill, budget, union, balance
        self.attention = attention
        layers, head = len(shape.layers), 2 * shape.pairs
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            modules = layers if attention == "none" else 2 * layers
            self.inputs = nn.Parameter(torch.randn(modules, experts, embedding // 4))
            self.hypernetwork = nn.GRU(embedding // 4, embedding // 2, bidirectional=True)
            self.norms = nn.ModuleList(nn.LayerNorm(embedding) for _ in range(layers))
            self.decoders = nn.ModuleList(nn.Linear(embedding, shape.width, bias=False) for _ in range(layers))
            self.routers = nn.ModuleList(nn.Linear(shape.hidden, experts, bias=False) for _ in range(layers))
            if attention != "none":
                size = shape.pairs + (head if attention == "all" else 0)
                self.head_norms = nn.ModuleList(nn.LayerNorm(embedding) for _ in range(layers))
                self.head_decoders = nn.ModuleList(nn.Linear(embedding, size, bias=False) for _ in range(layers))
            if attention == "all":
                self.entries = nn.ModuleList(nn.Linear(shape.hidden, embedding, bias=False) for _ in range(layers))
        self.seed = seed
        self.register_buffer("known_neurons", torch.zeros(layers, experts, shape.width))  # moved where the model runs
        self.register_buffer("known_pairs", torch.zeros(layers, shape.pairs))
        self.noisy = True
        self._choices: list[Tensor] = []
        self._values: list[Tensor] = []

    @torch.no_grad()
    def prepare(self, ids: Tensor, mask: Tensor | None) -> None:
        """Measure on the first tokens of `ids` [N, L] how active neurons and pairs are, where there is a prior."""
        if not self.prior:
            return
        rows, device = max(1, PRIOR_TOKENS // ids.shape[1]), self.inputs.device
        kept = torch.ones_like(ids[:rows], dtype=torch.bool) if mask is None else mask[:rows].bool()
        known = measure_activity(
            self.model, self.shape, self.family, ids[:rows].to(device), kept, self.experts, self.seed
        )
        neurons = [torch.stack([self._start(each) for each in layer.neurons]) for layer in known]
        self.known_neurons = torch.stack(neurons).to(device)
        self.known_pairs = torch.stack([self._start(layer.pairs) for layer in known]).to(device)
        for router, layer in zip(self.routers, known, strict=True):
            router.weight.copy_(PEAKED / layer.norm * layer.centres)  # type: ignore[union-attr,operator]

    def _start(self, activity: Tensor) -> Tensor:
        """Return what the prior adds to the logits of things of some `activity` [n]."""
        rank = activity.argsort(stable=True).argsort()
        quantile = torch.special.ndtri((rank.double() + 0.5) / len(activity))
        shift = torch.special.ndtri(torch.tensor(self.target, dtype=torch.float64))
        start: Tensor = self.prior * (quantile + shift)
        return start.float()

    def embeddings(self) -> Tensor:
        """Return the experts' embeddings, [M, E, e]."""
        found: Tensor = self.hypernetwork(self.inputs)[0]
        return found

    def of_ffns(self, embeddings: Tensor) -> Tensor:
        """Return those of [M, E, e] that are of FFNs, [L, E, e]."""
        return embeddings if self.attention == "none" else embeddings[1::2]

    def logits(self, layer: int, embeddings: Tensor, choice: Tensor | None = None) -> Tensor:
        """Return W_d GELU(LN(v)) + b and what the prior adds, [E, F], for the embeddings [E, e] of a layer.

        Or [T', F], of the experts that the one-hot rows `choice` [T', E] say: v is then r V.
        """
        known = self.known_neurons[layer]
        if choice is not None:
            embeddings, known = choice @ embeddings, choice @ known
        decoded: Tensor = self.decoders[layer](functional.gelu(self.norms[layer](embeddings)))
        return decoded + self.offset + known

    def pair_logits(self, layer: int, embeddings: Tensor) -> Tensor:
        """Return the logits of a layer's pairs, [h / 2], for all embeddings [M, E, e]."""
        mixed = self.head_norms[layer](embeddings[2 * layer].mean(dim=0))
        decoded: Tensor = self.head_decoders[layer](functional.gelu(mixed))[-self.shape.pairs :]
        return decoded + self.offset + self.known_pairs[layer]

    def value_logits(self, layer: int, embeddings: Tensor, hidden: Tensor) -> Tensor:
        """Return the logits of the dimensions of each token's value, [..., h], for its input `hidden` [..., D]."""
        mixed = self.head_norms[layer](self.entries[layer](hidden) + embeddings[2 * layer].mean(dim=0))
        decoded: Tensor = self.head_decoders[layer](functional.gelu(mixed))[..., : 2 * self.shape.pairs]
        return decoded + VALUE_OFFSET

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
        ffns = self.of_ffns(embeddings)
        masks = [self.mask(self.logits(n, ffns[n])) for n in range(len(self.shape.layers))]  # [E, F] each
        covered = torch.stack([_apart((1 - (1 - each).prod(dim=0)).mean(), 1.0) for each in masks])
        shares = torch.stack([each[rows.flatten()].mean(dim=0) for each in self._choices])  # [M, E]
        return {
            "distill": self.distill * distilled,
            "budget": self.budget * _apart(self._used(masks, embeddings), self.target),
            "union": self.union * covered.sum() / (2 * len(masks)),
            "balance": self.balance * (shares.detach() * shares).sum(dim=1).mean(),
        }

    def _used(self, masks: list[Tensor], embeddings: Tensor) -> Tensor:
        """Return rho, for the masks [E, F] of the layers and those of attention."""
        shape, layers = self.shape, range(len(masks))
        used = shape.neuron_parameters * torch.stack([each.sum(dim=1).max() for each in masks]).sum()
        whole = shape.neuron_parameters * shape.width
        if self.attention != "none":
            pairs = torch.stack([self.mask(self.pair_logits(n, embeddings)).sum() for n in layers])
            used = used + shape.pair_parameters * pairs.sum()
            whole += shape.pair_parameters * shape.pairs
        if self.attention == "all":  # a dimension of values, with its columns of the output, is half as large as a pair
            used = used + shape.pair_parameters / 2 * torch.stack(self._values).sum()
            whole += shape.pair_parameters * shape.pairs
        return used / (whole * len(masks))

    @contextlib.contextmanager
    def masked(self, embeddings: Tensor) -> Iterator[None]:
        """Let FFNs run the experts of `embeddings` [M, E, e], and attention leave out, in forwards inside."""
        self._choices, self._values = [], []
        layers = [decoder(self.model).layers[layer] for layer in self.shape.layers]
        ffns, handles = [getattr(layer, self.family.module) for layer in layers], []
        for n, ffn in enumerate(ffns):
            ffn.forward = partial(self._run, n, ffn, self.of_ffns(embeddings)[n])
        if self.attention != "none":
            for n, layer in enumerate(layers):
                attention = getattr(layer, self.family.attention)
                query, key, value = (getattr(attention, name) for name in self.family.projections)
                kept = self.mask(self.pair_logits(n, embeddings))[self._pair_of.to(embeddings.device)]  # [h]
                handles += [part.register_forward_hook(partial(_keep_dimensions, kept)) for part in (query, key)]
                if self.attention == "all":
                    handles.append(value.register_forward_hook(partial(self._mask_values, n, embeddings)))
        try:
            yield
        finally:
            for ffn in ffns:
                del ffn.forward  # the class's own is seen again
            for handle in handles:
                handle.remove()

    @cached_property
    def _pair_of(self) -> Tensor:
        """The pair of each dimension of a head, int64 [h]."""
        pairs, config = self.shape.pairs, self.model.config.to_dict()
        found = torch.zeros(2 * pairs, dtype=torch.long)
        for pair in range(pairs):
            found[dimensions_of([pair], 2 * pairs, self.family.rotary(config))] = pair
        return found

    def _mask_values(self, layer: int, embeddings: Tensor, projection: Any, inputs: Any, output: Tensor) -> Tensor:
        mask = self.mask(self.value_logits(layer, embeddings, inputs[0].float()))  # [B, L, h]
        self._values.append(mask.sum(dim=-1).max())
        return _keep_dimensions(mask, projection, inputs, output)

    def _run(self, layer: int, ffn: Any, embeddings: Tensor, hidden: Tensor) -> Tensor:
        """Return what the FFN gives for `hidden` [B, L, D], every token with its expert's neurons."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        chosen = self.choice(layer, flat.float())
        self._choices.append(chosen)
        mask = self.mask(self.logits(layer, embeddings, chosen)).to(flat.dtype)
        activation, up = getattr(ffn, self.family.activation), getattr(ffn, self.family.up)(flat)
        if self.family.gate is None:
            inner = mask * activation(up)
        else:  # twice, as the authors do: the value is the same, the gradient of the mask twice as large
            inner = (mask * activation(getattr(ffn, self.family.gate)(flat))) * (mask * up)
        output: Tensor = getattr(ffn, self.family.down)(inner)
        return output.view_as(hidden)

    @torch.no_grad()
    def arrays(self) -> dict[int, dict[str, NDArray[np.float32]]]:
        """Return by layer what is learnt, float32.

        `logits` [E, F], an expert having the neurons above 0, and `router` [E, D]; with attention `pairs` [h / 2],
        those above 0 being kept; with `all` the tensors of `NarrowAttention.values`.
        """
        embeddings, found = self.embeddings(), {}
        for n, layer in enumerate(self.shape.layers):
            own = {"logits": self.logits(n, self.of_ffns(embeddings)[n]) + MEDIAN, "router": self.routers[n].weight}
            if self.attention != "none":
                own["pairs"] = self.pair_logits(n, embeddings) + MEDIAN
            if self.attention == "all":
                norm: Any = self.head_norms[n]
                own |= {"enter": self.entries[n].weight, "mean": embeddings[2 * n].mean(dim=0)}
                own |= {"norm_weight": norm.weight, "norm_bias": norm.bias}
                own["decode"] = self.head_decoders[n].weight[: 2 * self.shape.pairs]  # type: ignore[index]
            found[layer] = {name: tensor.float().cpu().numpy() for name, tensor in own.items()}  # type: ignore[union-attr,operator]
        return found


def _keep_dimensions(kept: Tensor, projection: Any, inputs: Any, output: Tensor) -> Tensor:
    """Return a projection's output [..., heads x h] times the mask `kept` [..., h] of each head."""
    heads = output.shape[-1] // kept.shape[-1]
    return output * kept.repeat(*[1] * (kept.dim() - 1), heads).to(output.dtype)


def _gumbel(like: Tensor) -> Tensor:
    return -torch.empty_like(like).exponential_().log()


def _apart(value: Tensor, target: float) -> Tensor:
    """Return |log((value + c) / (target + c))|."""
    return ((value + SMOOTHING) / (target + SMOOTHING)).log().abs()
