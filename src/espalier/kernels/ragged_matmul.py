"""Ragged product: each row times the matrix of its expert, in one launch; the down projection, and what training needs.

y[r] = s(r) (x[r] W[e(r)]^T + b[e(r)]). The rows of x are those of the plan, or tokens that are gathered. At few tokens
several programs share the inner dimension (`split`), so that all of a GPU's memory pipes read weights: a token of
Mixtral has 64 tiles of 128 columns for 108 to 132 multiprocessors. Their parts lie in fp32 one after another and are
added, in order, where a token's rows are (`segment_combine`), so that the result does not depend on timing.

Shapes: T tokens, R rows, E experts, K inner dimension, N columns, S splits.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from espalier.kernels.jit import jit, runs_on, tl
from espalier.kernels.ragged_gate_up import NeuronLists, precision
from espalier.kernels.route_plan import RoutePlan
from espalier.kernels.tile import TileConfig


@jit
def ragged_matmul(
    x,
    weight,
    bias,
    y,
    row_token,
    row_scale,
    offsets,
    tile_expert,
    tile_row,
    neurons,
    neuron_count,
    tiles,
    columns,  # blocks of columns
    K,
    N,
    share,  # of the inner dimension, that one split sums, a multiple of BK
    stride_x,
    stride_expert,
    stride_column,
    stride_inner,
    stride_bias,
    stride_y,
    stride_split,
    GATHERED: tl.constexpr,
    SCALED: tl.constexpr,
    BIASED: tl.constexpr,
    LISTED: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN: tl.constexpr,  # K is a multiple of BK and of every share
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of rows times one block of columns, over one share of the inner dimension."""
    pid = tl.program_id(0)
    split = tl.program_id(1)
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
    n = column * BN + tl.arange(0, BN)
    there = n < N
    source = row
    if GATHERED:
        source = tl.load(row_token + row, mask=row_there, other=0)
    inner = tl.arange(0, BK)
    x_at = x + source.to(tl.int64)[:, None] * stride_x + inner[None, :]
    at = weight + n.to(tl.int64)[None, :] * stride_column
    begin = split * share
    stop = min(begin + share, K)
    if LISTED:
        stop = min(stop, tl.load(neuron_count + expert))
        neuron_at = neurons + expert * K + inner
    else:
        at += expert.to(tl.int64) * stride_expert + (begin + inner).to(tl.int64)[:, None] * stride_inner
    x_at += begin
    total = tl.zeros((BM, BN), tl.float32)
    for k in range(begin, stop, BK):
        if EVEN:
            rows_in = row_there[:, None]
            columns_in = there[None, :]
        else:
            rows_in = row_there[:, None] & (inner < stop - k)[None, :]
            columns_in = there[None, :] & (inner < stop - k)[:, None]
        part = tl.load(x_at, mask=rows_in, other=0.0)
        if LISTED:
            neuron = tl.load(neuron_at + k, mask=inner < stop - k, other=0)
            w_part = tl.load(at + neuron.to(tl.int64)[:, None] * stride_inner, mask=columns_in, other=0.0)
        else:
            w_part = tl.load(at, mask=columns_in, other=0.0)
            at += BK * stride_inner
        total = tl.dot(part, w_part, total, input_precision=PRECISION)
        x_at += BK
    if BIASED:
        once = there & (split == 0)
        total += tl.load(bias + expert.to(tl.int64) * stride_bias + n, mask=once, other=0.0).to(tl.float32)[None, :]
    if SCALED:
        total *= tl.load(row_scale + row, mask=row_there, other=0.0)[:, None]
    y_at = y + split.to(tl.int64) * stride_split + row.to(tl.int64)[:, None] * stride_y + n[None, :]
    tl.store(y_at, total.to(y.dtype.element_ty), mask=row_there[:, None] & there[None, :])


def forward(
    x: Tensor,
    weight: Tensor,
    plan: RoutePlan,
    config: TileConfig,
    *,
    bias: Tensor | None = None,
    gather: bool = False,
    scale: Tensor | None = None,
    lists: NeuronLists | None = None,
) -> Tensor:
    """Return y [S, R at most, N] for x [R at most, K], or [T, K] with `gather`, and `weight` [E, N, K], any strides.

    `scale` float32 [R at most] multiplies rows, `bias` [E, N] is added before. y has x's dtype where S is 1, else
    float32. With `lists` K is their width and `weight` [1, N, F] the dense one.
    """
    if not runs_on(x.device):
        return reference(x, weight, plan, bias=bias, gather=gather, scale=scale, lists=lists)[None]
    columns_n = weight.shape[1]
    inner = weight.shape[2] if lists is None else lists.width
    split = config.split
    dtype = x.dtype if split == 1 else torch.float32
    rows = len(plan.row_token)
    y = torch.empty(split, rows, columns_n, dtype=dtype, device=x.device)
    columns = -(-columns_n // config.block_n)
    share = -(-inner // (split * config.block_k)) * config.block_k
    x = x if x.stride(1) == 1 else x.contiguous()
    some = plan.offsets  # for pointers that are not followed
    with torch.cuda.device_of(x):
        ragged_matmul[(plan.tiles * columns, split)](
            x,
            weight,
            some if bias is None else bias,
            y,
            plan.row_token,
            some if scale is None else scale,
            plan.offsets,
            plan.tile_expert,
            plan.tile_row,
            some if lists is None else lists.neurons,
            some if lists is None else lists.count,
            plan.tiles,
            columns,
            inner,
            columns_n,
            share,
            x.stride(0),
            *weight.stride(),
            0 if bias is None else bias.stride(0),
            y.stride(1),
            y.stride(0),
            **constants(
                inner, config, x.dtype, gather=gather, scaled=scale is not None, biased=bias is not None, lists=lists
            ),
            **config.constants(),
            **config.options(),
        )
    return y


def constants(
    inner: int,
    config: TileConfig,
    dtype: torch.dtype,
    *,
    gather: bool = False,
    scaled: bool = False,
    biased: bool = False,
    lists: NeuronLists | None = None,
) -> dict[str, object]:
    """Return what the kernel is compiled for beside the tile."""
    return {
        "GATHERED": gather,
        "SCALED": scaled,
        "BIASED": biased,
        "LISTED": lists is not None,
        "SPLIT": config.split,
        "EVEN": lists is None and inner % (config.block_k * config.split) == 0,
        "PRECISION": precision(dtype),
    }


def reference(
    x: Tensor,
    weight: Tensor,
    plan: RoutePlan,
    *,
    bias: Tensor | None = None,
    gather: bool = False,
    scale: Tensor | None = None,
    lists: NeuronLists | None = None,
) -> Tensor:
    """Return the sum over splits of what `forward` does, [R at most, N] in x's dtype; rows beyond R are zero."""
    y = x.new_zeros(len(plan.row_token), weight.shape[1])
    edges = plan.offsets.tolist()
    for expert, (start, stop) in enumerate(pairwise(edges)):
        if start == stop:
            continue
        rows = x[plan.row_token[start:stop].long()] if gather else x[start:stop]
        matrix = weight[expert if lists is None else 0]
        if lists is not None:
            own = lists.neurons[expert, : int(lists.count[expert])].long()
            rows, matrix = rows[:, : len(own)], matrix[:, own]
        found = functional.linear(rows, matrix, None if bias is None else bias[expert])
        y[start:stop] = found if scale is None else (found * scale[start:stop, None]).to(y.dtype)
    return y
