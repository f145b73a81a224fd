"""What a MoE block's experts must at least compute and move, and how long that takes at best; imports no torch.

Useful FLOPs are those of rows, not of the padding of tiles: 2 (p D F + F D) a row, p = 2 with a gate. Bytes are the
weights of experts that have rows, once, and the tokens in and out; what a kernel keeps on the chip is not counted.
"""

from dataclasses import dataclass

from espalier.kernels.chooser import Work

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Floor:
    """The least that a block computes and moves."""

    flops: float
    bytes: float

    @classmethod
    def of(cls, work: Work, tokens: int, dtype: str) -> "Floor":
        """Return the floor of the rows of `work`, which come of `tokens` tokens."""
        matrices = (2 if work.gated else 1) + 1
        one = matrices * work.hidden * work.width
        used = sum(rows > 0 for rows in work.rows)
        size = BYTES[dtype]
        return cls(2.0 * one * sum(work.rows), float(size * (used * one + 2 * tokens * work.hidden)))

    def seconds(self, flops: float, bandwidth: float) -> float:
        """Return the seconds at best on a machine of `flops` and `bandwidth` bytes a second, if all overlaps."""
        return max(self.flops / flops, self.bytes / bandwidth)

    def bound(self, flops: float, bandwidth: float) -> str:
        """Return what it is bound by: `memory` or `compute`."""
        return "compute" if self.flops / flops > self.bytes / bandwidth else "memory"


def padded(work: Work, block_m: int) -> int:
    """Return the rows that tiles of `block_m` rows compute."""
    return sum(-(-rows // block_m) * block_m for rows in work.rows)
