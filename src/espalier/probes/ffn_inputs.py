"""A sample of a dense FFN's inputs, for methods that run it themselves."""

from collections.abc import Sequence

import torch
from torch import Tensor

from espalier.checkpoints.shape import DenseShape
from espalier.collecting.sampling import INPUT_TOKENS, stride
from espalier.models.observe_ffn import FFNTrace
from espalier.probes.probe import Arrays, joined, to_numpy


class FFNInputs:
    """What the FFN got for some of the tokens, T' of them: at most 4,096, evenly strided.

    hidden float32 [T', D].   token int64 [T']: index among all tokens.
    """

    def __init__(self, shape: DenseShape, tokens: int) -> None:
        self.stride = stride(tokens, INPUT_TOKENS)
        self.parts: dict[str, list[Tensor]] = {"hidden": [], "token": []}

    def update(self, trace: FFNTrace) -> None:
        rows = (trace.token % self.stride == 0).nonzero()[:, 0]
        self.parts["hidden"].append(trace.hidden[rows].float().cpu())
        self.parts["token"].append(trace.token[rows].cpu())

    def result(self) -> Arrays:
        return {name: to_numpy(torch.cat(parts)) for name, parts in self.parts.items()}

    @staticmethod
    def merge(parts: Sequence[Arrays], tokens: Sequence[int]) -> Arrays:
        return joined(parts)
