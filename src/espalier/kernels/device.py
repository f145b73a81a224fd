"""The GPU that tensors are on, as the chooser knows it."""

from dataclasses import replace
from functools import cache

import torch

from espalier.kernels.chooser import Choice, Work, rank
from espalier.kernels.expert_layout import ExpertLayout
from espalier.kernels.targets import TARGETS, Target

INTERPRETER = "sm_80"  # whose tiles run where there is no GPU


@cache
def target_of(device: torch.device) -> Target:
    """Return the nearest known GPU that is not newer, with this one's number of units and its shared memory."""
    if device.type != "cuda":
        return TARGETS[INTERPRETER]
    found = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        known = TARGETS["gfx942"]
    else:
        known = TARGETS["sm_90" if (found.major, found.minor) == (9, 0) else "sm_80"]
    shared = int(getattr(found, "shared_memory_per_block_optin", known.shared_block))
    return replace(known, units=int(found.multi_processor_count), shared_block=min(shared, known.shared_block))


def choose(layout: ExpertLayout, tokens: int, k: int, device: torch.device) -> Choice:
    """Return the chooser's tiles for `tokens` tokens of `k` experts each, spread evenly.

    The number of tokens is rounded up to a power of 2, so that few choices are made and kernels compiled.
    """
    rounded = 1 << max(0, tokens - 1).bit_length()
    return _choose(
        layout.hidden, layout.width, rounded, layout.experts, min(k, layout.experts), layout.gated, target_of(device)
    )


@cache
def _choose(hidden: int, width: int, tokens: int, experts: int, k: int, gated: bool, target: Target) -> Choice:
    return rank(Work.expected(hidden, width, tokens, experts, k, gated), target, 1)[0]
