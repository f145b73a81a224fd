"""What GPUs can hold and do, as data sheets and programming guides state it; imports neither torch nor Triton.

Sources: NVIDIA CUDA programming guide, table of compute capabilities (registers, shared memory, warps, blocks a
multiprocessor); NVIDIA A100 and H100 SXM data sheets (dense bf16 FLOP/s, memory); AMD CDNA3 instruction set manual and
MI300X data sheet.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """One GPU. Sizes of memories in bytes, `bandwidth` in bytes a second, `flops` of bf16 tensor cores a second.

    A unit is a multiprocessor (NVIDIA) or compute unit (AMD), of which there are `units`; it holds `registers` of
    four bytes for its threads, `shared` bytes of which one block may have `shared_block`.
    """

    name: str
    backend: str  # Triton's: cuda or hip
    arch: int | str
    warp: int  # threads
    units: int
    registers: int
    register_step: int  # a warp's registers are a multiple of it, in all threads together
    registers_thread: int  # at most
    shared: int
    shared_block: int
    shared_reserved: int  # a block's, beside what it asks for
    warps: int  # at most, a unit
    blocks: int  # at most, a unit
    bandwidth: float
    flops: float
    latency: float  # seconds until a load from memory returns
    launch: float = 3e-6  # seconds that one launch in a graph costs

    def occupancy(self, registers: int, shared: int, warps: int) -> int:
        """Return how many blocks of `warps` warps, `registers` a thread and `shared` bytes a unit holds at once."""
        per_warp = -(-registers * self.warp // self.register_step) * self.register_step
        by_registers = self.registers // (per_warp * warps) if per_warp else self.blocks
        needed = shared + self.shared_reserved
        by_shared = self.shared // needed if needed else self.blocks
        return max(0, min(by_registers, by_shared, self.warps // warps, self.blocks))

    @property
    def in_flight(self) -> float:
        """Bytes that must be on their way in one unit to keep memory busy (Little's law)."""
        return self.bandwidth * self.latency / self.units


TARGETS = {
    target.name: target
    for target in (
        Target(
            "sm_80", "cuda", 80, 32, 108, 65536, 256, 255, 164 * 1024, 163 * 1024, 1024, 64, 32, 2.039e12, 312e12, 6e-7
        ),
        Target(
            "sm_90", "cuda", 90, 32, 132, 65536, 256, 255, 228 * 1024, 227 * 1024, 1024, 64, 32, 3.35e12, 989e12, 7e-7
        ),
        # Four SIMDs a compute unit, each with 512 registers for every one of 64 lanes.
        Target(
            "gfx942", "hip", "gfx942", 64, 304, 131072, 512, 512, 64 * 1024, 64 * 1024, 0, 32, 32, 5.3e12, 1307e12, 8e-7
        ),
    )
}
