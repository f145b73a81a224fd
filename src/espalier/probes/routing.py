"""Which experts each token chose, and how strongly."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from espalier.checkpoints.shape import ModelShape
from espalier.models.observe import BlockTrace
from espalier.probes.probe import Arrays, joined, to_numpy


class Routing:
    """A token's K experts in the order of falling weight; equal weights in the router's own order.

    weights float32 [T, K]: as the router returns them.
    experts int32 [T, K]: the router's rows, which are experts but in a merged checkpoint.
    probability float32 [T, K]: softmax of the logits over all rows.
    """

    dense: ClassVar[bool] = False
    merged: ClassVar[bool] = True

    def __init__(self, shape: ModelShape, tokens: int) -> None:
        self.parts: dict[str, list[Tensor]] = {"weights": [], "experts": [], "probability": []}

    def update(self, trace: BlockTrace) -> None:
        weights, order = trace.router_weights.float().sort(dim=-1, descending=True, stable=True)
        rows = trace.router_indices.gather(1, order)  # [T, K]
        self.parts["weights"].append(weights.cpu())
        self.parts["experts"].append(rows.int().cpu())
        self.parts["probability"].append(trace.logits.softmax(-1).gather(1, rows).cpu())

    def result(self) -> Arrays:
        return {name: to_numpy(torch.cat(parts)) for name, parts in self.parts.items()}

    @staticmethod
    def merge(parts: Sequence[Arrays], tokens: Sequence[int]) -> Arrays:
        return joined(parts)
