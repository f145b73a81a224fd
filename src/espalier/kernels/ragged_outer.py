"""Ragged outer product: the gradient of each expert's matrix from its rows, in one launch.

g[e] = sum over the rows r of expert e of a[r]^T b[r], in fp32 and in the order of rows; an expert without rows gets
zeros. The rows of b are those of the plan, or tokens that are gathered.

Shapes: T tokens, R rows, E experts, M columns of a, N columns of b.
"""

from itertools import pairwise

import torch
from torch import Tensor

from espalier.kernels.jit import jit, runs_on, tl
from espalier.kernels.ragged_gate_up import precision
from espalier.kernels.route_plan import RoutePlan

ROWS, COLUMNS = 32, 64


@jit
def ragged_outer(
    a,
    b,
    g,
    row_token,
    offsets,
    M,
    N,
    stride_a,
    stride_b,
    stride_expert,
    stride_m,
    stride_n,
    GATHERED: tl.constexpr,
    PRECISION: tl.constexpr,
    BR: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """One expert times one block of its matrix."""
    expert = tl.program_id(0)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(2) * BN + tl.arange(0, BN)
    start = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)
    total = tl.zeros((BM, BN), tl.float32)
    for first in range(start, end, BR):
        row = first + tl.arange(0, BR)
        there = row < end
        source = row
        if GATHERED:
            source = tl.load(row_token + row, mask=there, other=0)
        a_at = a + row.to(tl.int64)[None, :] * stride_a + m[:, None]
        b_at = b + source.to(tl.int64)[:, None] * stride_b + n[None, :]
        left = tl.load(a_at, mask=there[None, :] & (m < M)[:, None], other=0.0)
        right = tl.load(b_at, mask=there[:, None] & (n < N)[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    g_at = g + expert.to(tl.int64) * stride_expert + m.to(tl.int64)[:, None] * stride_m + n[None, :] * stride_n
    tl.store(g_at, total.to(g.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def forward(a: Tensor, b: Tensor, plan: RoutePlan, out: Tensor, *, gather: bool = False) -> Tensor:
    """Write g into `out` [E, M, N], any strides, for a [R at most, M] and b [R at most, N], or [T, N] with `gather`."""
    if not runs_on(a.device):
        return out.copy_(reference(a, b, plan, gather=gather))
    a, b = (x if x.stride(1) == 1 else x.contiguous() for x in (a, b))
    experts, m, n = out.shape
    with torch.cuda.device_of(a):
        ragged_outer[(experts, -(-m // COLUMNS), -(-n // COLUMNS))](
            a,
            b,
            out,
            plan.row_token,
            plan.offsets,
            m,
            n,
            a.stride(0),
            b.stride(0),
            *out.stride(),
            GATHERED=gather,
            PRECISION=precision(a.dtype),
            BR=ROWS,
            BM=COLUMNS,
            BN=COLUMNS,
            num_warps=4,
            num_stages=3,
        )
    return out


def reference(a: Tensor, b: Tensor, plan: RoutePlan, *, gather: bool = False) -> Tensor:
    """Return what `forward` writes, one expert after another, in plain torch."""
    edges = plan.offsets.tolist()
    g = a.new_zeros(plan.experts, a.shape[1], b.shape[1])
    for expert, (start, stop) in enumerate(pairwise(edges)):
        rows = b[plan.row_token[start:stop].long()] if gather else b[start:stop]
        g[expert] = (a[start:stop].float().T @ rows.float()).to(g.dtype)
    return g
