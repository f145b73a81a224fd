"""Ragged gate and up projection: rows are gathered, multiplied by their expert's weights, and activated, in one launch.

h[r] = act(x[token(r)] Wg[e(r)]^T + bg) * (x[token(r)] Wu[e(r)]^T + bu), which never lie in memory without the
activation: it saves 8 F bytes a row in bfloat16. Weights may be transposed, biased, and gate and up may be interleaved;
`Weights` says where they lie. The neurons of an expert may also be some of one dense FFN's (`NeuronLists`).

Shapes: T tokens, R rows, E experts, D hidden, F expert width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from espalier.kernels.expert_layout import ACTIVATIONS, ExpertLayout
from espalier.kernels.jit import jit, runs_on, tl
from espalier.kernels.route_plan import RoutePlan
from espalier.kernels.tile import TileConfig

KINDS = {name: number for number, name in enumerate((*ACTIVATIONS, "swish"))}


@dataclass(frozen=True)
class NeuronLists:
    """Experts whose neurons are some of one dense FFN's, in any number of experts at once.

    neurons int32 [E, F']: which stored neurons each expert has, and what beyond its own number; count int32 [E].
    Weights that lie by neuron are read row by row, so that it costs nothing that an expert's neurons lie apart.
    """

    neurons: Tensor
    count: Tensor

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]], device: torch.device) -> "NeuronLists":
        """Return the lists of E experts."""
        count = torch.tensor([len(list_) for list_ in lists], dtype=torch.int32)
        neurons = torch.zeros(len(lists), max(1, int(count.max())), dtype=torch.int32)
        for expert, list_ in enumerate(lists):
            neurons[expert, : len(list_)] = torch.tensor(list_, dtype=torch.int32)
        return cls(neurons.to(device), count.to(device))

    @property
    def width(self) -> int:
        """Return F', the columns of h."""
        return int(self.neurons.shape[1])


@dataclass(frozen=True)
class Weights:
    """The first product's weights, as its kernel reads them.

    `gate` and `up` point to element 0 of expert 0; `strides` are those of expert, neuron and input, in elements. Where
    they are interleaved the step from gate to up is that of a neuron.
    Without a gate `gate` is None. Biases [E, F] have their own strides of expert and neuron.
    """

    gate: Tensor | None
    up: Tensor
    strides: tuple[int, int, int]
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    bias_strides: tuple[int, int] = (0, 0)
    width: int = 0  # F
    hidden: int = 0  # D
    interleaved: bool = False  # up lies one element after gate, and pairs are read together

    @classmethod
    def of_ffn(cls, gate: nn.Linear | None, up: nn.Linear) -> "Weights":
        """Return views of a dense FFN's projections, [F, D] with biases [F] or none: those of one expert."""
        return cls(
            None if gate is None else gate.weight[None],
            up.weight[None],
            (0, up.weight.stride(0), up.weight.stride(1)),
            None if gate is None or gate.bias is None else gate.bias[None],
            None if up.bias is None else up.bias[None],
            (0, 1),
            up.weight.shape[0],
            up.weight.shape[1],
        )

    @classmethod
    def of(cls, stacked: Tensor, bias: Tensor | None, layout: ExpertLayout) -> "Weights":
        """Return views of stacked weights [E, 2F, D] (or as `layout` says) and biases [E, 2F]."""
        by_neuron = stacked.transpose(1, 2) if layout.transposed else stacked  # [E, 2F, D]
        gates, ups = slice(0), slice(None)
        if layout.interleaved:
            gates, ups = slice(0, None, 2), slice(1, None, 2)
        elif layout.gated:
            gates, ups = slice(layout.width), slice(layout.width, None)
        up = by_neuron[:, ups]
        expert, neuron, input_ = up.stride()
        up_bias = None if bias is None else bias[:, ups]
        return cls(
            by_neuron[:, gates] if layout.gated else None,
            up,
            (expert, neuron // 2 if layout.interleaved else neuron, input_),
            bias[:, gates] if bias is not None and layout.gated else None,
            up_bias,
            (0, 0) if up_bias is None else (up_bias.stride(0), up_bias.stride(1)),
            layout.width,
            layout.hidden,
            layout.interleaved,
        )


@jit
def _activate(x, KIND: tl.constexpr, alpha):
    """ACTIVATIONS in float32, by number."""
    if KIND == 0:
        return x / (1.0 + tl.exp(-x))
    elif KIND == 1:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == 2:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x / (1.0 + tl.exp(-2.0 * inner))  # 0.5 (1 + tanh z) = 1 / (1 + exp(-2 z))
    elif KIND == 3:
        return tl.maximum(x, 0.0)
    elif KIND == 4:
        x = tl.maximum(x, 0.0)
        return x * x
    else:
        return x / (1.0 + tl.exp(-alpha * x))


@jit
def ragged_gate_up(
    x,
    gate,
    up,
    gate_bias,
    up_bias,
    h,
    row_token,
    offsets,
    tile_expert,
    tile_row,
    neurons,
    neuron_count,
    tiles,
    columns,  # blocks of columns
    D,
    F,
    stride_x,
    stride_expert,
    stride_neuron,
    stride_input,
    stride_bias_expert,
    stride_bias_neuron,
    stride_h,
    alpha,
    limit,
    shift,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BIASED: tl.constexpr,
    LIMITED: tl.constexpr,
    KIND: tl.constexpr,
    LISTED: tl.constexpr,
    EVEN: tl.constexpr,  # D is a multiple of BK
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of rows times one block of neurons. Programs of a tile that is not used return at once."""
    pid = tl.program_id(0)
    group = pid // (GROUP * columns)
    inside = pid % (GROUP * columns)
    size = min(tiles - group * GROUP, GROUP)
    tile = group * GROUP + inside % size
    column = inside // size
    expert = tl.load(tile_expert + tile)
    if expert < 0:
        return
    first = tl.load(tile_row + tile)
    end = tl.load(offsets + expert + 1)
    row = first + tl.arange(0, BM)
    row_there = row < end
    place = column * BN + tl.arange(0, BN)  # in h
    if LISTED:
        there = place < tl.load(neuron_count + expert)
        neuron = tl.load(neurons + expert * F + place, mask=there, other=0)
        shift_expert = tl.zeros((), tl.int64)
    else:
        there = place < F
        neuron = place
        shift_expert = expert.to(tl.int64) * stride_expert
    token = tl.load(row_token + row, mask=row_there, other=0)
    inner = tl.arange(0, BK)
    x_at = x + token.to(tl.int64)[:, None] * stride_x + inner[None, :]
    if INTERLEAVED:  # gate and up of a neuron lie side by side: one product of both, parted afterwards
        both = 2 * (column * BN) + tl.arange(0, 2 * BN)
        both_there = both < 2 * F
        both_at = gate + shift_expert + both.to(tl.int64)[None, :] * stride_neuron + inner[:, None] * stride_input
        both_sum = tl.zeros((BM, 2 * BN), tl.float32)
    else:
        at = shift_expert + neuron.to(tl.int64)[None, :] * stride_neuron + inner[:, None] * stride_input
        up_at = up + at
        up_sum = tl.zeros((BM, BN), tl.float32)
        if GATED:
            gate_at = gate + at
            gate_sum = tl.zeros((BM, BN), tl.float32)
    for k in range(0, D, BK):
        if EVEN:
            rows_in = row_there[:, None]
            columns_in = there[None, :]
        else:
            rows_in = row_there[:, None] & (inner < D - k)[None, :]
            columns_in = there[None, :] & (inner < D - k)[:, None]
        part = tl.load(x_at, mask=rows_in, other=0.0)
        if INTERLEAVED:
            pairs_in = both_there[None, :] if EVEN else both_there[None, :] & (inner < D - k)[:, None]
            both_sum = tl.dot(part, tl.load(both_at, mask=pairs_in, other=0.0), both_sum, input_precision=PRECISION)
            both_at += BK * stride_input
        else:
            if GATED:
                weight = tl.load(gate_at, mask=columns_in, other=0.0)
                gate_sum = tl.dot(part, weight, gate_sum, input_precision=PRECISION)
                gate_at += BK * stride_input
            weight = tl.load(up_at, mask=columns_in, other=0.0)
            up_sum = tl.dot(part, weight, up_sum, input_precision=PRECISION)
            up_at += BK * stride_input
        x_at += BK
    if INTERLEAVED:
        gate_sum, up_sum = tl.split(tl.reshape(both_sum, (BM, BN, 2)))
    if BIASED:
        bias_at = expert.to(tl.int64) * stride_bias_expert * (0 if LISTED else 1) + neuron * stride_bias_neuron
        up_sum += tl.load(up_bias + bias_at, mask=there, other=0.0).to(tl.float32)[None, :]
        if GATED:
            gate_sum += tl.load(gate_bias + bias_at, mask=there, other=0.0).to(tl.float32)[None, :]
    if GATED:
        if LIMITED:
            gate_sum = tl.minimum(gate_sum, limit)
            up_sum = tl.minimum(tl.maximum(up_sum, -limit), limit)
        value = _activate(gate_sum, KIND, alpha) * (up_sum + shift)
    else:
        value = _activate(up_sum, KIND, alpha)
    h_at = h + row.to(tl.int64)[:, None] * stride_h + place[None, :]
    tl.store(h_at, value.to(h.dtype.element_ty), mask=row_there[:, None] & there[None, :])


def forward(
    hidden: Tensor,
    weights: Weights,
    layout: ExpertLayout,
    plan: RoutePlan,
    config: TileConfig,
    lists: NeuronLists | None = None,
) -> Tensor:
    """Return the inner activations h [T K, F] of the plan's rows for `hidden` [T, D], in its dtype.

    Rows beyond R are unset, and with `lists`, [T K, F'], columns beyond an expert's number. Listed weights have E = 1.
    """
    if not runs_on(hidden.device):
        return reference(hidden, weights, layout, plan, lists)
    width = weights.width if lists is None else lists.width
    h = hidden.new_empty(len(plan.row_token), width)
    columns = -(-width // config.block_n)
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    some = plan.offsets  # for pointers that are not followed
    with torch.cuda.device_of(hidden):
        ragged_gate_up[(plan.tiles * columns,)](
            hidden,
            weights.up if weights.gate is None else weights.gate,
            weights.up,
            some if weights.gate_bias is None else weights.gate_bias,
            some if weights.up_bias is None else weights.up_bias,
            h,
            plan.row_token,
            plan.offsets,
            plan.tile_expert,
            plan.tile_row,
            some if lists is None else lists.neurons,
            some if lists is None else lists.count,
            plan.tiles,
            columns,
            weights.hidden,
            width,
            hidden.stride(0),
            *weights.strides,
            *weights.bias_strides,
            h.stride(0),
            layout.alpha,
            float("inf") if layout.limit is None else layout.limit,
            layout.shift,
            **constants(weights, layout, config, hidden.dtype, listed=lists is not None),
            **config.constants(),
            **config.options(),
        )
    return h


def constants(
    weights: Weights, layout: ExpertLayout, config: TileConfig, dtype: torch.dtype, *, listed: bool = False
) -> dict[str, object]:
    """Return what the kernel is compiled for beside the tile."""
    return {
        "GATED": weights.gate is not None,
        "INTERLEAVED": weights.interleaved,
        "BIASED": weights.up_bias is not None,
        "LIMITED": layout.limit is not None,
        "KIND": KINDS[layout.activation],
        "LISTED": listed,
        "EVEN": weights.hidden % config.block_k == 0,
        "PRECISION": precision(dtype),
    }


def precision(dtype: torch.dtype) -> str:
    """Return how products of `dtype` are computed: in TF32 where torch's own are."""
    return "tf32" if dtype != torch.float32 or torch.backends.cuda.matmul.allow_tf32 else "ieee"


def reference(
    hidden: Tensor, weights: Weights, layout: ExpertLayout, plan: RoutePlan, lists: NeuronLists | None = None
) -> Tensor:
    """Return what `forward` does, one expert after another, in plain torch; rows beyond R are zero."""
    width = weights.width if lists is None else lists.width
    h = hidden.new_zeros(len(plan.row_token), width)
    edges = plan.offsets.tolist()
    for expert, (start, stop) in enumerate(pairwise(edges)):
        if start == stop:
            continue
        x = hidden[plan.row_token[start:stop].long()]
        own = slice(None) if lists is None else lists.neurons[expert, : int(lists.count[expert])].long()
        found = _inner(x, weights, layout, expert if lists is None else 0, own)
        h[start:stop, : found.shape[1]] = found
    return h


def _inner(x: Tensor, weights: Weights, layout: ExpertLayout, expert: int, neurons: slice | Tensor) -> Tensor:
    def product(weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.linear(x, weight[expert, neurons], None if bias is None else bias[expert, neurons])

    up = product(weights.up, weights.up_bias)
    act = layout.act
    if weights.gate is None:
        return act(up)
    return layout.combine(product(weights.gate, weights.gate_bias), up)
