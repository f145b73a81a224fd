"""Probes: what a calibration pass adds up of each MoE block, as the arrays that methods read.

One instance observes one layer. All sums are float64; only tokens that the attention mask keeps count.
Shapes: T tokens, E experts, K chosen experts a token, D hidden.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from espalier.errors import UserError
from espalier.observe import BlockTrace
from espalier.shape import ModelShape

Arrays = dict[str, NDArray[Any]]

GRAM_ALL_TOKENS_EXPERTS = 16  # up to this E, residual_gram keeps every token
GRAM_TOKENS = 16_384  # beyond it, at most so many, evenly strided


class Probe(Protocol):
    """Sums over the tokens of one layer.

    `dense` says that every expert's output on every token is needed. `merged` says that the arrays also
    make sense for a merged checkpoint, whose router has more rows than its block has experts.
    """

    dense: ClassVar[bool]
    merged: ClassVar[bool]

    def __init__(self, shape: ModelShape, tokens: int) -> None: ...

    def update(self, trace: BlockTrace) -> None: ...

    def result(self) -> Arrays: ...

    @staticmethod
    def merge(parts: Sequence[Arrays], tokens: Sequence[int]) -> Arrays:
        """Return the result over all tokens from those over consecutive parts of them, of `tokens` each."""
        ...


class Usage:
    """How often and how strongly the router chooses each expert.

    counts int64 [E]: tokens that chose the expert.
    top2_counts int64 [E]: tokens for which its logit is among the two largest, whatever K is (HC-SMoE's code).
    gate_sum float64 [E]: sum of its routing weights as the model uses them.
    probability_sum float64 [E]: sum over all tokens of its softmax probability over all E experts.
    """

    dense: ClassVar[bool] = False
    merged: ClassVar[bool] = False

    def __init__(self, shape: ModelShape, tokens: int) -> None:
        self.experts = shape.experts
        self.counts = np.zeros(self.experts, np.int64)
        self.top2_counts = np.zeros(self.experts, np.int64)
        self.gate_sum = np.zeros(self.experts)
        self.probability_sum = np.zeros(self.experts)

    def update(self, trace: BlockTrace) -> None:
        top2 = trace.logits.topk(min(2, self.experts), dim=-1).indices  # [T, 2]
        self.counts += _count(trace.indices, self.experts)
        self.top2_counts += _count(top2, self.experts)
        self.gate_sum += _sum_by_expert(trace.indices, trace.weights, self.experts)
        self.probability_sum += _numpy(trace.logits.softmax(-1).sum(0, dtype=torch.float64))

    def result(self) -> Arrays:
        return {
            "counts": self.counts,
            "top2_counts": self.top2_counts,
            "gate_sum": self.gate_sum,
            "probability_sum": self.probability_sum,
        }

    @staticmethod
    def merge(parts: Sequence[Arrays], tokens: Sequence[int]) -> Arrays:
        return _added(parts)


class OutputNorm:
    """L2 norms of the routed, unweighted expert outputs y (EAN and REAP, arXiv 2510.13999 eq. 9).

    counts int64 [E]: tokens that chose the expert.
    norm_sum float64 [E]: sum of ||y|| over them.
    gate_norm_sum float64 [E]: sum of g ||y|| with the weight g as the model uses it.
    probability_norm_sum float64 [E]: sum of p ||y|| with p the softmax over all E experts, not renormalised.
    """

    dense: ClassVar[bool] = False
    merged: ClassVar[bool] = False

    def __init__(self, shape: ModelShape, tokens: int) -> None:
        self.experts = shape.experts
        self.counts = np.zeros(self.experts, np.int64)
        self.norm_sum = np.zeros(self.experts)
        self.gate_norm_sum = np.zeros(self.experts)
        self.probability_norm_sum = np.zeros(self.experts)

    def update(self, trace: BlockTrace) -> None:
        # One position k at a time: float64 copies of [T, K, D] would double the memory of the pass.
        norms = [torch.linalg.vector_norm(y, dim=-1, dtype=torch.float64) for y in trace.routed.unbind(1)]
        norm = torch.stack(norms, dim=1)  # [T, K]
        real = trace.indices.clamp(max=self.experts - 1)  # "no expert" falls out of the sums below
        probability = trace.logits.softmax(-1).gather(1, real)  # [T, K]
        self.counts += _count(trace.indices, self.experts)
        self.norm_sum += _sum_by_expert(trace.indices, norm, self.experts)
        self.gate_norm_sum += _sum_by_expert(trace.indices, norm * trace.weights, self.experts)
        self.probability_norm_sum += _sum_by_expert(trace.indices, norm * probability, self.experts)

    def result(self) -> Arrays:
        return {
            "counts": self.counts,
            "norm_sum": self.norm_sum,
            "gate_norm_sum": self.gate_norm_sum,
            "probability_norm_sum": self.probability_norm_sum,
        }

    @staticmethod
    def merge(parts: Sequence[Arrays], tokens: Sequence[int]) -> Arrays:
        return _added(parts)


class MeanOutput:
    """Mean unweighted output of each expert (HC-SMoE, arXiv 2410.08589).

    all_tokens float64 [E, D]: over all tokens, routed to it or not.
    routed float64 [E, D]: over the tokens that chose it; zeros where none did.
    counts int64 [E]: tokens that chose it.
    """

    dense: ClassVar[bool] = True
    merged: ClassVar[bool] = False

    def __init__(self, shape: ModelShape, tokens: int) -> None:
        self.experts = shape.experts
        self.tokens = 0
        self.counts = np.zeros(self.experts, np.int64)
        self.all_sum = np.zeros((self.experts, shape.hidden))
        self.routed_sum = np.zeros((self.experts, shape.hidden))

    def update(self, trace: BlockTrace) -> None:
        chosen = trace.indices < self.experts  # [T, K]
        routed = torch.zeros(self.routed_sum.shape, dtype=torch.float64, device=trace.hidden.device)
        routed.index_add_(0, trace.indices[chosen], trace.routed[chosen].double())
        self.tokens += len(trace.token)
        self.counts += _count(trace.indices, self.experts)
        self.all_sum += _numpy(trace.outputs().sum(1, dtype=torch.float64))
        self.routed_sum += _numpy(routed)

    def result(self) -> Arrays:
        return {
            "all_tokens": self.all_sum / self.tokens,
            "routed": self.routed_sum / np.maximum(self.counts, 1)[:, None],
            "counts": self.counts,
        }

    @staticmethod
    def merge(parts: Sequence[Arrays], tokens: Sequence[int]) -> Arrays:
        counts: NDArray[Any] = np.sum([part["counts"] for part in parts], axis=0)
        everywhere = [part["all_tokens"] * number for part, number in zip(parts, tokens, strict=True)]
        routed = np.sum([part["routed"] * part["counts"][:, None] for part in parts], axis=0)
        return {
            "all_tokens": np.sum(everywhere, axis=0) / sum(tokens),
            "routed": routed / np.maximum(counts, 1)[:, None],
            "counts": counts,
        }


class LogitGram:
    """Second moments of the router logits l, enough for every similarity between their columns (M-SMoE).

    gram float64 [E, E]: sum over tokens of l l^T.
    sum float64 [E]: sum over tokens of l.
    """

    dense: ClassVar[bool] = False
    merged: ClassVar[bool] = False

    def __init__(self, shape: ModelShape, tokens: int) -> None:
        self.gram = np.zeros((shape.experts, shape.experts))
        self.sum = np.zeros(shape.experts)

    def update(self, trace: BlockTrace) -> None:
        logits = trace.logits.double()  # [T, E]
        self.gram += _numpy(logits.T @ logits)
        self.sum += _numpy(logits.sum(0))

    def result(self) -> Arrays:
        return {"gram": self.gram, "sum": self.sum}

    @staticmethod
    def merge(parts: Sequence[Arrays], tokens: Sequence[int]) -> Arrays:
        return _added(parts)


class GateRatio:
    """How much of a token's routing weight its weaker experts hold (NAEE's skipping, arXiv 2402.14800, app. A.2).

    With w_1 >= ... >= w_K the routing weights of a token, as its router returns them:
    ratio float32 [T]: w_2 / w_1.
    tail float32 [T, K-1]: tail[:, i-1] = (w_{i+1} + ... + w_K) / (w_1 + ... + w_K).
    quantiles float64 [101]: percentiles 0..100 of ratio.
    """

    dense: ClassVar[bool] = False
    merged: ClassVar[bool] = True

    def __init__(self, shape: ModelShape, tokens: int) -> None:
        if shape.top_k < 2:
            raise UserError(
                f"probe gate_ratio: the model's router picks top_k={shape.top_k} expert a token, so there is no "
                "second one to compare with. Use a model with top_k >= 2."
            )
        self.ratio: list[Tensor] = []
        self.tail: list[Tensor] = []

    def update(self, trace: BlockTrace) -> None:
        weights = trace.router_weights.double().sort(dim=-1, descending=True).values  # [T, K]
        tail = weights.flip(-1).cumsum(-1).flip(-1)[:, 1:] / weights.sum(-1, keepdim=True)
        self.ratio.append((weights[:, 1] / weights[:, 0]).float().cpu())
        self.tail.append(tail.float().cpu())

    def result(self) -> Arrays:
        ratio = _numpy(torch.cat(self.ratio))
        quantiles = np.quantile(ratio.astype(np.float64), np.linspace(0, 1, 101))
        return {"ratio": ratio, "tail": _numpy(torch.cat(self.tail)), "quantiles": quantiles}

    @staticmethod
    def merge(parts: Sequence[Arrays], tokens: Sequence[int]) -> Arrays:
        joined = _joined([{key: part[key] for key in ("ratio", "tail")} for part in parts])
        quantiles = np.quantile(joined["ratio"].astype(np.float64), np.linspace(0, 1, 101))
        return joined | {"quantiles": quantiles}


class ResidualGram:
    """Inner products that give the error of every expert subset without running it (NAEE, arXiv 2402.14800).

    With y_a the unweighted output of expert a and z the block's routed output (a shared expert cancels), a
    block with new weights w, of sum s, on the experts differs from the old one by
        ||z' - z||^2 = w^T H w + 2 (s - 1) w^T b + (s - 1)^2 |z|^2,   H_ab = <y_a - z, y_b - z>,  b_a = <y_a - z, z>.
    T' is T when E <= 16, else at most 16,384 tokens, evenly strided. Products are taken in float64.

    gram float32 [T', E(E+1)/2]: upper triangle of H, row by row.   cross float32 [T', E]: b.
    norm float32 [T']: |z|^2.   logits float32 [T', E].   token int64 [T']: index among all tokens.
    """

    dense: ClassVar[bool] = False
    merged: ClassVar[bool] = False

    def __init__(self, shape: ModelShape, tokens: int) -> None:
        self.stride = 1 if shape.experts <= GRAM_ALL_TOKENS_EXPERTS else -(-tokens // GRAM_TOKENS)
        self.upper = torch.triu_indices(shape.experts, shape.experts)
        self.parts: dict[str, list[Tensor]] = {name: [] for name in ("gram", "cross", "norm", "logits", "token")}

    def update(self, trace: BlockTrace) -> None:
        if self.stride > 1:
            trace = trace.rows((trace.token % self.stride == 0).nonzero()[:, 0])
        for part in trace.chunks():
            z = part.block_output()  # [T, D]
            residual = torch.sub(part.outputs().transpose(0, 1), z.unsqueeze(1))  # float64 [T, E, D]
            gram = residual @ residual.mT  # [T, E, E]
            values = {
                "gram": gram[:, self.upper[0], self.upper[1]].float(),
                "cross": torch.einsum("ted,td->te", residual, z).float(),
                "norm": z.square().sum(-1).float(),
                "logits": part.logits,
                "token": part.token,
            }
            for name, value in values.items():
                self.parts[name].append(value.cpu())

    def result(self) -> Arrays:
        return {name: _numpy(torch.cat(parts)) for name, parts in self.parts.items()}

    @staticmethod
    def merge(parts: Sequence[Arrays], tokens: Sequence[int]) -> Arrays:
        return _joined(parts)


# In this order they see a trace: residual_gram after mean_output, whose outputs it can then share.
PROBES: dict[str, type[Probe]] = {
    "usage": Usage,
    "output_norm": OutputNorm,
    "mean_output": MeanOutput,
    "logit_gram": LogitGram,
    "gate_ratio": GateRatio,
    "residual_gram": ResidualGram,
}


def _added(parts: Sequence[Arrays]) -> Arrays:
    return {key: np.sum([part[key] for part in parts], axis=0) for key in parts[0]}


def _joined(parts: Sequence[Arrays]) -> Arrays:
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def _numpy(tensor: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = tensor.cpu().numpy()
    return array


def _count(indices: Tensor, experts: int) -> NDArray[Any]:
    return _numpy(torch.bincount(indices.flatten(), minlength=experts + 1)[:experts])


def _sum_by_expert(indices: Tensor, values: Tensor, experts: int) -> NDArray[Any]:
    """Sum `values` [T, K] by the expert in `indices` [T, K], float64 [E]; index E stands for no expert."""
    return _numpy(torch.bincount(indices.flatten(), values.double().flatten(), minlength=experts + 1)[:experts])
