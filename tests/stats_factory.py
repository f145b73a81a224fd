"""Synthetic MoE blocks (router logits and every expert's output) and the statistics that probes take of them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from espalier.checkpoints.shape import ModelShape
from espalier.collecting.stats import Stats

Array = NDArray[Any]


@dataclass(frozen=True)
class Block:
    """What a MoE block does on T tokens: `logits` [T, E] float32, `outputs` [T, E, D] float64, unweighted.

    Of SwiGLU experts also `hidden` [T, D], the router's rows [E, D] and `gate`, `up`, `down` [E, F, D] (down is
    transposed), all float64.
    """

    logits: Array
    outputs: Array
    hidden: Array | None = None
    router: Array | None = None
    gate: Array | None = None
    up: Array | None = None
    down: Array | None = None

    @classmethod
    def of(cls, hidden: Array, router: Array, gate: Array, up: Array, down: Array) -> "Block":
        inner = swiglu(hidden, gate, up)
        logits = (hidden @ router.T).astype(np.float32)
        return cls(logits, np.einsum("tef,efd->ted", inner, down), hidden, router, gate, up, down)


def swiglu(hidden: Array, gate: Array, up: Array) -> Array:
    """Return the inner activations [T, E, F]."""
    gates = np.einsum("td,efd->tef", hidden, gate)
    return gates / (1 + np.exp(-gates)) * np.einsum("td,efd->tef", hidden, up)


class PlainExperts:
    """What `espalier.models.experts.ExpertWeights` gives a method, of the blocks."""

    def __init__(self, blocks: dict[int, Block]) -> None:
        self.blocks = blocks

    def router(self, layer: int) -> torch.Tensor:
        return torch.tensor(self.blocks[layer].router, dtype=torch.float32)

    def expert_map(self, layer: int) -> None:
        return None

    def neurons(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        block = self.blocks[layer]
        parts = {"gate": block.gate, "up": block.up, "down": block.down}
        return {name: torch.tensor(part[expert], dtype=torch.float32) for name, part in parts.items()}

    def block(self, layer: int) -> "PlainExpertBlock":
        return PlainExpertBlock(self.blocks[layer])


class PlainExpertBlock:
    """What `espalier.models.expert_block.Block` gives a method."""

    def __init__(self, block: Block) -> None:
        self._block = block
        self.number = len(block.gate)

    def inner(self, expert: int, hidden: torch.Tensor) -> torch.Tensor:
        block = self._block
        found = swiglu(hidden.double().numpy(), block.gate[expert : expert + 1], block.up[expert : expert + 1])
        return torch.tensor(found[:, 0], dtype=torch.float32)

    def output(self, expert: int, hidden: torch.Tensor) -> torch.Tensor:
        down = torch.tensor(self._block.down[expert], dtype=torch.float32)
        return self.inner(expert, hidden) @ down

    def merged(self, members: list[int], weights: list[float]) -> "PlainExpertBlock":
        parts = [getattr(self._block, name)[list(members)] for name in ("gate", "up", "down")]
        return PlainExpertBlock(
            Block(None, None, None, None, *[np.einsum("e,efd->fd", weights, p)[None] for p in parts])
        )


def make_shape(
    experts: int = 8, top_k: int = 2, renormalise: bool = True, layers: tuple[int, ...] = (0, 2), hidden: int = 6
) -> ModelShape:
    width = 5
    expert = 3 * hidden * width
    total = len(layers) * experts * (expert + hidden) + 1000
    neuron = 3 * hidden
    return ModelShape(
        "toy", layers, experts, top_k, hidden, width, renormalise, expert, hidden, total, neuron_parameters=neuron
    )


def make_blocks(shape: ModelShape, tokens: int = 48, seed: int = 0) -> dict[int, Block]:
    """Return random blocks by layer; experts come in related pairs and are chosen unequally often."""
    rng = np.random.default_rng(seed)
    blocks = {}
    for layer in shape.layers:
        hidden = rng.normal(size=(tokens, shape.hidden)) + 0.5 * rng.normal(size=shape.hidden)
        router = rng.normal(size=(shape.experts, shape.hidden))
        size = ((shape.experts + 1) // 2, shape.width, shape.hidden)

        def related(size: tuple[int, ...] = size) -> Array:
            pairs = np.repeat(rng.normal(size=size), 2, axis=0)[: shape.experts]
            return pairs + 0.3 * rng.normal(size=pairs.shape)

        down = related() * rng.uniform(0.5, 2, size=(shape.experts, 1, 1))
        blocks[layer] = Block.of(hidden, router, related(), related(), down)
    return blocks


def permuted(blocks: dict[int, Block], order: list[int]) -> dict[int, Block]:
    """Return blocks whose expert i is the expert order[i] of `blocks`."""
    found = {}
    for layer, b in blocks.items():
        rows = [None if part is None else part[order] for part in (b.router, b.gate, b.up, b.down)]
        found[layer] = Block(b.logits[:, order], b.outputs[:, order], b.hidden, *rows)
    return found


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
    best = order[:, :top_k]  # [T, K]

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
        "mean_output": {"all_tokens": outputs.mean(axis=0)},
        "routed_moments": {
            "counts": counts,
            "gate_sum": gate.sum(axis=0),
            "sum": np.einsum("te,ted->ed", picked, outputs),
            "square_sum": np.einsum("te,ted->ed", picked, outputs**2),
            "gate_sum_outputs": np.einsum("te,ted->ed", gate, outputs),
            "largest": np.where(counts, np.where(picked, outputs.max(axis=2), -np.inf).max(axis=0), 0),
            "smallest": np.where(counts, np.where(picked, outputs.min(axis=2), np.inf).min(axis=0), 0),
        },
        "routing": {
            "weights": np.take_along_axis(gate, best, axis=1).astype(np.float32),
            "experts": best.astype(np.int32),
            "probability": np.take_along_axis(probability, best, axis=1).astype(np.float32),
        },
        "token_importance": {"importance": np.abs(outputs).sum(axis=(1, 2)).astype(np.float32)},  # any, of the tokens
        # Stands for what would be learnt: of each expert by itself, in no order of importance.
        "diep": {
            "alpha": np.sin(7 * norms.mean(axis=0)).astype(np.float32),
            "beta": np.array([1 + 0.1 * np.sin(norms.mean())], np.float32),
        },
        "coactivation": {"counts": picked.T.astype(int) @ picked.astype(int)},
        "logit_gram": {"gram": logits.T @ logits, "sum": logits.sum(axis=0)},
        "residual_gram": {
            "gram": gram.astype(np.float32),
            "logits": block.logits[rows],
            "cross": np.einsum("tad,td->ta", residual, z[rows]).astype(np.float32),
            "norm": (z[rows] ** 2).sum(axis=1).astype(np.float32),
            "token": rows.astype(np.int64),
        },
    }
    if block.hidden is not None:
        phi = gate[:, :, None] * swiglu(block.hidden, block.gate, block.up)
        probes["neuron_energy"] = {"square_sum": (phi**2).sum(axis=0), "square_max": (phi**2).max(axis=0)}
        probes["inputs"] = {
            "hidden": block.hidden.astype(np.float32),
            "experts": best.astype(np.int32),
            "weights": np.take_along_axis(gate, best, axis=1).astype(np.float32),
            "token": np.arange(len(logits)),
        }
    return probes
