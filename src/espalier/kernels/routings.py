"""What routers choose in a benchmark: drawn evenly, by Zipf's law, all alike, or as a router did on real text.

A random router's own choices are no even draw (its weights are skewed), and an even draw is the best case for batches'
tiles and the worst for the bytes of small batches; so every table has several.

Shapes: T tokens, K chosen, E experts.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from espalier.errors import UserError


@dataclass(frozen=True)
class Picks:
    """What a router chose: experts int64 [T, K], weights float32 [T, K]."""

    experts: NDArray[np.int64]
    weights: NDArray[np.float32]


def draw(routing: str, tokens: int, experts: int, k: int, seed: int = 0) -> Picks:
    """Return picks of `k` distinct experts a token: `uniform`, `zipf` (the e-th by 1 / e), or `hot`, the same for all.

    Weights fall and add up to 1, as those of a softmax over the chosen.
    """
    random = np.random.default_rng(seed)
    if routing == "hot":
        chosen = np.tile(np.arange(k), (tokens, 1))
    else:
        likelihood = np.ones(experts) if routing == "uniform" else 1.0 / np.arange(1, experts + 1)
        # The k largest of log p + Gumbel noise are a draw without replacement.
        keys = np.log(likelihood) + random.gumbel(size=(tokens, experts))
        chosen = np.argsort(-keys, axis=1)[:, :k]
    weights = -np.sort(-random.gamma(1.0, size=(tokens, k)), axis=1)
    return Picks(chosen.astype(np.int64), (weights / weights.sum(1, keepdims=True)).astype(np.float32))


def traced(experts: NDArray[np.int32], weights: NDArray[np.float32], tokens: int, seed: int = 0) -> Picks:
    """Return picks of `tokens` tokens that follow each other, of a trace [N, K]; it is repeated where it is too short.

    UserError for an empty trace.
    """
    number = len(experts)
    if not number:
        raise UserError("routing=trace: the trace holds no token. Calibrate on more text.")
    start = int(np.random.default_rng(seed).integers(number))
    rows = (start + np.arange(tokens)) % number
    return Picks(experts[rows].astype(np.int64), weights[rows])
