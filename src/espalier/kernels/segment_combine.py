"""Segment combine: the weighted sum of each token's rows, in one launch and in a fixed order.

out[t] = sum over slots j, then over splits s, of w[r] y[s, r], r = slot_row[t, j]; a slot without a row adds and reads
nothing, and a token without rows gets zeros. Sums are fp32.

Shapes: T tokens, K slots a token, R rows, D hidden, S splits.
"""

import torch
from torch import Tensor

from espalier.kernels.jit import jit, power_of_2, runs_on, tl
from espalier.kernels.route_plan import RoutePlan

COLUMNS = 1024  # at once


@jit
def segment_combine(
    y,
    row_weight,
    slot_row,
    base,
    out,
    D,
    slots,
    stride_split,
    stride_y,
    stride_base,
    stride_out,
    SPLIT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BASED: tl.constexpr,
    BD: tl.constexpr,
):
    """One token times one block of columns."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    there = d < D
    total = tl.zeros((BD,), tl.float32)
    if BASED:
        total += tl.load(base + token * stride_base + d, mask=there, other=0.0).to(tl.float32)
    for slot in range(slots):
        row = tl.load(slot_row + token * slots + slot).to(tl.int64)
        if row >= 0:
            part = tl.zeros((BD,), tl.float32)
            for split in tl.static_range(SPLIT):
                part += tl.load(y + split * stride_split + row * stride_y + d, mask=there, other=0.0).to(tl.float32)
            if WEIGHTED:
                part *= tl.load(row_weight + row)
            total += part
    tl.store(out + token * stride_out + d, total.to(out.dtype.element_ty), mask=there)


def forward(
    y: Tensor, plan: RoutePlan, dtype: torch.dtype, *, weighted: bool = True, base: Tensor | None = None
) -> Tensor:
    """Return out [T, D] in `dtype` for y [S, R at most, D]; unless `weighted` all weights are 1.

    `base` [T, D], or [1, D] for all tokens, is added.
    """
    if not runs_on(y.device):
        return reference(y, plan, dtype, weighted=weighted, base=base)
    tokens, slots = plan.slot_row.shape
    split, _, width = y.shape
    out = torch.empty(tokens, width, dtype=dtype, device=y.device)
    if not tokens:
        return out
    block = min(COLUMNS, power_of_2(width))
    with torch.cuda.device_of(y):
        segment_combine[(tokens, -(-width // block))](
            y,
            plan.row_weight,
            plan.slot_row,
            y if base is None else base,
            out,
            width,
            slots,
            y.stride(0),
            y.stride(1),
            0 if base is None or len(base) == 1 else base.stride(0),
            out.stride(0),
            SPLIT=split,
            WEIGHTED=weighted,
            BASED=base is not None,
            BD=block,
            num_warps=4,
        )
    return out


def reference(
    y: Tensor, plan: RoutePlan, dtype: torch.dtype, *, weighted: bool = True, base: Tensor | None = None
) -> Tensor:
    """Return what `forward` does, in plain torch."""
    row = plan.slot_row.long()  # [T, K]
    parts = y.float().sum(0)[row.clamp(min=0)]  # [T, K, D]
    if weighted:
        parts = parts * plan.row_weight[row.clamp(min=0)].unsqueeze(-1)
    out = parts.masked_fill((row < 0).unsqueeze(-1), 0.0).sum(1)
    return (out if base is None else out + base.float()).to(dtype)
