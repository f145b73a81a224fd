"""Linear CKA of experts' outputs: how alike two experts answer, whatever the turn and the scale of the answers.

Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019 (arXiv 1905.00414), equation 3.
With X, Y [N, D] the outputs of two experts on N tokens, each column less its mean:

    CKA(X, Y) = ||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F) = <X X^T, Y Y^T> / (||X X^T||_F ||Y Y^T||_F)

The second form takes one N x N matrix an expert; the first one D x D for each pair of them.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

GRAM_NUMBERS = 2**28  # of float32 in memory: the N x N matrices of all E experts of a layer
TOKENS = 1024


def sample(tokens: int, experts: int) -> NDArray[np.int64]:
    """Return which of the tokens are compared: evenly strided, at most TOKENS and as many as GRAM_NUMBERS allow."""
    most = min(TOKENS, int((GRAM_NUMBERS / experts) ** 0.5))
    return np.arange(0, tokens, max(1, -(-tokens // most)))


def linear_cka(output: Callable[[int], NDArray[np.float32]], experts: int) -> Floats:
    """Return the CKA of every two experts, float64 [E, E]; `output(e)` gives [N, D], on the same tokens for all.

    An expert whose outputs are all the same is like none, itself excepted.
    """
    grams: list[NDArray[np.float32]] = []
    for expert in range(experts):
        x = output(expert).astype(np.float64)
        x -= x.mean(axis=0)
        gram = x @ x.T
        norm = float(np.linalg.norm(gram))
        grams.append((gram / norm if norm > 0 else gram).astype(np.float32).ravel())
    rows = np.stack(grams)
    found = np.clip((rows @ rows.T).astype(np.float64), 0, 1)
    np.fill_diagonal(found, 1)
    return (found + found.T) / 2


def relative_to_mean(similarity: Floats) -> Floats:
    """Return `similarity` [E, E] over its mean over pairs of different experts; ones where that is 0 or none."""
    pairs = similarity[~np.eye(len(similarity), dtype=bool)]
    mean = float(pairs.mean()) if pairs.size else 0.0
    return similarity / mean if mean > 0 else np.ones_like(similarity)
