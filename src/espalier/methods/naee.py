"""NAEE: keep the subset of experts that changes the block's output least, by exact search.

Lu et al., "Not All Experts are Equal", ACL 2024 (arXiv 2402.14800), section 3.2; per MoE block, with Z' the
outputs [T, D] of the block without the experts in C, and its router sliced to the others:

    C* = argmin over |C| = E - r of ||Z - Z'(C)||_F

The losses come from residual Gram matrices (`espalier.methods.subset_loss`), not from C(E, r) forwards.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import combinations
from math import comb
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from espalier.errors import UserError
from espalier.methods.options import one_of, softmax_router, whole_number
from espalier.methods.subset_loss import all_subsets, enumerate_subsets
from espalier.plan import Keep, Plan, survivors
from espalier.shape import ModelShape
from espalier.stats import Stats

WHERE = "conf/method/naee.yaml"
BEST = 5  # losses kept as evidence
WIDEST_TABLE = 16  # experts; the table of all subsets then takes 16 MB and doubles with each expert more
MOST_OPERATIONS = 1e10  # subsets x tokens x (E + K^2): about five minutes a layer on one core
LEAST_TOKENS = 4096  # a subset takes no less time than with so many tokens: the cost of the calls


@dataclass(frozen=True)
class Naee:
    """Keep the r experts that reproduce the block's output best on the calibration tokens.

    `loss="single"` is the paper's one norm over all tokens; `loss="chunked"` its code's sum of one norm per
    calibration batch, here per `chunk_sequences` sequences, which may rank close subsets differently. Ties go
    to the lexicographically smallest set of dropped experts. Layers are searched one by one, all against the
    uncompressed model (`mode="layerwise"`, the paper's main method).
    """

    ratio: float
    loss: str = "single"
    chunk_sequences: int = 8
    mode: str = "layerwise"
    probes: ClassVar[tuple[str, ...]] = ("residual_gram",)

    def __post_init__(self) -> None:
        one_of("naee", "loss", self.loss, ("single", "chunked"))
        one_of("naee", "mode", self.mode, ("layerwise",), " yet" if self.mode == "progressive" else "")
        whole_number("naee", "chunk_sequences", self.chunk_sequences, 1)

    def plan(self, stats: Stats, shape: ModelShape) -> Plan:
        """Evidence per layer: loss, loss / ||Z||, number of subsets, tokens, the losses of the best few.

        ||Z|| is taken as the loss takes it (per chunk, then summed), of the routed experts' output. UserError
        when the search would cost too much.
        """
        removed = shape.experts - survivors(self.ratio, shape, WHERE)
        if shape.groups > 1:
            raise UserError(f"{WHERE}: the search knows no router groups, the model has {shape.groups}. Use reap.")
        what = "the search routes anew by the softmax of the logits"
        softmax_router(WHERE, shape, what, "Use method=reap.", plain=True)
        layers, evidence = {}, {}
        for layer, arrays in stats.layers("residual_gram"):
            chunk = self._chunks(stats, arrays["token"])
            dropped, losses = self._search(arrays, chunk, removed, shape)
            order = np.argsort(losses, kind="stable")[:BEST]
            best = dropped[order[0]]
            layers[layer] = (Keep(tuple(e for e in range(shape.experts) if e not in best)),)
            loss = float(losses[order[0]])
            whole = float(np.sqrt(np.bincount(chunk, arrays["norm"].astype(np.float64))).sum())
            evidence[layer] = {
                "loss": loss,
                "relative_loss": loss / whole if whole else 0.0,
                "subsets": len(losses),
                "tokens": len(chunk),
                "best": [{"dropped": list(dropped[i]), "loss": float(losses[i])} for i in order],
            }
        return Plan({"name": "naee"} | asdict(self), layers, evidence)

    def _chunks(self, stats: Stats, token: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the chunk [T] of each observed token, given its index among all unmasked tokens."""
        if self.loss == "single":
            return np.zeros(len(token), np.int64)
        sequence = np.repeat(np.arange(len(stats.sequence_tokens)), stats.sequence_tokens)
        chunk: NDArray[np.int64] = sequence[token] // self.chunk_sequences
        return chunk

    @staticmethod
    def _search(
        arrays: Mapping[str, NDArray[Any]], chunk: NDArray[np.int64], removed: int, shape: ModelShape
    ) -> tuple[list[tuple[int, ...]], NDArray[np.float64]]:
        """Return every set of dropped experts in lexicographic order, and their losses."""
        if shape.renormalise and shape.top_k == 2 and shape.experts <= WIDEST_TABLE:
            dropped = list(combinations(range(shape.experts), removed))
            position = np.left_shift(1, np.array(dropped)).sum(axis=1)
            return dropped, all_subsets(arrays, chunk)[position]
        _refuse_if_dear(removed, len(chunk), shape)
        dropped = list(combinations(range(shape.experts), removed))
        return dropped, enumerate_subsets(arrays, chunk, removed, shape.top_k, shape.renormalise)


def _refuse_if_dear(removed: int, tokens: int, shape: ModelShape) -> None:
    subsets = comb(shape.experts, removed)
    cost = subsets * max(tokens, LEAST_TOKENS) * (shape.experts + shape.top_k**2)
    if cost > MOST_OPERATIONS:
        raise UserError(
            f"{WHERE}: removing {removed} of {shape.experts} experts means {subsets:.3g} subsets on {tokens} tokens, "
            f"{cost:.2g} operations a layer; the exact search stops at {MOST_OPERATIONS:.0g}. Use method=reap, "
            "another ratio or fewer calibration tokens."
        )
