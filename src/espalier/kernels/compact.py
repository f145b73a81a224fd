"""Tokens that enter a layer (mixture of depths) are moved to the front, and what the layer gives them is added back.

`compact` finds them, `gather_rows` moves their rows, with the layer's RMSNorm if asked, and `scatter_add_rows` adds
g y to the tokens' rows. Nothing is read back by the host, grids follow from shapes, nothing is atomic, and every sum
has one order: a CUDA graph can hold all of it, and equal inputs give equal bits.

Programs of `compact` do not wait for each other: each counts the tokens before its own, then places its own. For
262,144 tokens the 64 programs read 42 MB between them, of 1.3 MB that the second-level cache holds (float32 scores, a
byte of mask); the last one counts in 32 rounds, reckoned at 20 microseconds, where moving the rows (4096 columns of
bf16, all kept) takes more than a thousand. So there is one level; the number of programs is bounded, so
that the cost is linear in the tokens.

Shapes: B sequences of L tokens, N = B L, D hidden.
"""

from __future__ import annotations  # unevaluated: where triton is not installed there is no tl.constexpr

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from espalier.errors import UserError
from espalier.kernels.jit import jit, power_of_2, runs_on, tl

PROGRAMS = 64  # at most, of `compact`
COUNTED, PLACED = 8192, 1024  # tokens at once
COLUMNS = 2048  # of a row, at once: in bf16 two loads of 16 bytes for every thread of four warps
WIDEST = 16384  # row that a norm holds in registers
MOST = 2**30  # tokens: places and the ends of blocks are 32 bits
SCORES = (torch.float32, torch.float16, torch.bfloat16, torch.bool)
FLOATS = SCORES[:3]
MOVED = (*FLOATS, torch.int32, torch.int64)


@dataclass(frozen=True)
class Compaction:
    """Which tokens enter; all int32, on the scores' device.

    `index` [N] is the token (its row among B L) of each place, ascending, then -1; `place` [N] the place of each token,
    -1 if it does not enter; `cu_seqlens` [B + 1] how many enter before each sequence, in the end how many enter at all.
    """

    index: Tensor
    cu_seqlens: Tensor
    place: Tensor


