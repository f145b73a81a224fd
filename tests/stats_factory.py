"""Synthetic MoE blocks (router logits and every expert's output) and the statistics that probes take of them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.shape import ModelShape
from espalier.stats import Stats

Array = NDArray[Any]


@dataclass(frozen=True)
class Block:
    """What a MoE block does on T tokens: `logits` [T, E] float32, `outputs` [T, E, D] float64, unweighted."""

    logits: Array
    outputs: Array


def make_shape(
    experts: int = 8, top_k: int = 2, renormalise: bool = True, layers: tuple[int, ...] = (0, 2), hidden: int = 6
) -> ModelShape:
    width = 5
    expert = 3 * hidden * width
    total = len(layers) * experts * (expert + hidden) + 1000
    return ModelShape("toy", layers, experts, top_k, hidden, width, renormalise, expert, hidden, total)


def make_blocks(shape: ModelShape, tokens: int = 48, seed: int = 0) -> dict[int, Block]:
    """Return random blocks by layer; experts come in related pairs and are chosen unequally often."""
    rng = np.random.default_rng(seed)
    blocks = {}
    for layer in shape.layers:
        logits = rng.normal(size=(tokens, shape.experts)) + rng.normal(size=shape.experts)
        family = rng.normal(size=(tokens, (shape.experts + 1) // 2, shape.hidden))
        outputs = np.repeat(family, 2, axis=1)[:, : shape.experts] + 0.5 * rng.normal(
            size=(tokens, shape.experts, shape.hidden)
        )
        outputs += rng.normal(size=(shape.experts, shape.hidden))  # so that mean outputs differ
        blocks[layer] = Block(logits.astype(np.float32), outputs * rng.uniform(0.5, 2, size=(shape.experts, 1)))
    return blocks


def permuted(blocks: dict[int, Block], order: list[int]) -> dict[int, Block]:
    """Return blocks whose expert i is the expert order[i] of `blocks`."""
    return {layer: Block(b.logits[:, order], b.outputs[:, order]) for layer, b in blocks.items()}


def observe(
    blocks: dict[int, Block],
    shape: ModelShape,
    sequence_tokens: tuple[int, ...] | None = None,
    gram_tokens: Array | None = None,
) -> Stats:
    """Return what the probes observe of `blocks`; `gram_tokens` selects the tokens of `residual_gram`."""
    arrays: dict[tuple[str, int], dict[str, Array]] = {}
    for layer, block in blocks.items():
        for probe, found in _probes(block, shape, gram_tokens).items():
            arrays[probe, layer] = found
    tokens = len(next(iter(blocks.values())).logits)
    return Stats(shape, sequence_tokens or (tokens,), arrays)


def random_stats(shape: ModelShape, tokens: int = 48, seed: int = 0) -> Stats:
    return observe(make_blocks(shape, tokens, seed), shape)


def _probes(block: Block, shape: ModelShape, gram_tokens: Array | None) -> dict[str, dict[str, Array]]:
    experts, top_k = shape.experts, shape.top_k
    logits, outputs = block.logits.astype(np.float64), block.outputs
    order = np.argsort(-logits, axis=1, kind="stable")
    picked = np.zeros(logits.shape, bool)
    np.put_along_axis(picked, order[:, :top_k], True, axis=1)
    probability = np.exp(logits - logits.max(axis=1, keepdims=True))
    probability /= probability.sum(axis=1, keepdims=True)
    gate = probability * picked
    if shape.renormalise:
        gate /= gate.sum(axis=1, keepdims=True)
    norms = np.linalg.norm(outputs, axis=2)
    z = np.einsum("te,ted->td", gate, outputs)
    counts = picked.sum(axis=0)
    top2 = np.bincount(order[:, :2].ravel(), minlength=experts)
    descending = -np.sort(-gate, axis=1)[:, :top_k]
    tails = np.cumsum(descending[:, ::-1], axis=1)[:, ::-1]  # tails[:, i] = sum from rank i on
    routed = np.einsum("te,ted->ed", picked, outputs) / np.maximum(counts, 1)[:, None]

    rows = np.arange(len(logits)) if gram_tokens is None else gram_tokens
    residual = (outputs - z[:, None])[rows]
    upper = np.triu_indices(experts)
    gram = np.einsum("tad,tbd->tab", residual, residual)[:, upper[0], upper[1]]
    probes = {
        "usage": {
            "counts": counts,
            "top2_counts": top2,
            "gate_sum": gate.sum(axis=0),
            "probability_sum": probability.sum(axis=0),
        },
        "output_norm": {
            "counts": counts,
            "norm_sum": (picked * norms).sum(axis=0),
            "gate_norm_sum": (gate * norms).sum(axis=0),
            "probability_norm_sum": (probability * picked * norms).sum(axis=0),
        },
        "mean_output": {"all_tokens": outputs.mean(axis=0), "routed": routed, "counts": counts},
        "logit_gram": {"gram": logits.T @ logits, "sum": logits.sum(axis=0)},
        "residual_gram": {
            "gram": gram.astype(np.float32),
            "logits": block.logits[rows],
            "cross": np.einsum("tad,td->ta", residual, z[rows]).astype(np.float32),
            "norm": (z[rows] ** 2).sum(axis=1).astype(np.float32),
            "token": rows.astype(np.int64),
        },
    }
    if top_k > 1:
        ratio = (descending[:, 1] / descending[:, 0]).astype(np.float32)
        probes["gate_ratio"] = {
            "ratio": ratio,
            "tail": (tails[:, 1:] / tails[:, :1]).astype(np.float32),
            "quantiles": np.quantile(ratio.astype(np.float64), np.linspace(0, 1, 101)),
        }
    return probes
