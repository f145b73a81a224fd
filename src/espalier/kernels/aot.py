"""Compile kernels for GPUs that are not there, and read what they take: registers, spills, shared memory, tensor cores.

`python -m espalier.kernels.aot` compiles every shipped configuration for every target and prints the facts; `--write`
keeps them in facts.json, which the chooser reads. Needs Triton, which brings its own assemblers; must not run under
Triton's interpreter.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from espalier.kernels.targets import TARGETS, Target

FORMAT = "espalier.kernel_facts/1"
FACTS = Path(__file__).parent / "facts.json"
ALIGNED = ("tt.divisibility", 16)


@dataclass(frozen=True)
class Case:
    """One kernel with everything that it is compiled for; `aligned` names arguments that are multiples of 16."""

    kernel: str
    variant: str
    function: Any = field(repr=False)
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]
    aligned: tuple[str, ...] = ()


@dataclass(frozen=True)
class Facts:
    """What a compiled kernel takes on a target: registers a thread, bytes spilled and shared, blocks a unit holds."""

    kernel: str
    variant: str
    target: str
    constants: dict[str, Any]
    options: dict[str, int]
    registers: int
    spilled: int
    shared: int
    blocks: int
    tensor_core: str | None
    global_atomics: int


def compiled(case: Case, target: Target) -> Facts:
    """Return the facts of one case on one target; RuntimeError with the assembler's words if it cannot be compiled."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(case.function.arg_names)
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    attrs = {(names.index(name),): [list(ALIGNED)] for name in case.aligned}
    source = ASTSource(fn=case.function, signature=signature, constexprs=case.constants, attrs=attrs)
    options = dict(case.options)
    if target.backend == "hip":
        options["num_stages"] = min(options.get("num_stages", 2), 2)
    kernel = triton.compile(source, target=GPUTarget(target.backend, target.arch, target.warp), options=options)
    shared = int(kernel.metadata.shared)
    if target.backend == "cuda":
        registers, spilled = _nvidia(kernel)
        text = kernel.asm["ptx"]
        core = next((name for name in ("wgmma.mma_async", "mma.sync") if name in text), None)
        atomics = len(re.findall(r"\b(?:atom|red)\.(?:\w+\.)*global", text))
    else:
        text = kernel.asm["amdgcn"]
        registers = _field(text, "vgpr_count")
        # Scalar registers spill into lanes of vector registers; what reaches memory is in the private segment.
        spilled = max(4 * _field(text, "vgpr_spill_count"), _field(text, "private_segment_fixed_size"))
        core = "v_mfma" if "v_mfma" in text else None
        atomics = len(re.findall(r"\b(?:global|flat|buffer)_atomic", text))
    blocks = target.occupancy(registers, shared, options.get("num_warps", 4))
    return Facts(
        case.kernel,
        case.variant,
        target.name,
        case.constants,
        options,
        registers,
        spilled,
        shared,
        blocks,
        core,
        atomics,
    )


def _field(text: str, name: str) -> int:
    found = re.search(rf"\.{name}:\s*(\d+)", text)
    return int(found.group(1)) if found else 0


def _nvidia(kernel: Any) -> tuple[int, int]:
    """Return registers a thread, and bytes spilled with those of other local memory."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(kernel.asm["cubin"])
        run = subprocess.run([str(tool), "--dump-resource-usage", str(file)], capture_output=True, text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", run.stdout)
    if found is None:
        raise RuntimeError(f"cuobjdump: {(run.stdout + run.stderr).strip()[-300:]}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def facts_of(cases: Iterable[Case], targets: Iterable[Target]) -> list[Facts]:
    """Return the facts of every case on every target."""
    targets = list(targets)
    return [compiled(case, target) for case in cases for target in targets]


def main() -> None:
    """Print one line a case and target; with --write, keep all of them."""
    from espalier.kernels.shipped import cases

    found: list[Facts] = []
    for target in TARGETS.values():
        for case in cases(target):
            facts = compiled(case, target)
            found.append(facts)
            tile = " ".join(f"{key}{value}" for key, value in case.constants.items() if key in ("BM", "BN", "BK"))
            print(
                f"{facts.target:7} {facts.kernel:16} {facts.variant:28} {tile:18} warps {facts.options['num_warps']} "
                f"stages {facts.options.get('num_stages', 1)} registers {facts.registers:3} spilled {facts.spilled:4} "
                f"shared {facts.shared:6} blocks {facts.blocks} {facts.tensor_core or '-'}",
                flush=True,
            )
    if "--write" in sys.argv[1:]:
        write(found)


def write(found: list[Facts]) -> None:
    """Write facts.json beside this file."""
    import triton

    document = {"format": FORMAT, "triton": triton.__version__, "facts": [asdict(facts) for facts in found]}
    FACTS.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