@jit
def compact_tokens(
    score, mask, index, cu_seqlens, place, tokens, length, own, threshold,
    MASKED: tl.constexpr, COUNTED: tl.constexpr, PLACED: tl.constexpr,
):  # fmt: skip
    """A program counts the tokens before its `own` ones, a multiple of PLACED, and places these."""
    begin = tl.program_id(0) * own
    counts = tl.zeros((COUNTED,), tl.int32)  # added up once, after the loop
    for start in range(0, begin, COUNTED):
        token = start + tl.arange(0, COUNTED)
        enters = tl.load(score + token, mask=token < begin, other=float("-inf")).to(tl.float32) > threshold
        if MASKED:
            enters = enters & (tl.load(mask + token, mask=token < begin, other=0) != 0)
        counts += (enters & (token < begin)).to(tl.int32)
    before = tl.sum(counts, axis=0)
    for start in range(begin, min(begin + own, tokens), PLACED):
        token = start + tl.arange(0, PLACED)
        inside = token < tokens
        enters = tl.load(score + token, mask=inside, other=float("-inf")).to(tl.float32) > threshold
        if MASKED:
            enters = enters & (tl.load(mask + token, mask=inside, other=0) != 0)
        enters = enters & inside
        ones = enters.to(tl.int32)
        upto = before + tl.cumsum(ones, axis=0)
        at = upto - ones
        tl.store(index + at, token, mask=enters)
        # As many tokens stay out as places are left over: the first one writes the last place, and so on.
        tl.store(index + (tokens - 1 - token + at), -1, mask=inside & (enters == 0))
        tl.store(place + token, tl.where(enters, at, -1), mask=inside)
        tl.store(cu_seqlens + token // length, at, mask=inside & (token % length == 0))
        tl.store(cu_seqlens + (token + 1) // length, upto, mask=token == tokens - 1)
        before += tl.sum(ones, axis=0)


@jit
def move_rows(x, source, out, D, stride_x, stride_out, FILLED: tl.constexpr, BD: tl.constexpr):
    """out[r] = x[source[r]] as it is; where the source is -1 zero if FILLED, else nothing is written."""
    r = tl.program_id(0)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    row = tl.load(source + r)
    moves = (d < D) & (row >= 0)
    values = tl.load(x + row.to(tl.int64) * stride_x + d, mask=moves, other=0)
    tl.store(out + r.to(tl.int64) * stride_out + d, values, mask=(d < D) if FILLED else moves)


@jit
def norm_rows(x, index, weight, out, D, stride_x, stride_out, eps, BD: tl.constexpr):
    """out[r] = RMSNorm(x[index[r]]), rounded where LlamaRMSNorm rounds."""
    r = tl.program_id(0)
    d = tl.arange(0, BD)
    token = tl.load(index + r)
    if token >= 0:
        values = tl.load(x + token.to(tl.int64) * stride_x + d, mask=d < D, other=0.0).to(tl.float32)
        normed = values * tl.rsqrt(tl.sum(values * values, axis=0) / D + eps)
        normed = normed.to(x.dtype.element_ty).to(tl.float32)
        normed *= tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
        tl.store(out + r.to(tl.int64) * stride_out + d, normed.to(out.dtype.element_ty), mask=d < D)


@jit
def scatter_add(
    x, y, gate, other, out, D, stride_x, stride_y, stride_out,
    GATED: tl.constexpr, IN_PLACE: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out[t] = x[t] + gate[t] y[place[t]]. A program has a token, or if IN_PLACE a place: `other` is place or index."""
    own = tl.program_id(0)
    found = tl.load(other + own)
    token, row = own, found
    if IN_PLACE:
        token, row = found, own
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    of, to = x + token.to(tl.int64) * stride_x + d, out + token.to(tl.int64) * stride_out + d
    if found >= 0:
        part = tl.load(y + row.to(tl.int64) * stride_y + d, mask=d < D, other=0.0).to(tl.float32)
        if GATED:
            part *= tl.load(gate + token).to(tl.float32)
        total = tl.load(of, mask=d < D, other=0.0).to(tl.float32) + part
        tl.store(to, total.to(out.dtype.element_ty), mask=d < D)
    elif not IN_PLACE:
        tl.store(to, tl.load(of, mask=d < D), mask=d < D)


@jit
def scatter_add_gradients(
    grad, y, gate, index, for_y, for_gate, D, stride_grad, stride_y, stride_for_y,
    GATED: tl.constexpr, WANTS_Y: tl.constexpr, WANTS_GATE: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """for_y[r] = gate[t] grad[t], for_gate[t] = grad[t] . y[r] with t = index[r]; beyond the last place for_y is 0."""
    r = tl.program_id(0)
    token = tl.load(index + r)
    factor = 1.0
    if GATED:
        factor = tl.load(gate + token, mask=token >= 0, other=0.0).to(tl.float32)
    product = tl.zeros((BD,), tl.float32)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        there = (d < D) & (token >= 0)
        g = tl.load(grad + token.to(tl.int64) * stride_grad + d, mask=there, other=0.0).to(tl.float32)
        if WANTS_Y:
            to = for_y + r.to(tl.int64) * stride_for_y + d
            tl.store(to, (g * factor).to(for_y.dtype.element_ty), mask=d < D)
        if WANTS_GATE:
            product += g * tl.load(y + r.to(tl.int64) * stride_y + d, mask=there, other=0.0).to(tl.float32)
    if WANTS_GATE:
        tl.store(for_gate + token, tl.sum(product, axis=0).to(for_gate.dtype.element_ty), mask=token >= 0)


def compact(score: Tensor, threshold: float, mask: Tensor | None = None) -> Compaction:
    """Return the tokens that enter: score > threshold, and mask != 0 where there is a mask. One launch.

    `score` [B, L] is float32, float16 or bfloat16 and compared in float32 (NaN does not enter), or bool of tokens that
    are chosen already, with threshold 0; `mask` [B, L] is bool or of integers. UserError for other shapes or dtypes.
    """
    _check_scores(score, threshold, mask)
    (batch, length), tokens = score.shape, score.numel()
    if not (runs_on(score.device) and tokens):
        return reference_compact(score, threshold, mask)
    sizes, own = (tokens, batch + 1, tokens), -(-tokens // (PROGRAMS * PLACED)) * PLACED
    index, cu_seqlens, place = (torch.empty(size, dtype=torch.int32, device=score.device) for size in sizes)
    with torch.cuda.device_of(score):
        compact_tokens[(-(-tokens // own),)](
            _bytes(score), _bytes(score if mask is None else mask), index, cu_seqlens, place, tokens, length, own,
            float(threshold), MASKED=mask is not None, COUNTED=COUNTED, PLACED=PLACED, num_warps=8, num_stages=1,
        )  # fmt: skip
    return Compaction(index, cu_seqlens, place)


def reference_compact(score: Tensor, threshold: float, mask: Tensor | None = None) -> Compaction:
    """Return what `compact` does, in plain torch."""
    enters = score.float() > threshold
    if mask is not None:
        enters = enters & (mask != 0)
    flat = enters.flatten()
    place = (flat.cumsum(0) - 1).masked_fill(~flat, -1)
    order = (~flat).to(torch.uint8).argsort(stable=True)
    index = order.masked_fill(torch.arange(len(flat), device=flat.device) >= flat.sum(), -1)
    each = enters.sum(1).cumsum(0)
    return Compaction(index.int(), torch.cat([each.new_zeros(1), each]).int(), place.int())


def gather_rows(x: Tensor, compaction: Compaction, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Return the rows of `x` [N, D] of the tokens that enter, moved to the front: [N, D]; no other row is read.

    With a norm's `weight` [D] they are RMSNorm(x), summed in float32 and rounded as LlamaRMSNorm does; the dtype is
    then that of weight * x, else that of x (float32, float16, bfloat16, and without a norm int32, int64).

    Rows beyond the last place are unset, or zero in grad mode, lest NaN there spoils gradients of weights (0 * NaN);
    their own gradients are not read. In grad mode the norm is torch's, after the kernel. UserError for other shapes.
    """
    _check_rows("gather_rows: x", x, compaction, FLOATS if weight is not None else MOVED)
    if weight is not None:
        _check_vector("gather_rows: the norm's weight", weight, x.shape[1], x)
    if not (runs_on(x.device) and x.numel()):
        return reference_gather_rows(x, compaction, weight, eps)
    graded = torch.is_grad_enabled()
    if weight is None or graded or x.shape[1] > WIDEST:
        moved: Tensor = _Gather.apply(x, compaction.index, compaction.place, graded)
        if weight is None:
            return moved
        return _rms_norm(moved, weight, eps).masked_fill((compaction.index < 0)[:, None], 0.0)
    out = x.new_empty(x.shape, dtype=torch.promote_types(weight.dtype, x.dtype))
    block, x = power_of_2(x.shape[1]), _columns_together(x)
    with torch.cuda.device_of(x):
        norm_rows[(len(x),)](
            x, compaction.index, weight.contiguous(), out, x.shape[1], x.stride(0), out.stride(0), float(eps),
            BD=block, num_warps=_warps(block),
        )  # fmt: skip
    return out


def reference_gather_rows(x: Tensor, compaction: Compaction, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Return what `gather_rows` does, in plain torch; rows beyond the last place are zero."""
    beyond = (compaction.index < 0)[:, None]
    rows = x.index_select(0, compaction.index.clamp(min=0)).masked_fill(beyond, 0)
    return rows if weight is None else _rms_norm(rows, weight, eps).masked_fill(beyond, 0)


def scatter_add_rows(
    x: Tensor, y: Tensor, compaction: Compaction, gate: Tensor | None = None, *, in_place: bool = False
) -> Tensor:
    """Return x + gate * y for the tokens that enter and x for the others: [N, D], of x's dtype, computed in float32.

    `x` [N, D] has a row a token, `y` [N, D] one a place (those beyond the last are not read, nor is their gradient
    other than 0), `gate` [N] a factor a token (1 where it is None; of tokens that do not enter it is not read). All are
    float32, float16 or bfloat16. With `in_place` x is overwritten and returned, of which only the entering rows are
    touched; y must lie elsewhere. UserError for other shapes or dtypes, and if an x to overwrite has rows that overlap.
    """
    _check_rows("scatter_add_rows: x", x, compaction, FLOATS)
    _check_rows("scatter_add_rows: y", y, compaction, FLOATS)
    if x.shape != y.shape:
        raise UserError(f"scatter_add_rows: x has {x.shape[1]} columns and y {y.shape[1]}. Give both the same.")
    if gate is not None:
        _check_vector("scatter_add_rows: gate, a number a token,", gate, len(x), x)
    if in_place and not (x.is_contiguous() or (x.stride(1) == 1 and x.stride(0) >= x.shape[1])):
        raise UserError(
            f"scatter_add_rows: x has strides {x.stride()} for {x.shape[1]} columns. Give x.contiguous() to overwrite."
        )
    if not (runs_on(x.device) and x.numel()):
        found = reference_scatter_add_rows(x, y, compaction, gate)
        return x.copy_(found) if in_place else found
    added: Tensor = _ScatterAdd.apply(x, y, gate, compaction.index, compaction.place, in_place)
    return added


def reference_scatter_add_rows(x: Tensor, y: Tensor, compaction: Compaction, gate: Tensor | None = None) -> Tensor:
    """Return what `scatter_add_rows` does, in plain torch, out of place."""
    stays = compaction.place < 0
    part = y.index_select(0, compaction.place.clamp(min=0)).masked_fill(stays[:, None], 0.0).float()
    if gate is not None:
        part = part * gate.masked_fill(stays, 0.0).float()[:, None]
    return torch.where(stays[:, None], x, (x.float() + part).to(x.dtype))


def aot_cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """Return name, kernel, signature, constants and compiler's options of what is to compile for GPUs elsewhere."""
    types = dict.fromkeys(("index", "cu_seqlens", "place", "source", "other"), "*i32")
    types |= {"score": "*fp32", "mask": "*u8", "gate": "*fp32", "for_gate": "*fp32", "threshold": "fp32", "eps": "fp32"}
    integers = ("tokens", "length", "own", "D", "stride_x", "stride_y", "stride_out", "stride_grad", "stride_for_y")
    types |= dict.fromkeys(integers, "i32")

    def case(name: str, kernel: Any, warps: int, **constants: Any) -> Any:
        signature = {arg: "constexpr" if arg in constants else types.get(arg, "*bf16") for arg in kernel.arg_names}
        return name, kernel, signature, constants, {"num_warps": warps, "num_stages": 1}

    sizes, gated, both = {"COUNTED": COUNTED, "PLACED": PLACED}, {"GATED": True, "BD": COLUMNS}, (False, True)
    return [
        *(case(f"compact{', masked' * masked}", compact_tokens, 8, MASKED=masked, **sizes) for masked in both),
        *(case(f"gather{', filled' * filled}", move_rows, 4, FILLED=filled, BD=COLUMNS) for filled in both),
        *(case(f"norm of {width}", norm_rows, _warps(width), BD=width) for width in (1024, 4096, WIDEST)),
        *(case(f"scatter-add{', in place' * there}", scatter_add, 4, IN_PLACE=there, **gated) for there in both),
        case("gradients", scatter_add_gradients, 4, WANTS_Y=True, WANTS_GATE=True, **gated),
    ]


class _Gather(torch.autograd.Function):
    """Rows moved to the front; backwards they move back, and tokens that do not enter have a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, place: Tensor, filled: bool) -> Tensor:
        ctx.save_for_backward(place)
        return _moved(x, index, filled)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (place,) = ctx.saved_tensors
        return _moved(grad, place, True), None, None, None


class _ScatterAdd(torch.autograd.Function):
    """x + gate * y; backwards the identity for x, a gather for y and a dot product a row for the gate."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, gate: Any, index: Tensor, place: Tensor, in_place: bool) -> Tensor:
        ctx.save_for_backward(y if ctx.needs_input_grad[2] else None, gate, index)
        ctx.y_dtype = y.dtype
        if in_place:
            ctx.mark_dirty(x)
        out = x if in_place else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        x = x if in_place else _columns_together(x)
        y, width = _columns_together(y), x.shape[1]
        block = min(COLUMNS, power_of_2(width))
        with torch.cuda.device_of(x):
            scatter_add[(len(x), -(-width // block))](
                x, y, x if gate is None else gate.contiguous(), index if in_place else place, out,
                width, x.stride(0), y.stride(0), out.stride(0),
                GATED=gate is not None, IN_PLACE=in_place, BD=block, num_warps=4,
            )  # fmt: skip
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        y, gate, index = ctx.saved_tensors
        _, wants_y, wants_gate, *_ = ctx.needs_input_grad
        for_y = torch.empty(grad.shape, dtype=ctx.y_dtype, device=grad.device) if wants_y else None
        for_gate = torch.zeros_like(gate, memory_format=torch.contiguous_format) if wants_gate else None
        if wants_y or wants_gate:
            rows, width = _columns_together(grad), grad.shape[1]
            factors = rows if y is None else _columns_together(y)
            with torch.cuda.device_of(rows):
                scatter_add_gradients[(len(rows),)](
                    rows, factors, rows if gate is None else gate.contiguous(), index, rows if for_y is None else for_y,
                    rows if for_gate is None else for_gate, width, rows.stride(0), factors.stride(0), width,
                    GATED=gate is not None, WANTS_Y=wants_y, WANTS_GATE=wants_gate,
                    BD=min(COLUMNS, power_of_2(width)), num_warps=4,
                )  # fmt: skip
        return grad, for_y, for_gate, None, None, None


def _moved(x: Tensor, source: Tensor, filled: bool) -> Tensor:
    """Return x[source] [N, D]; where the source is -1, zero if `filled`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x, block = _columns_together(x), min(COLUMNS, power_of_2(x.shape[1]))
    with torch.cuda.device_of(x):
        move_rows[(len(x), -(-x.shape[1] // block))](
            x, source, out, x.shape[1], x.stride(0), out.stride(0), FILLED=filled, BD=block, num_warps=4
        )
    return out


def _warps(width: int) -> int:
    """Return how many warps hold a row in registers."""
    return min(16, max(1, width // 512))


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    values = x.float()
    return weight * (values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def _columns_together(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _bytes(x: Tensor) -> Tensor:
    """Return a tensor whose elements lie in order; bools are bytes to kernels."""
    return (x.view(torch.uint8) if x.dtype == torch.bool else x).contiguous()


def _check_scores(score: Tensor, threshold: float, mask: Tensor | None) -> None:
    if score.dim() != 2 or score.dtype not in SCORES or score.numel() > MOST:
        raise UserError(
            f"compact: score is {list(score.shape)} of {score.dtype}. Give one number a token, [B, L] of float32, "
            f"float16, bfloat16 or bool, at most {MOST:,}."
        )
    if isinstance(threshold, Tensor):
        raise UserError("compact: threshold is a tensor, which the host would have to read. Give score - threshold, 0.")
    if mask is not None and (mask.shape != score.shape or mask.is_floating_point() or mask.device != score.device):
        raise UserError(
            f"compact: mask is {list(mask.shape)} of {mask.dtype} on {mask.device}, score {list(score.shape)} on "
            f"{score.device}. Give a mask of bool or integers like score."
        )


def _check_rows(name: str, x: Tensor, compaction: Compaction, dtypes: tuple[torch.dtype, ...]) -> None:
    tokens, device = len(compaction.index), compaction.index.device
    if x.dim() != 2 or len(x) != tokens or x.dtype not in dtypes or x.device != device:
        raise UserError(
            f"{name} is {list(x.shape)} of {x.dtype} on {x.device}, the compaction has {tokens} tokens on {device}. "
            f"Give [{tokens}, D] of {', '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)} there."
        )


def _check_vector(name: str, given: Tensor, size: int, x: Tensor) -> None:
    if tuple(given.shape) != (size,) or given.dtype not in FLOATS or given.device != x.device:
        raise UserError(
            f"{name} is {list(given.shape)} of {given.dtype} on {given.device}. Give [{size}] of float32, float16 or "
            f"bfloat16 on {x.device}."
        )
