"""Ragged product: each row times the matrix of its expert, in one launch; the down projection, and what training needs.

y[r] = s(r) (x[r] W[e(r)]^T + b[e(r)]). The rows of x are those of the plan, or tokens that are gathered. At few tokens
several programs share the inner dimension (`split`), so that all of a GPU's memory pipes read weights: a token of
Mixtral has 64 tiles of 128 columns for 108 to 132 multiprocessors. Their parts lie in fp32 one after another and are
added, in order, where a token's rows are (`segment_combine`), so that the result does not depend on timing.

Shapes: T tokens, R rows, E experts, K inner dimension, N columns, S splits.
"""

import torch
from torch import Tensor
from torch.nn import functional

from espalier.kernels.jit import jit, runs_on, tl
from espalier.kernels.ragged_gate_up import NeuronBlocks, precision
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
    block_start,
    block_stop,
    block_count,
    tiles,
    columns,  # blocks of columns
    K,
    N,
    share,  # of the inner dimension, that one split sums, a multiple of BK
    blocks_at_most,
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
    BLOCKS: tl.constexpr,
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
    at = n.to(tl.int64)[None, :] * stride_column + inner.to(tl.int64)[:, None] * stride_inner
    total = tl.zeros((BM, BN), tl.float32)
    if BLOCKS:
        for block in range(split, tl.load(block_count + expert), SPLIT):
            start = tl.load(block_start + expert * blocks_at_most + block)
            stop = tl.load(block_stop + expert * blocks_at_most + block)
            for k in range(0, stop - start, BK):
                k_there = inner < stop - start - k
                part = tl.load(x_at + (block * BLOCKS + k), mask=row_there[:, None] & k_there[None, :], other=0.0)
                w_at = weight + at + (start + k).to(tl.int64) * stride_inner
                total = tl.dot(
                    part,
                    tl.load(w_at, mask=there[None, :] & k_there[:, None], other=0.0),
                    total,
                    input_precision=PRECISION,
                )
    else:
        begin = split * share
        x_at += begin
        w_at = weight + expert.to(tl.int64) * stride_expert + at + begin.to(tl.int64) * stride_inner
        for k in range(begin, min(begin + share, K), BK):
            if EVEN:
                rows_in = row_there[:, None]
                columns_in = there[None, :]
            else:
                rows_in = row_there[:, None] & (inner < K - k)[None, :]
                columns_in = there[None, :] & (inner < K - k)[:, None]
            part = tl.load(x_at, mask=rows_in, other=0.0)
            total = tl.dot(part, tl.load(w_at, mask=columns_in, other=0.0), total, input_precision=PRECISION)
            x_at += BK
            w_at += BK * stride_inner
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
    blocks: NeuronBlocks | None = None,
) -> Tensor:
    """Return y [S, R at most, N] for x [R at most, K], or [T, K] with `gather`, and `weight` [E, N, K], any strides.

    `scale` float32 [R at most] multiplies rows, `bias` [E, N] is added before. y has x's dtype where S is 1, else
    float32. With `blocks` the inner dimension is the blocks' columns of h and `weight` [1, N, F] is the dense one.
    """
    if not runs_on(x.device):
        return reference(x, weight, plan, bias=bias, gather=gather, scale=scale, blocks=blocks)[None]
    _, columns_n, inner = weight.shape
    split = config.split
    dtype = x.dtype if split == 1 else torch.float32
    rows = len(plan.row_token)
    y = torch.empty(split, rows, columns_n, dtype=dtype, device=x.device)
    columns = -(-columns_n // config.block_n)
    share = -(-inner // (split * config.block_k)) * config.block_k
    x = x if x.stride(1) == 1 else x.contiguous()
    some = plan.offsets  # for pointers that are not followed
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
        some if blocks is None else blocks.start,
        some if blocks is None else blocks.stop,
        some if blocks is None else blocks.count,
        plan.tiles,
        columns,
        inner,
        columns_n,
        share,
        0 if blocks is None else blocks.start.shape[1],
        x.stride(0),
        *weight.stride(),
        0 if bias is None else bias.stride(0),
        y.stride(1),
        y.stride(0),
        **constants(
            inner, config, x.dtype, gather=gather, scaled=scale is not None, biased=bias is not None, blocks=blocks
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
    blocks: NeuronBlocks | None = None,
) -> dict[str, object]:
    """Return what the kernel is compiled for beside the tile."""
    return {
        "GATHERED": gather,
        "SCALED": scaled,
        "BIASED": biased,
        "BLOCKS": 0 if blocks is None else blocks.size,
        "SPLIT": config.split,
        "EVEN": inner % (config.block_k * config.split) == 0,
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
    blocks: NeuronBlocks | None = None,
) -> Tensor:
    """Return the sum over splits of what `forward` does, [R at most, N] in x's dtype; rows beyond R are zero."""
    y = x.new_zeros(len(plan.row_token), weight.shape[1])
    edges = plan.offsets.tolist()
    for expert, (start, stop) in enumerate(zip(edges, edges[1:], strict=False)):
        if start == stop:
            continue
        rows = x[plan.row_token[start:stop].long()] if gather else x[start:stop]
        matrix = weight[expert if blocks is None else 0]
        if blocks is not None:
            pieces = list(zip(blocks.start[expert].tolist(), blocks.stop[expert].tolist(), strict=True))
            matrix = torch.cat([matrix[:, first:last] for first, last in pieces], dim=1)
            columns = [torch.arange(last - first) + n * blocks.size for n, (first, last) in enumerate(pieces)]
            rows = rows[:, torch.cat(columns).to(rows.device)]
        found = functional.linear(rows, matrix, None if bias is None else bias[expert])
        y[start:stop] = found if scale is None else (found * scale[start:stop, None]).to(y.dtype)
    return y
