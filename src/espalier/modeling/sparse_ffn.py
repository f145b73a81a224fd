"""A feed-forward network of which each token runs some blocks of neurons; made by Espalier.

Shipped beside `modeling_espalier_ffn.py` in a checkpoint's directory; needs torch only. One module stands for all
methods that make a dense FFN sparse (plans/split.py says what its settings mean). It computes in two ways, equal but
for rounding:

* `masked` computes every neuron and multiplies those that a token does not run by zero: exact gradients, no saving.
* `grouped` computes what runs: tokens are gathered by unit; a single token reads only its own rows of the weights.

Training, and whatever needs gradients, is masked; inference is grouped where that is expected to take less time.
Neither draws random numbers.

Shapes: T tokens, D hidden, F' stored neurons, S segments, U units.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .sparse_router import Router

# A single token computes so many neurons more rather than read the weights in two pieces.
GAP = 32
ALIGN = 64
# So many columns of a matrix that lie side by side are read as fast as rows.
WIDE = 512
# Reading a neuron's weights takes as long as so many products with them (measured on a processor in bfloat16).
TOKENS_A_READ = 32
# The calls for a piece and for a unit take as long as reading so many bytes of weights (measured on a processor); those
# for a piece of 16 bits with a number of tokens that is new are compiled first.
PIECE, UNIT, COMPILED = 2**19, 2**20, 2**24
# Bytes of weights that are written side by side at once: the allocator keeps so much, and caches hold most of it.
COPIED = 3 * 2**23


class SparseFFN(nn.Module):
    """Stands for the FFN `stock` of a decoder layer.

    `modules` names the projections `gate` (or None), `up`, `down` and the `activation` of the stock FFN, which keep
    their names here. `settings` are those of `Split.settings`.
    """

    backend: str = "auto"  # or `masked`; `grouped` even where that takes longer
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
        self._segment_of: Tensor | None = None  # of each neuron
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
            backend = "masked" if torch.is_grad_enabled() or self.training or self._wrapped() else "grouped"
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

    def _wrapped(self) -> bool:
        """Whether a projection computes more than its weights say: one with adapters has to be called."""
        return any(type(part) is not nn.Linear for part in (self.gate, self.up, self.down) if part is not None)

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
        if self._segment_of is None or self._segment_of.device != weights.device:
            segment = torch.arange(len(self.segments)).repeat_interleave(torch.tensor(self.segments))
            self._segment_of = segment.to(weights.device)
        return by_segment.index_select(1, self._segment_of)

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
        if (start, stop) == (0, self._edges[-1]):
            whole: Tensor = self.down(inner)
            return whole
        return functional.linear(inner, self.down.weight[:, start:stop], self.down.bias)

    def _grouped(self, hidden: Tensor, weights: Tensor) -> Tensor:
        if len(hidden) == 1:
            return self._one_token(hidden, weights)
        chosen = weights != 0
        counts = chosen.sum(dim=0).tolist()
        if self.backend != "grouped" and not self._worth_grouping(len(hidden), counts):
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
                weight = weights[tokens, unit].unsqueeze(1)
                found = self._unit(hidden[tokens], weight, tuple(self.units[unit]))
                output.index_add_(0, tokens, found.to(output.dtype))  # autocast has other ideas of it
        return output

    def _unit(self, hidden: Tensor, weight: Tensor, segments: tuple[int, ...]) -> Tensor:
        """Return the weighted output [t, D] of a unit's segments, without a bias, for its tokens [t, D]."""
        runs = self._merged(segments, 0)
        width = sum(stop - start for start, stop in runs)
        # A product with few rows is as slow as one with 32 more; or the rows are first written side by side.
        piece = PIECE if hidden.dtype == torch.float32 else COMPILED
        apart = (len(runs) - 1) * (piece + self._neuron_bytes * len(hidden))
        if apart <= 1.5 * width * self._neuron_bytes:
            inner = self._pieces(hidden, runs)
            return self._down_pieces(inner * weight.to(inner.dtype), runs, None)
        output = hidden.new_zeros(hidden.shape)
        neurons = self._neurons_of(segments, runs, hidden.device)[0]
        for rows in torch.split(neurons, max(1, COPIED // self._neuron_bytes)):
            up = _chosen_rows(self.up, hidden, rows)
            inner = self._activation(up if self.gate is None else _chosen_rows(self.gate, hidden, rows))
            inner = (inner if self.gate is None else inner * up) * weight.to(inner.dtype)
            output = torch.addmm(output, inner, _taken(self._down_by_neuron(), rows))
        return output

    @property
    def _neuron_bytes(self) -> int:
        return (2 if self.gate is None else 3) * self.up.in_features * self.up.weight.element_size()

    def _worth_grouping(self, tokens: int, counts: list[int]) -> bool:
        """Whether the units, run one by one on so many tokens each, take less time than all neurons on all `tokens`.

        A neuron's weights are read once for all of a unit's tokens, which takes as long as TOKENS_A_READ products.
        """
        whole = self._reads(sum(self.segments), tokens)
        parts = (UNIT + self._reads(self.unit_width(unit), n) for unit, n in enumerate(counts) if n)
        return self._reads(self._edges[self.shared], tokens) + sum(parts) < whole

    def _reads(self, neurons: int, tokens: int) -> float:
        """Return the bytes of weights that take as long to read as so many neurons take to run."""
        return neurons * self._neuron_bytes * (1 + tokens / TOKENS_A_READ)

    def _one_token(self, hidden: Tensor, weights: Tensor) -> Tensor:
        """Run the segments of one token's units, read in as few pieces as is worth it."""
        values = (weights[0] @ self.membership(weights.device)).tolist()  # [S]
        values[: self.shared] = [1.0] * self.shared
        segments = tuple(segment for segment, value in enumerate(values) if value)
        runs = self._rounded(segments)
        read = sum(stop - start for start, stop in runs)
        longer = (len(runs) - 1) * PIECE + self._reads(read, 0) > self._reads(sum(self.segments), 0)
        if longer and self.backend != "grouped":
            return self._masked(hidden, weights)
        inner = self._pieces(hidden, runs)
        plain = all(values[segment] == 1.0 for segment in segments)
        if len(runs) > 1 and hidden.dtype == torch.bfloat16 and hidden.device.type == "cpu":
            rows, places = self._neurons_of(segments, runs, hidden.device)
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

    def _neurons_of(
        self, segments: tuple[int, ...], runs: list[tuple[int, int]], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Return the neurons of `segments` and their places among those of `runs` side by side, int64."""
        if segments not in self._rows or self._rows[segments][0].device != device:
            if len(self._rows) > 4096:
                self._rows.clear()
            own = [(self._edges[segment], self._edges[segment + 1]) for segment in segments]
            rows, read = (torch.cat([torch.arange(*run, device=device) for run in every]) for every in (own, runs))
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


def _rows(linear: nn.Linear, hidden: Tensor, start: int, stop: int | None) -> Tensor:
    """Return what the outputs start..stop of a linear layer are for `hidden` [T, D]."""
    if (start, stop) == (0, None):
        whole: Tensor = linear(hidden)
        return whole
    bias = None if linear.bias is None else linear.bias[start:stop]
    return functional.linear(hidden, linear.weight[start:stop], bias)


def _oracle(settings: dict[str, Any]) -> bool:
    return bool(settings["router"]["kind"] == "oracle")


def _chosen_rows(linear: nn.Linear, hidden: Tensor, rows: Tensor) -> Tensor:
    """Return what the outputs `rows` [n] of a linear layer are for `hidden` [T, D]."""
    return functional.linear(hidden, _taken(linear.weight, rows), None if linear.bias is None else linear.bias[rows])


def _taken(weight: Tensor, rows: Tensor) -> Tensor:
    """Return some rows of a matrix side by side; as words of four bytes, which are copied faster than those of two."""
    if weight.element_size() == 2 and weight.shape[1] % 2 == 0 and weight.is_contiguous():
        return weight.view(torch.int32).index_select(0, rows).view(weight.dtype)
    return weight.index_select(0, rows)
