"""A sparse FFN on a GPU: DSMoE's blocks, ToMoE's overlapping experts and all other lists of neurons of one dense FFN.

One stored copy of the neurons serves all units, and a single token reads only its own. The rows are those of
`route_plan`, a unit being an expert; the kernels read each neuron's weights where they lie. Units that overlap (ToMoE)
or that are many for a token (DSMoE) are the same to them. Where the units that a batch runs are, in likelihood, so many
that plan and rows cost more than they save, or overlapping units would read more bytes than the dense FFN has, all
neurons run instead (`worth`): the number of tokens and the units' expected share tell, and nothing is read back.

Shapes: T tokens, U units, D hidden, F stored neurons.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from espalier.kernels import device, ragged_gate_up, ragged_matmul, segment_combine
from espalier.kernels.chooser import Choice, Work, rank
from espalier.kernels.expert_layout import OWN, ExpertLayout
from espalier.kernels.jit import runs_on
from espalier.kernels.ragged_gate_up import NeuronLists, Weights
from espalier.kernels.route_plan import plan
from espalier.kernels.targets import Target

SAVING = 0.95  # of the dense FFN's time: above, it is not worth the plan


@dataclass(frozen=True)
class NeuronFFN:
    """The weights of a dense FFN and the neurons of each unit; what all tokens run is the last unit."""

    layout: ExpertLayout
    first: Weights
    down: Tensor  # [1, D, F], whose neurons' columns lie together
    down_bias: Tensor | None
    lists: NeuronLists
    units: int
    always: bool  # whether there is a unit that all tokens run
    share: float  # of the units, that a token is expected to run
    most: int  # units that a token runs at most

    @classmethod
    def of(cls, ffn: Any) -> "NeuronFFN":
        """Return views of a `SparseFFN`; the down projection is laid out by neuron once, with the same values."""
        stored = [range(start, stop) for start, stop in zip(ffn._edges, ffn._edges[1:], strict=False)]
        lists = [[n for segment in segments for n in stored[segment]] for segments in ffn.units]
        shared = list(range(ffn._edges[ffn.shared]))
        gate, up, down = ffn.gate, ffn.up, ffn.down
        by_neuron = ffn._down_by_neuron()  # [F, D]
        hidden, width = up.in_features, up.out_features
        layout = ExpertLayout.of_ffn(ffn._activation, hidden, width, gated=gate is not None, biased=up.bias is not None)
        router = ffn.router
        most = len(ffn.units) if router.choose == "threshold" else router.k
        return cls(
            layout,
            Weights.of_ffn(gate, up),
            by_neuron.t()[None],
            None if down.bias is None else down.bias[None],
            NeuronLists.of(lists + ([shared] if shared else []), up.weight.device),
            len(ffn.units),
            bool(shared),
            getattr(ffn, "expected_share", None) or (0.5 if router.choose == "threshold" else most / len(ffn.units)),
            most,
        )


def unsupported(ffn: Any, where: torch.device) -> str | None:
    """Return why the kernels cannot run a `SparseFFN`, None if they can."""
    if not runs_on(where):
        return f"Triton does not run on {where.type}"
    if ffn.router is None or ffn.router.kind == "oracle":
        return "every neuron runs"
    layout = ExpertLayout.of_ffn(ffn._activation, 1, 1, gated=ffn.gate is not None, biased=False)
    return "no kernel has its activation" if layout.activation == OWN else None


def forward(ffn: NeuronFFN, hidden: Tensor, weights: Tensor, choice: Choice | None = None) -> Tensor:
    """Return the output [T, D] for `hidden` [T, D] and the units' weights [T, U], 0 where a unit does not run."""
    tokens = len(hidden)
    if choice is None:
        choice = _choose(*_sizes(ffn, tokens), device.target_of(hidden.device))
    if ffn.most < ffn.units:
        unit = (weights != 0).float().topk(ffn.most, dim=1).indices  # a weight may be negative
        weight = weights.gather(1, unit)
    else:
        weight, unit = weights, torch.arange(ffn.units, device=weights.device).expand(tokens, -1)
    number = len(ffn.lists.count)
    unit = torch.where(weight != 0, unit, number)
    if ffn.always:
        unit = torch.cat([unit, unit.new_full((tokens, 1), ffn.units)], dim=1)
        weight = torch.cat([weight, weight.new_ones(tokens, 1)], dim=1)
    found = plan(unit, weight, number, choice.down.block_m, distinct=True)
    h = ragged_gate_up.forward(hidden, ffn.first, ffn.layout, found, choice.gate_up, ffn.lists)
    y = ragged_matmul.forward(h, ffn.down, found, choice.down, lists=ffn.lists)
    return segment_combine.forward(y, found, hidden.dtype, base=ffn.down_bias)


def worth(ffn: NeuronFFN, tokens: int, target: Target) -> bool:
    """Whether the ragged kernels are expected to be faster than all neurons for so many tokens."""
    _, sparse, dense = _seconds(*_sizes(ffn, tokens), target)
    return sparse < SAVING * dense


def _sizes(ffn: NeuronFFN, tokens: int) -> tuple[int, int, int, int, int, float, bool, bool]:
    rounded = 1 << max(0, tokens - 1).bit_length()
    return (
        ffn.layout.hidden,
        ffn.layout.width,
        ffn.lists.width,
        ffn.units,
        rounded,
        ffn.share,
        ffn.always,
        ffn.layout.gated,
    )


@cache
def _choose(*sizes: Any) -> Choice:
    return _seconds(*sizes)[0]


@cache
def _seconds(
    hidden: int,
    width: int,
    unit_width: int,
    units: int,
    tokens: int,
    share: float,
    always: bool,
    gated: bool,
    target: Target,
) -> tuple[Choice, float, float]:
    """Return the best tiles, and the seconds reckoned with them and for the dense FFN."""
    used = max(1, round(units * (1 - (1 - share) ** tokens)))
    each = max(1, round(tokens * share * units / used))
    rows = (each,) * used + (0,) * (units - used) + ((tokens,) if always else ())
    sparse = rank(Work(hidden, unit_width, rows, gated), target, 1)[0]
    dense = rank(Work(hidden, width, (tokens,), gated), target, 1)[0]
    return sparse, sparse.seconds + 2 * target.launch, dense.seconds
