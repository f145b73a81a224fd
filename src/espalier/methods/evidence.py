"""What merges are made of: statistics, the model's shape and weights, and the sampled tokens as the experts see them.

Shapes: T' tokens of the probe `inputs`, K chosen, N of them that matter, D hidden, F expert width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from espalier.checkpoints.shape import ModelShape
from espalier.collecting.stats import Stats

if TYPE_CHECKING:
    from espalier.models.expert_block import Block
    from espalier.models.experts import ExpertWeights

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Evidence:
    """The evidence of a plan; `experts` is None for methods that do not look at weights."""

    stats: Stats
    shape: ModelShape
    experts: "ExpertWeights | None" = None

    @property
    def weights(self) -> "ExpertWeights":
        """Return the model's weights; ValueError where the method did not ask for them."""
        if self.experts is None:
            raise ValueError("this plan needs the model's weights")
        return self.experts

    def block(self, layer: int) -> "Block":
        """Return the experts of a layer, loaded; the layer before is forgotten."""
        return self.weights.block(layer)


def chose_any(arrays: Arrays, group: Sequence[int]) -> NDArray[np.bool_]:
    """Return which tokens of the probe `inputs` chose a member of the group, [T']."""
    return np.asarray(np.isin(arrays["experts"], list(group)).any(axis=1))


def gates(arrays: Arrays, group: Sequence[int]) -> NDArray[np.float64]:
    """Return the routing weight of each member for each token of the probe `inputs`, 0 where not chosen, [T', n]."""
    chosen = arrays["experts"][:, :, None] == np.asarray(group)  # [T', K, n]
    return np.asarray(np.einsum("tkn,tk->tn", chosen, arrays["weights"].astype(np.float64)))


def inner_activations(
    evidence: Evidence, layer: int, group: Sequence[int], hidden: NDArray[np.float32]
) -> list[NDArray[np.float32]]:
    """Return what each member's down projection gets for `hidden` [N, D], float32 [N, F].

    `hidden` is the block's input, also where the router scales what experts get.
    """
    import torch

    block, x = evidence.block(layer), torch.from_numpy(hidden)
    return [block.inner(expert, x).numpy() for expert in group]
