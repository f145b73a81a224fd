"""How a ragged product is cut into tiles: the settings that a kernel is compiled for."""

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
