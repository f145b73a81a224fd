"""Experts on a CPU that are too small to be called one by one: two grouped products over tokens sorted by expert.

They are the library's products (`torch.nn.functional.grouped_mm`), whose loop over experts is not Python's; picks of
"no expert" have no rows, and what lies between the products is a piece that stays in the cache.

Shapes: T tokens, K slots a token, R rows, E experts, D hidden, F expert width.
"""

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from espalier.kernels.expert_layout import ExpertLayout, inference_inner
from espalier.kernels.sorted_rows import bucket, pieces, sort_rows

TOGETHER = 512  # rows that are computed at once
FEW = 64  # picks: of up to so many, to find those of one expert takes longer than to compute them twice
ALIGNED = 16  # bytes: of the rows of what grouped_mm multiplies
DTYPES = (torch.float32, torch.bfloat16)
COMPILED = torch.bfloat16  # whose products are compiled for each number of rows


def unsupported(layout: ExpertLayout, dtype: torch.dtype) -> bool:
    """Whether `forward` cannot run experts of a layout and a dtype."""
    rows = (layout.hidden, layout.width, layout.width * (2 if layout.gated else 1))
    return dtype not in DTYPES or any(row * dtype.itemsize % ALIGNED for row in rows)


def forward(module: Any, layout: ExpertLayout, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Return the experts' weighted sum [T, D] for hidden [T, D], indices [T, K] and weights [T, K]; no gradients.

    An index >= E means "no expert". Sums are in float32.
    """
    first, second = layout.stacks
    dtype = module.down_proj.dtype
    counts, expert, token, weight = sort_rows(indices, weights, layout.experts, join=indices.numel() > FEW)
    share = weight.float()[:, None]
    x = hidden if hidden.dtype is dtype else hidden.to(dtype)  # autocast has other ideas of it
    output = torch.zeros(hidden.shape)
    parts = torch.empty(min(len(token), TOGETHER), hidden.shape[-1])  # one place for all: new memory costs page faults
    for begin, end, start, stop in pieces(counts, TOGETHER):
        here, place = token[start:stop], None
        if not len(here):
            continue
        lengths = counts[begin:end] if end > begin + 1 else [len(here)]
        if dtype is COMPILED:
            lengths, source, place = _padded(lengths, here, expert[start:stop] - begin)
        else:
            source = here
        rows = x.index_select(0, source)
        ends = torch.tensor(list(itertools.accumulate(lengths)), dtype=torch.int32)
        made = _product(module, first, layout, slice(begin, end), rows, ends)
        inner = inference_inner(module, layout, made)
        made = _product(module, second, layout, slice(begin, end), inner.contiguous(), ends)
        if layout.normed:
            made = module.post_expert_norm(made)
        made = made[: len(here)] if place is None else made.index_select(0, place)
        output.index_add_(0, here, torch.mul(made, share[start:stop], out=parts[: len(here)]))
    return output.to(hidden.dtype)


def _padded(lengths: list[int], tokens: Tensor, expert: Tensor) -> tuple[list[int], Tensor, Tensor | None]:
    """Return lengths for which products are compiled, and the token of each of their rows.

    Third is where among them the rows of `tokens`, of experts `expert` from 0, lie; None: first. Rows between have some
    token, and nobody reads what they give.
    """
    longer = [bucket(length) for length in lengths]
    if longer == lengths:
        return lengths, tokens, None
    if len(lengths) == 1:
        return longer, functional.pad(tokens, (0, longer[0] - lengths[0])), None
    more = (after - before for before, after in zip(lengths, longer, strict=True))
    gaps = torch.tensor([0, *itertools.accumulate(more)][:-1])  # by how many rows an expert's lie further on
    place = gaps.index_select(0, expert).add_(torch.arange(len(tokens)))
    return longer, tokens.new_zeros(sum(longer)).index_copy_(0, place, tokens), place


def _product(module: Any, name: str, layout: ExpertLayout, some: slice, rows: Tensor, ends: Tensor) -> Tensor:
    """Return the products of some experts' rows, which end at `ends` int32 [E], with the stack of a name."""
    stack = getattr(module, name)[some]
    made = functional.grouped_mm(rows, stack if layout.transposed else stack.mT, offs=ends)
    if layout.biased:
        bias = getattr(module, f"{name}_bias")[some]
        made += bias.repeat_interleave(ends.diff(prepend=ends.new_zeros(1)), dim=0)
    return made
