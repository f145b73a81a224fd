"""What this machine's processor can do, by the flags that the system lists; imports no torch."""

import contextlib
import functools
import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
BFLOAT16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})  # products of bfloat16 numbers
# From these on torch (oneDNN) has bfloat16 products that take no longer than float32's. Without them stand-ins run, for
# six to nine times as long (Zen 3, 256 to 4,096 tokens of benchmarks/experts_cpu.py).
VECTORS = BFLOAT16 | {"avx512bw", "avx_ne_convert"}


def flags(cpuinfo: Path = CPUINFO) -> frozenset[str]:
    """Return the flags of the first processor; none where the system lists none."""
    with contextlib.suppress(OSError):
        for line in cpuinfo.read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return frozenset(line.split(":", 1)[1].split())
    return frozenset()


def lacks_bfloat16(cpuinfo: Path = CPUINFO) -> bool:
    """Whether products in bfloat16 take several times as long as in float32; False where nothing is known."""
    found = flags(cpuinfo)
    return bool(found) and not found & VECTORS


@functools.cache
def is_intel() -> bool:
    """Whether the processor is one of Intel's, as far as the system says."""
    with contextlib.suppress(OSError):
        return "GenuineIntel" in CPUINFO.read_text()
    return "Intel" in platform.processor()
