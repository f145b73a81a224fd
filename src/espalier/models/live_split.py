"""The plainest way to run a split FFN: every token alone, all neurons, most of them times 0, with the source's weights.

And attention of which heads lose dimensions: whole projections, then zeros. A reference for `modeling.sparse_ffn` and
`modeling.sparse_attention`, with which it shares no code.

Shapes: D hidden, F neurons of the source, U units.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from espalier.dense_families import DenseFamily
from espalier.plans.narrow_attention import NarrowAttention
from espalier.plans.operations import Operation
from espalier.plans.plan_tensors import PlanTensor
from espalier.plans.split import Split

# Where so small a relative change of a token's input changes what it runs, rounding decides. Each draw changes only
# about half of the choices that hang on it.
NUDGE, DRAWS = 1e-5, 8


def change_layer(
    module: Any,
    operations: Sequence[Operation],
    family: DenseFamily,
    tensors: Mapping[str, PlanTensor],
    config: Any,
) -> "list[LiveSplit | LiveValues]":
    """Let a decoder layer compute what its operations say, with its own parameters; thresholds are not for it.

    Returns what knows whether rounding decides.
    """
    lives: list[LiveSplit | LiveValues] = []
    for operation in operations:
        if isinstance(operation, Split):
            stock = getattr(module, family.module)
            split = LiveSplit(stock, family, operation, tensors)
            stock.forward = split.forward
            lives.append(split)
        elif isinstance(operation, NarrowAttention):
            attention = getattr(module, family.attention)
            head = family.head(config.to_dict())
            if operation.pairs is not None:
                kept = _kept_dimensions(tensors[operation.pairs].read().tolist(), head, family.rotary(config.to_dict()))
                for role in ("query", "key"):
                    projection = getattr(attention, family.attention_modules[role])
                    projection.register_forward_hook(partial(_zero, kept))
            if operation.values:
                values = LiveValues(operation, tensors)
                getattr(attention, family.attention_modules["value"]).register_forward_hook(values.hook)
                lives.append(values)
    return lives


def _kept_dimensions(pairs: list[int], head: int, rotary: int) -> list[bool]:
    """Return of each dimension of a head whether its pair is kept."""
    kept = []
    for dimension in range(head):
        if dimension < rotary:
            pair = dimension % (rotary // 2)
        else:
            pair = rotary // 2 + (dimension - rotary) % ((head - rotary) // 2)
        kept.append(pair in pairs)
    return kept


def _zero(kept: list[bool], projection: Any, inputs: Any, output: Tensor) -> Tensor:
    """Return a projection's output with the dimensions of every head that are not kept set to 0."""
    mask = torch.tensor(kept * (output.shape[-1] // len(kept)), device=output.device)
    return torch.where(mask, output, torch.zeros_like(output))


class LiveValues:
    """Sets dimensions of values to 0 that a token leaves out; `decided` as in `LiveSplit`."""

    def __init__(self, operation: NarrowAttention, tensors: Mapping[str, PlanTensor]) -> None:
        self.own = {role: torch.from_numpy(tensors[name].read()) for role, name in operation.values.items()}
        self.offset = operation.offset
        self.decided: list[bool] = []

    def hook(self, projection: Any, inputs: Any, output: Tensor) -> Tensor:
        """Return the values [..., heads x h] of the input [..., D], token by token."""
        rows = []
        for x, values in zip(inputs[0].flatten(0, -2), output.flatten(0, -2), strict=True):
            kept = self._kept(x)
            self.decided.append(all(self._kept(near) == kept for near in nudged(x)))
            rows.append(values * torch.tensor(kept * (len(values) // len(kept)), dtype=values.dtype))
        return torch.stack(rows).view_as(output)

    def _kept(self, x: Tensor) -> list[bool]:
        mixed = self.own["enter"] @ x.float() + self.own["mean"]
        centred = mixed - mixed.mean()
        normed = centred / torch.sqrt(centred.square().mean() + 1e-5) * self.own["norm_weight"] + self.own["norm_bias"]
        raised = normed * 0.5 * (1 + torch.erf(normed / math.sqrt(2)))
        found: list[bool] = (self.own["decode"] @ raised + self.offset > 0).tolist()
        return found


def nudged(x: Tensor) -> list[Tensor]:
    """Return slightly different inputs."""
    generator = torch.Generator().manual_seed(0)
    return [x * (1 + NUDGE * torch.randn(x.shape, generator=generator)) for _ in range(DRAWS)]


class LiveSplit:
    """Runs the FFN `stock` as `split` says; `tensors` are those of the plan.

    `decided` gets of each token whether a slightly nudged input would run the same neurons.
    """

    def __init__(self, stock: Any, family: DenseFamily, split: Split, tensors: Mapping[str, PlanTensor]) -> None:
        self.stock, self.family, self.split = stock, family, split
        self.decided: list[bool] = []
        width = getattr(stock, family.up).out_features
        stored = list(range(width)) if split.neurons is None else tensors[split.neurons].read().tolist()
        starts = [sum(split.segments[:n]) for n in range(len(split.segments))]
        self.segment = [stored[at : at + size] for at, size in zip(starts, split.segments, strict=True)]
        self.router = {role: torch.from_numpy(tensors[name].read()) for role, name in split.tensors_of.items()}

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the output [..., D] for `hidden` [..., D]."""
        rows = [self._token(x) for x in hidden.reshape(-1, hidden.shape[-1])]
        return torch.stack(rows).view_as(hidden).to(hidden.dtype)

    def _token(self, x: Tensor) -> Tensor:
        act, down = getattr(self.stock, self.family.activation), getattr(self.stock, self.family.down)
        inner = getattr(self.stock, self.family.up)(x)
        gate = self.family.gate
        inner = act(inner) if gate is None else act(getattr(self.stock, gate)(x)) * inner
        found = self.weights(x, inner)
        near = zip(nudged(x), nudged(inner), strict=True)
        self.decided.append(all(self.weights(*both).keys() == found.keys() for both in near))
        factor = torch.zeros_like(inner)
        factor[list(found)] = torch.tensor(list(found.values()), dtype=factor.dtype)
        output: Tensor = down(factor * inner)
        return output

    def weights(self, x: Tensor, inner: Tensor) -> dict[int, float]:
        """Return what each neuron that runs is multiplied by, for the input x [D] and all activations [F]."""
        split = self.split
        found = {neuron: 1.0 for part in self.segment[: split.shared] for neuron in part}
        if split.router == "none":
            return {neuron: 1.0 for part in self.segment for neuron in part}
        if split.router == "oracle":
            return found | dict.fromkeys(self._best(inner), 1.0)
        for unit, weight in self._units(x.float()).items():
            for segment in split.units[unit]:
                for neuron in self.segment[segment]:
                    found[neuron] = found.get(neuron, 0.0) + weight
        return found

    def _best(self, inner: Tensor) -> list[int]:
        norms = getattr(self.stock, self.family.down).weight.float().square().sum(0)
        value = (inner.float().square() * norms).tolist()
        split = self.split
        assert split.k is not None
        if split.level == "neurons":
            free = [neuron for part in self.segment[split.shared :] for neuron in part]
            return sorted(free, key=lambda neuron: -value[neuron])[: split.k]
        units = [[neuron for s in unit for neuron in self.segment[s]] for unit in split.units]
        units.sort(key=lambda unit: -sum(value[neuron] for neuron in unit))
        return [neuron for unit in units[: split.k] for neuron in unit]

    def _units(self, x: Tensor) -> dict[int, float]:
        """Return the weights of the units that a token runs."""
        split, count = self.split, len(self.split.units)
        if split.normalise:
            x = x / x.norm()
        scores = self._scores(x)
        if split.choose == "threshold":
            assert split.threshold is not None
            gates = [1 / (1 + math.exp(-score)) for score in scores]
            chosen = [u for u in range(count) if gates[u] > split.threshold] or [gates.index(max(gates))]
            if split.weights == "one":
                return dict.fromkeys(chosen, split.scale)
            return {u: gates[u] * count / len(chosen) for u in chosen}
        ranked = scores
        if split.router == "analytic" and "bias" in self.router:
            ranked = [score + float(self.router["bias"][u]) for u, score in enumerate(scores)]
        chosen = sorted(range(count), key=lambda u: -ranked[u])[: split.k]
        if split.weights == "softmax":
            total = sum(math.exp(scores[u]) for u in chosen)
            return {u: split.scale * math.exp(scores[u]) / total for u in chosen}
        if split.weights == "score":
            return {u: 1 + scores[u] * float(self.router["scale"][u]) for u in chosen}
        return dict.fromkeys(chosen, split.scale)

    def _scores(self, x: Tensor) -> list[float]:
        own = self.router
        if self.split.router == "linear":
            return [float(own["weight"][u] @ x) + float(own["bias"][u] if "bias" in own else 0.0)
                    for u in range(len(self.split.units))]  # fmt: skip
        if self.split.router == "mlp":
            middle = torch.stack([torch.tanh(row @ x) for row in own["first"]])
            return [float(row @ middle) for row in own["second"]]
        act = getattr(self.stock, self.family.activation)
        raw = []
        for u in range(len(self.split.units)):
            value = act(own["gate"][u] @ x + (own["offset"][u] if "offset" in own else 0.0))
            raw.append(abs(float(value * (own["up"][u] @ x if "up" in own else 1.0))))
        total = sum(math.exp(value) for value in raw)
        return [math.exp(value) / total for value in raw]
