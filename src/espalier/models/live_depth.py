"""The plainest way to let tokens skip layers: every token runs, and what it is not to get is multiplied by 0.

A reference for `espalier.modeling.routed_depth`, with which it shares no code.

Shapes: B sequences, L tokens, D hidden.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from espalier.checkpoints.layer_parts import LayerParts
from espalier.models.live_split import nudged
from espalier.plans.depth import Depth
from espalier.plans.plan_tensors import PlanTensor


class LiveDepth:
    """Changes a loaded decoder layer to do what `operation` says; `tensors` are those of the plan.

    `ffn` is the attribute of the layer's FFN. `decided` gets of each token whether a slightly nudged input would
    enter alike.
    """

    def __init__(
        self,
        layer: Any,
        number: int,
        operation: Depth,
        parts: LayerParts,
        ffn: str,
        tensors: Mapping[str, PlanTensor],
        window: int | None,
    ) -> None:
        self.number, self.operation, self.window = number, operation, window
        self.own = {role: torch.from_numpy(tensors[name].read()) for role, name in operation.tensors_of.items()}
        self.decided: list[bool] = []
        self.factor = torch.zeros(0)
        modules = {"attention": parts.attention, "ffn": ffn}
        outputs = {
            "attention": parts.outputs[0] or parts.attention,
            "ffn": parts.outputs[1] or ffn,
        }
        for role in outputs:
            if operation.granularity in ("block", role):
                getattr(layer, outputs[role]).register_forward_hook(self._weigh)
        module = layer if operation.granularity == "block" else getattr(layer, modules[operation.granularity])
        stock = type(module)

        def forward(itself: Any, *args: Any, **kwargs: Any) -> Any:
            states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            kept = torch.tensor([self._entering(row) for row in states])  # [B, L]
            factor = kept.float()
            if operation.weights == "gate" and operation.rule not in ("random", "drop"):
                factor = factor * torch.tensor([[self._gate(x) for x in row] for row in states])
            self.factor = factor
            if "attention_mask" in kwargs and operation.granularity != "ffn" and operation.cache == "kept":
                kwargs["attention_mask"] = self._mask(kept, states.dtype)
            output = stock.forward(itself, *args, **kwargs)
            if operation.granularity != "block":
                return output
            found = output[0] if isinstance(output, tuple) else output
            found = torch.where(kept[..., None], found, states)
            return (found, *output[1:]) if isinstance(output, tuple) else found

        module.__class__ = type(stock.__name__, (stock,), {"forward": forward})

    def _weigh(self, module: Any, inputs: Any, output: Any) -> Any:
        found = output[0] if isinstance(output, tuple) else output
        found = found * self.factor.reshape(*found.shape[:-1], 1).to(found.dtype)
        return (found, *output[1:]) if isinstance(output, tuple) else found

    def _mask(self, kept: Tensor, dtype: torch.dtype) -> Tensor:
        """Return what is added to the scores [B, 1, L, L]: a token sees itself and earlier ones that enter."""
        length = kept.shape[1]
        mask = torch.full((len(kept), 1, length, length), torch.finfo(dtype).min, dtype=dtype)
        for b, row in enumerate(kept.tolist()):
            for i in range(length):
                first = 0 if self.window is None else max(0, i - self.window + 1)
                for j in range(first, i + 1):
                    if j == i or row[j]:
                        mask[b, 0, i, j] = 0
        return mask

    def _entering(self, row: Tensor) -> list[bool]:
        """Return which tokens of a sequence [L, D] enter, and take down whether that is decided."""
        found = self._rule(row)
        close = [self._rule(near) for near in nudged(row)]
        self.decided += [all(other[t] == found[t] for other in close) for t in range(len(found))]
        return found

    def _rule(self, row: Tensor) -> list[bool]:
        operation, count = self.operation, len(row)
        if operation.rule == "drop":
            return [False] * count
        if operation.rule == "random":
            assert operation.capacity is not None
            return [self._drawn(t) < operation.capacity for t in range(count)]
        if operation.rule == "predictor":
            return [self._predicted(x) > 0 for x in row.float()]
        gates = [self._gate(x) for x in row]
        if operation.rule == "threshold":
            assert operation.threshold is not None
            return [gate >= operation.threshold for gate in gates]
        assert operation.capacity is not None
        most = max(1, round(operation.capacity * count))
        best = sorted(range(count), key=lambda t: -gates[t])[:most]
        return [t in best for t in range(count)]

    def _gate(self, x: Tensor) -> float:
        return 1 / (1 + math.exp(-float(self.own["weight"] @ x.float() + self.own["bias"][0])))

    def _predicted(self, x: Tensor) -> float:
        middle = self.own["first"] @ x
        return float(self.own["second"] @ (middle / (1 + torch.exp(-middle))) + self.own["offset"][0])

    def _drawn(self, position: int) -> float:
        """Return a number in [0, 1) by the position, in whole numbers of 64 bits."""
        assert self.operation.seed is not None
        bits = 2**64
        start = ((self.number + 1) * 0x2545F4914F6CDD1D + (self.operation.seed + 1) * 0x5851F42D4C957F2D) % 2**62
        mixed = (position * 0x1E3779B97F4A7C15 + start) % bits
        for shift, factor in ((31, 0x7FB5D329728EA185), (27, 0x1B873593CC9E2D51), (33, 1)):
            mixed = (mixed ^ (mixed >> shift)) * factor % bits
        return (mixed & 0xFFFFFF) / 0x1000000
