"""How a ragged product is cut into tiles, and the tiles that ship for each target; imports neither torch nor Triton."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class TileConfig:
    """A program computes `block_m` rows times `block_n` columns and reads `block_k` of the inner dimension at a time.

    `group`: tiles of rows whose programs follow each other for the same columns, so that these are read once.
    `split`: programs that share the inner dimension; their sums are added by the kernel that combines rows.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int = 4
    stages: int = 3
    group: int = 8
    split: int = 1

    def constants(self) -> dict[str, int]:
        """Return the compile-time constants."""
        return {"BM": self.block_m, "BN": self.block_n, "BK": self.block_k, "GROUP": self.group}

    def options(self) -> dict[str, int]:
        """Return the compiler's options."""
        return {"num_warps": self.warps, "num_stages": self.stages}

    def document(self) -> dict[str, int]:
        """Return the settings as JSON has them."""
        return asdict(self)


# Of the first product. It has two sums: block_n is that of gate and of up, each.
GATE_UP = {
    "sm_80": (
        TileConfig(16, 32, 128, warps=4, stages=4),
        TileConfig(16, 64, 128, warps=4, stages=3),
        TileConfig(32, 64, 64, warps=4, stages=4),
        TileConfig(64, 64, 64, warps=4, stages=3),
        TileConfig(128, 64, 32, warps=8, stages=3),
        TileConfig(128, 64, 64, warps=8, stages=3),
    ),
    "sm_90": (
        TileConfig(16, 32, 128, warps=4, stages=4),
        TileConfig(16, 64, 128, warps=4, stages=3),
        TileConfig(32, 64, 64, warps=4, stages=4),
        TileConfig(64, 64, 64, warps=4, stages=4),
        TileConfig(64, 128, 64, warps=8, stages=3),
        TileConfig(128, 64, 64, warps=8, stages=3),
        TileConfig(128, 128, 64, warps=8, stages=3),
    ),
    "gfx942": (
        TileConfig(16, 32, 128, warps=4, stages=2),
        TileConfig(16, 64, 64, warps=4, stages=2),
        TileConfig(32, 64, 64, warps=4, stages=2),
        TileConfig(64, 64, 64, warps=4, stages=2),
        TileConfig(64, 128, 32, warps=8, stages=2),
        TileConfig(128, 64, 64, warps=8, stages=2),
    ),
}
# Of the second product, and of all others that are ragged.
MATMUL = {
    "sm_80": (
        TileConfig(16, 64, 128, warps=4, stages=4, split=4),
        TileConfig(16, 64, 128, warps=4, stages=4),
        TileConfig(16, 128, 64, warps=4, stages=4),
        TileConfig(32, 128, 64, warps=4, stages=3),
        TileConfig(64, 128, 64, warps=4, stages=3),
        TileConfig(128, 128, 32, warps=8, stages=3),
        TileConfig(128, 128, 64, warps=8, stages=3),
    ),
    "sm_90": (
        TileConfig(16, 64, 128, warps=4, stages=4, split=4),
        TileConfig(16, 64, 128, warps=4, stages=4),
        TileConfig(16, 128, 64, warps=4, stages=4),
        TileConfig(32, 128, 64, warps=4, stages=4),
        TileConfig(64, 128, 64, warps=4, stages=4),
        TileConfig(128, 128, 64, warps=8, stages=3),
        TileConfig(128, 256, 64, warps=8, stages=3),
    ),
    "gfx942": (
        TileConfig(16, 64, 128, warps=4, stages=2, split=4),
        TileConfig(16, 64, 128, warps=4, stages=2),
        TileConfig(16, 128, 64, warps=4, stages=2),
        TileConfig(32, 128, 64, warps=4, stages=2),
        TileConfig(64, 128, 64, warps=4, stages=2),
        TileConfig(128, 128, 64, warps=8, stages=2),
    ),
}
