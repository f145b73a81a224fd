"""Reduce: join the statistics that several jobs collected on consecutive shards of one calibration."""

from collections.abc import Sequence

from espalier.collecting.stats import Stats
from espalier.errors import UserError
from espalier.probes import DENSE_PROBES, LAYER_PROBES, PROBES


def reduce(parts: Sequence[Stats]) -> Stats:
    """Return the statistics over all tokens; equal to those of one job but for the rounding of sums.

    `parts` in the order of the calibration's sequences. UserError when they are of different models or probes.
    """
    first = parts[0]
    for part in parts[1:]:
        if part.shape != first.shape or set(part.arrays) != set(first.arrays):
            raise UserError("statistics: the shards are of different models or probes. Collect them again.")
    tokens = [part.tokens for part in parts]
    arrays = {
        (probe, layer): (PROBES | DENSE_PROBES | LAYER_PROBES)[probe].merge(
            [part.arrays[probe, layer] for part in parts], tokens
        )
        for probe, layer in first.arrays
    }
    sequence_tokens = tuple(number for part in parts for number in part.sequence_tokens)
    return Stats(first.shape, sequence_tokens, arrays)
