"""A feed-forward network of which each token runs some blocks of neurons; made by Espalier.

Shipped beside `modeling_espalier.py` in a checkpoint's directory; needs torch only. One module stands for all methods
that make a dense FFN sparse (espalier/split.py says what its settings mean). It computes in two ways, equal but for
rounding:

* `masked` computes every neuron and multiplies those that a token does not run by zero: exact gradients, no saving.
* `grouped` computes what runs: tokens are gathered by unit; a single token reads only its own rows of the weights.

Training, and whatever needs gradients, is masked; inference is grouped. Neither draws random numbers.

Shapes: T tokens, D hidden, F' stored neurons, S segments, U units.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

# A single token computes so many neurons more rather than read the weights in two pieces.
GAP = 32
ALIGN = 64
# So many columns of a matrix that lie side by side are read as fast as rows.
WIDE = 512
# Reading a neuron's weights takes as long as so many products with them (measured on a processor in bfloat16).
TOKENS_A_READ = 32


class SparseFFN(nn.Module):
    """Stands for the FFN `stock` of a decoder layer.

    `modules` names the projections `gate` (or None), `up`, `down` and the `activation` of the stock FFN, which keep
    their names here. `settings` are those of `Split.settings`.
    """

    backend: str = "auto"  # or `masked`, `grouped`
    # What computes [T, D] and [T, U] to [T, D] instead of `_grouped`, or None: of espalier.kernels
    kernel: Any = None

    def __init__(self, stock: Any, modules: dict[str, Any], settings: dict[str, Any]) -> None:
        super().__init__()
        self.names, self.units, self.shared = modules, settings["units"], settings["shared"]
        self.segments: list[int] = settings["segments"]
        width = sum(self.segments)
        hidden = getattr(stock, modules["up"]).in_features
        for role in ("gate", "up", "down"):
            if modules[role] is not None:
                old = getattr(stock, modules[role])
                size = (width, hidden) if role == "down" else (hidden, width)
                new = nn.Linear(*size, bias=old.bias is not None, device=old.weight.device, dtype=old.weight.dtype)
                setattr(self, modules[role], new)
        setattr(self, modules["activation"], getattr(stock, modules["activation"]))
        self.router = Router(hidden, len(self.units), settings["router"]) if self.units or _oracle(settings) else None
        self._edges = list(accumulate(self.segments, initial=0))
        self._member: Tensor | None = None
        self._runs: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        self._rows: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the FFN's output, of the shape and dtype of `hidden` [..., D]."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        if self.router is None:
            return self._project(self._inner(flat), 0, self._edges[-1]).view_as(hidden)
        if self.router.kind == "oracle":
            inner = self._inner(flat)
            kept = self._oracle(inner)
            return self._project(inner * kept, 0, self._edges[-1]).view_as(hidden)
        weights = self.router(flat, self._activation)  # [T, U], 0: not run
        backend = self.backend
        if backend == "auto":
            backend = "masked" if torch.is_grad_enabled() or self.training else "grouped"
        output = None
        if backend == "grouped":
            output = self._grouped(flat, weights) if self.kernel is None else self.kernel(self, flat, weights)
        if output is None:
            output = self._masked(flat, weights)
        return output.view_as(hidden)

    def unit_width(self, unit: int) -> int:
        """Neurons of a unit, without the shared ones."""
        return sum(self.segments[segment] for segment in self.units[unit])

    @property
    def down(self) -> nn.Linear:
        module: nn.Linear = getattr(self, self.names["down"])
        return module

    @property
    def up(self) -> nn.Linear:
        module: nn.Linear = getattr(self, self.names["up"])
        return module

    @property
    def gate(self) -> nn.Linear | None:
        return None if self.names["gate"] is None else getattr(self, self.names["gate"])

    @property
    def _activation(self) -> Any:
        return getattr(self, self.names["activation"])

    def membership(self, device: torch.device) -> Tensor:
        """Which segments each unit runs, float32 [U, S]; shared segments are in none."""
        if self._member is None or self._member.device != device:
            # No buffer: one that lies in no file would be left empty when the model is loaded.
            member = torch.zeros(len(self.units), len(self.segments))
            for unit, segments in enumerate(self.units):
                member[unit, segments] = 1.0
            self._member = member.to(device)
        return self._member

    def neuron_weights(self, weights: Tensor) -> Tensor:
        """Return what each neuron's activation is multiplied by, [T, F'], for the weights of units [T, U]."""
        by_segment = weights @ self.membership(weights.device).to(weights.dtype)
        if self.shared:
            always = torch.ones_like(by_segment[:, : self.shared])
            by_segment = torch.cat([always, by_segment[:, self.shared :]], dim=1)
        return by_segment.repeat_interleave(torch.tensor(self.segments, device=weights.device), dim=1)

    def active_neurons(self, weights: Tensor) -> Tensor:
        """Return how many neurons each token runs, int64 [T]: a segment that two of its units share counts once."""
        used = (weights != 0).float() @ self.membership(weights.device) > 0
        used[:, : self.shared] = True
        return (used * torch.tensor(self.segments, device=weights.device)).sum(dim=1)

    def _masked(self, hidden: Tensor, weights: Tensor) -> Tensor:
        inner = self._inner(hidden) * self.neuron_weights(weights).to(hidden.dtype)
        return self._project(inner, 0, self._edges[-1])

    def _inner(self, hidden: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the activations of the neurons start..stop, [T, stop - start]."""
        up = _rows(self.up, hidden, start, stop)
        if self.gate is None:
            activated: Tensor = self._activation(up)
            return activated
        inner: Tensor = self._activation(_rows(self.gate, hidden, start, stop)) * up
        return inner

    def _project(self, inner: Tensor, start: int, stop: int) -> Tensor:
        return functional.linear(inner, self.down.weight[:, start:stop], self.down.bias)

    def _grouped(self, hidden: Tensor, weights: Tensor) -> Tensor:
        if len(hidden) == 1:
            return self._one_token(hidden, weights)
        chosen = weights != 0
        counts = chosen.sum(dim=0).tolist()
        if not self._worth_grouping(len(hidden), counts):
            return self._masked(hidden, weights)
        always = self._edges[self.shared]
        if always:
            output = self._project(self._inner(hidden, 0, always), 0, always)
        else:
            output = hidden.new_zeros(hidden.shape)
            if self.down.bias is not None:
                output = output + self.down.bias
        for unit, count in enumerate(counts):
            if count:
                tokens = chosen[:, unit].nonzero()[:, 0]
                inner = self._pieces(hidden[tokens], self._merged(tuple(self.units[unit]), 0))
                inner = inner * weights[tokens, unit].unsqueeze(1).to(inner.dtype)
                output.index_add_(0, tokens, self._down_pieces(inner, self._merged(tuple(self.units[unit]), 0), None))
        return output

    def _worth_grouping(self, tokens: int, counts: list[int]) -> bool:
        """Whether the units, run one by one on so many tokens each, take less time than all neurons on all `tokens`.

        A neuron's weights are read once for all of a unit's tokens, which takes as long as TOKENS_A_READ products.
        """
        whole = sum(self.segments) * (1 + tokens / TOKENS_A_READ)
        always = self._edges[self.shared] * (1 + tokens / TOKENS_A_READ)
        parts = (self.unit_width(unit) * (1 + n / TOKENS_A_READ) for unit, n in enumerate(counts) if n)
        return bool(always + sum(parts) < whole)

    def _one_token(self, hidden: Tensor, weights: Tensor) -> Tensor:
        """Run the segments of one token's units, read in as few pieces as is worth it."""
        values = (weights[0] @ self.membership(weights.device)).tolist()  # [S]
        values[: self.shared] = [1.0] * self.shared
        segments = tuple(segment for segment, value in enumerate(values) if value)
        runs = self._rounded(segments)
        inner = self._pieces(hidden, runs)
        plain = all(values[segment] == 1.0 for segment in segments)
        if len(runs) > 1 and hidden.dtype == torch.bfloat16 and hidden.device.type == "cpu":
            rows, places = self._neurons_of(segments, runs)
            inner = inner[0, places]
            if not plain:
                inner = inner * self.neuron_weights(weights)[0, rows].to(inner.dtype)
            return self._sum_of_rows(rows, inner)
        if not plain or inner.shape[1] != sum(self.segments[segment] for segment in segments):
            factors = self.neuron_weights(weights)[0]  # 0 for what was read only to save a piece
            kept = torch.cat([factors[start:stop] for start, stop in runs])
            inner = inner * kept.to(inner.dtype)
        return self._down_pieces(inner, runs, self.down.bias)

    def _rounded(self, segments: tuple[int, ...]) -> list[tuple[int, int]]:
        """Return the stretches of neurons that hold `segments`, several of them in lengths that are multiples of ALIGN.

        Libraries compile a product for every new size, which takes longer than the product.
        """
        key = (-1, *segments)
        if key not in self._runs:
            runs = list(self._merged(segments, GAP))
            if len(runs) > 1:
                rounded: list[tuple[int, int]] = []
                for start, stop in runs:
                    if rounded and start <= rounded[-1][1]:
                        start = rounded.pop()[0]
                    length = -(-(stop - start) // ALIGN) * ALIGN
                    rounded.append((start, min(start + length, self._edges[-1])))
                runs = rounded
            self._runs[key] = runs
        return self._runs[key]

    def _pieces(self, hidden: Tensor, runs: list[tuple[int, int]]) -> Tensor:
        """Return the activations of the neurons of some stretches, side by side, for tokens [t, D]."""
        if len(runs) == 1:
            return self._inner(hidden, *runs[0])
        up = torch.cat([_rows(self.up, hidden, *run) for run in runs], dim=1)
        if self.gate is None:
            activated: Tensor = self._activation(up)
            return activated
        inner: Tensor = self._activation(torch.cat([_rows(self.gate, hidden, *run) for run in runs], dim=1)) * up
        return inner

    def _down_pieces(self, inner: Tensor, runs: list[tuple[int, int]], bias: Tensor | None) -> Tensor:
        """Return the output [t, D] of activations that lie side by side as `_pieces` returns them."""
        if len(runs) == 1:
            start, stop = runs[0]
            return functional.linear(inner, self.down.weight[:, start:stop], bias)
        rows = self._down_by_neuron() if inner.shape[1] < len(runs) * WIDE else self.down.weight.t()
        output = inner.new_zeros(len(inner), rows.shape[1]) if bias is None else bias.expand(len(inner), -1)
        done = 0
        for start, stop in runs:
            output = torch.addmm(output, inner[:, done : done + stop - start], rows[start:stop])
            done += stop - start
        return output

    def _neurons_of(self, segments: tuple[int, ...], runs: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Return the neurons of `segments` and their places among those of `runs` side by side, int64."""
        if segments not in self._rows:
            if len(self._rows) > 4096:
                self._rows.clear()
            rows = torch.cat([torch.arange(self._edges[segment], self._edges[segment + 1]) for segment in segments])
            read = torch.cat([torch.arange(*run) for run in runs])
            self._rows[segments] = rows, torch.searchsorted(read, rows)
        return self._rows[segments]

    def _sum_of_rows(self, rows: Tensor, inner: Tensor) -> Tensor:
        """Return the output [1, D] of the activations `inner` of the neurons `rows`, both [n].

        On a processor in bfloat16 it reads rows wherever they lie faster than a product reads them side by side.
        """
        table = self._down_by_neuron()
        first = torch.zeros(1, dtype=torch.int64)
        output = functional.embedding_bag(rows, table, first, mode="sum", per_sample_weights=inner)
        return output if self.down.bias is None else output + self.down.bias

    def _down_by_neuron(self) -> Tensor:
        """Return the transposed down projection [F', D], whose rows lie together from the first call on.

        A neuron's column of the matrix lies scattered over all its rows; the parameter keeps its shape and values.
        """
        weight = self.down.weight
        if not weight.t().is_contiguous() and not torch.is_grad_enabled():
            with torch.inference_mode(False):
                weight.data = weight.detach().t().contiguous().t()
        return weight.t()

    def _merged(self, segments: Sequence[int], gap: int) -> list[tuple[int, int]]:
        """Return the stretches of neurons that hold `segments`, those at most `gap` apart joined."""
        key = (gap, *segments)
        if key not in self._runs:
            if len(self._runs) > 4096:  # combinations of units that tokens chose
                self._runs.clear()
            runs: list[tuple[int, int]] = []
            for segment in segments:
                start, stop = self._edges[segment], self._edges[segment + 1]
                if runs and start - runs[-1][1] <= gap:
                    runs[-1] = (runs[-1][0], stop)
                else:
                    runs.append((start, stop))
            self._runs[key] = runs
        return self._runs[key]

    def _oracle(self, inner: Tensor) -> Tensor:
        """Return which neurons an upper bound runs, for their activations [T, F']."""
        assert self.router is not None
        value = inner.float().square() * self.down.weight.float().square().sum(0)  # [T, F']
        always = self._edges[self.shared]
        if self.router.level == "neurons":
            best = value[:, always:].topk(self.router.k, dim=1).indices + always
            kept = torch.zeros_like(value).scatter_(1, best, 1.0)
        else:
            owner = self.membership(value.device).repeat_interleave(
                torch.tensor(self.segments, device=value.device), dim=1
            )
            chosen = (value @ owner.T).topk(self.router.k, dim=1).indices
            weights = torch.zeros(len(value), len(self.units), device=value.device).scatter_(1, chosen, 1.0)
            kept = self.neuron_weights(weights)
        kept[:, :always] = 1.0
        return kept.to(inner.dtype)


class Router(nn.Module):
    """Scores the units of a FFN for each token and returns their weights; computes in float32.

    `straight_through` (training): a unit that does not run still has the gradient of its gate (DSMoE, eq. 10).
    `gates` keeps those of the last call, [T, U], with their gradient: what DSMoE's loss makes small.
    """

    straight_through: bool = True

    def __init__(self, hidden: int, units: int, settings: dict[str, Any]) -> None:
        super().__init__()
        self.kind, self.choose, self.weigh = settings["kind"], settings["choose"], settings["weights"]
        self.k, self.threshold, self.scale_by = settings["k"], settings["threshold"], settings["scale"]
        self.normalise, self.level, self.units = settings["normalise"], settings["level"], units
        sizes = {
            "weight": (units, hidden),
            "gate": (units, hidden),
            "up": (units, hidden),
            "first": (settings["hidden"], hidden),
            "second": (units, settings["hidden"]),
            "bias": (units,),
            "scale": (units,),
            "offset": (units,),
        }
        for role in settings["tensors"]:
            self.register_parameter(role, nn.Parameter(torch.zeros(sizes[role], dtype=torch.float32)))
        # A choice has no gradient; only what weighs the chosen has one.
        self.learns = self.weigh != "one" and self.kind != "oracle"
        if self.kind == "analytic" and self.has("bias"):
            self.own("bias").requires_grad_(False)
        self.gates: Tensor | None = None

    def own(self, role: str) -> Tensor:
        """Return the parameter that has this role."""
        return self.get_parameter(role)

    def has(self, role: str) -> bool:
        """Whether there is a parameter for this role."""
        return role in self._parameters

    def scores(self, hidden: Tensor, activation: Any) -> Tensor:
        """Return the units' scores, float32 [T, U]."""
        x = hidden.float()
        if self.normalise:
            x = functional.normalize(x, dim=-1)
        if self.kind == "linear":
            return functional.linear(x, self.own("weight"), self.own("bias") if self.has("bias") else None)
        if self.kind == "mlp":
            return functional.linear(functional.linear(x, self.own("first")).tanh(), self.own("second"))
        offset = self.own("offset") if self.has("offset") else None
        found: Tensor = activation(functional.linear(x, self.own("gate"), offset))
        if self.has("up"):
            found = found * functional.linear(x, self.own("up"))
        return found.abs().softmax(dim=-1)

    def forward(self, hidden: Tensor, activation: Any) -> Tensor:
        """Return the weights of the units, float32 [T, U]; 0 where a unit does not run."""
        scores = self.scores(hidden, activation)
        if self.choose == "threshold":
            return self._gated(scores)
        ranked = scores
        if self.kind == "analytic" and self.has("bias"):
            ranked = scores + self.own("bias")
        chosen = torch.zeros_like(scores).scatter(1, ranked.topk(self.k, dim=1).indices, 1.0)
        if self.weigh == "softmax":
            return scores.masked_fill(chosen == 0, float("-inf")).softmax(dim=-1).mul(self.scale_by)
        if self.weigh == "score":
            return chosen * (1 + scores * self.own("scale"))
        return chosen.mul(self.scale_by)

    def _gated(self, scores: Tensor) -> Tensor:
        """Return q U / (units chosen) of the units whose q = sigmoid(score) exceeds the threshold."""
        q = scores.sigmoid()
        chosen = q > self.threshold
        # None may do so: then the largest runs, since the number of units chosen is divided by.
        chosen = chosen | functional.one_hot(q.argmax(dim=1), self.units).bool() & ~chosen.any(dim=1, keepdim=True)
        self.gates = gated = q * chosen
        weights: Tensor
        if self.weigh == "one":
            weights = chosen.to(q.dtype) * self.scale_by
            return weights
        if self.training and self.straight_through:
            gated = gated.detach() + q - q.detach()
        weights = gated * (self.units / chosen.sum(dim=1, keepdim=True))
        return weights


def _rows(linear: nn.Linear, hidden: Tensor, start: int, stop: int | None) -> Tensor:
    """Return what the outputs start..stop of a linear layer are for `hidden` [T, D]."""
    bias = None if linear.bias is None else linear.bias[start:stop]
    return functional.linear(hidden, linear.weight[start:stop], bias)


def _oracle(settings: dict[str, Any]) -> bool:
    return bool(settings["router"]["kind"] == "oracle")
