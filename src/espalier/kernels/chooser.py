"""Choose tiles without tuning: rank the shipped configurations by a model of waves, bytes in flight and FLOPs.

A launch of P programs runs in waves of as many as the GPU holds at once, which registers and shared memory decide
(facts.json, from the compiler). A wave takes as long as its reads or its products, whichever are more; reads are slower
when fewer bytes are on their way than memory's latency needs (Little's law). After RaMP (arXiv 2604.26039), which shows
that the shape of the grid ranks configurations nearly as well as timing them. At most CANDIDATES are left to be timed.

Imports no torch: sizes in, configurations out.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from espalier.kernels.aot import FACTS
from espalier.kernels.targets import Target
from espalier.kernels.tile import GATE_UP, MATMUL, TileConfig

CANDIDATES = 8
CACHE_SPEED = 2.5  # reads from the second-level cache, in those from memory
SMALL_TILE = 0.6  # of the tensor cores' speed where a tile has fewer rows than their widest instruction takes
BYTES = 2  # of bfloat16 and float16


@dataclass(frozen=True)
class Work:
    """The sizes of a MoE block and how many rows each expert has."""

    hidden: int  # D
    width: int  # F
    rows: tuple[int, ...]  # [E]
    gated: bool = True

    @classmethod
    def expected(cls, hidden: int, width: int, tokens: int, experts: int, k: int, gated: bool = True) -> "Work":
        """Return the work of `tokens` whose `k` experts are drawn alike: as many experts as then have rows."""
        used = max(1, round(experts * (1 - (1 - k / experts) ** tokens))) if tokens else 0
        total = tokens * k
        each = [total // used + (n < total % used) for n in range(used)] if used else []
        return cls(hidden, width, tuple(each) + (0,) * (experts - used), gated)


@dataclass(frozen=True)
class Choice:
    """The tiles of both products, of one height, and the seconds that the model reckons."""

    gate_up: TileConfig
    down: TileConfig
    seconds: float


def rank(work: Work, target: Target, at_most: int = CANDIDATES) -> list[Choice]:
    """Return the best configurations, the best first; no configuration that spills or does not fit is among them."""
    found = _ranked(work, target)
    return found[:at_most]


@cache
def _ranked(work: Work, target: Target) -> list[Choice]:
    first = [(config, _seconds(config, "ragged_gate_up", work, target)) for config in GATE_UP[target.name]]
    second = [(config, _seconds(config, "ragged_matmul", work, target)) for config in MATMUL[target.name]]
    pairs = [
        Choice(one, two, before + after)
        for one, before in first
        for two, after in second
        if one.block_m == two.block_m and math.isfinite(before + after)
    ]
    return sorted(pairs, key=lambda choice: choice.seconds)


def _seconds(config: TileConfig, kernel: str, work: Work, target: Target) -> float:
    """Return the seconds of one product; infinite where the configuration cannot run well."""
    resident = occupancy(config, kernel, target)
    if resident == 0:
        return math.inf
    up = kernel == "ragged_gate_up"
    parts = 2 if up and work.gated else 1
    inner, outer = (work.hidden, work.width) if up else (work.width, work.hidden)
    tiles = sum(-(-rows // config.block_m) for rows in work.rows)
    if not tiles:
        return target.launch
    columns = -(-outer // config.block_n)
    programs = tiles * columns * config.split
    held = target.units * resident
    waves = programs / held
    quantised = math.ceil(waves) / waves if waves > 1 else 1.0

    flops = 2.0 * tiles * config.block_m * columns * config.block_n * parts * inner
    speed = target.flops * (SMALL_TILE if config.block_m < 64 and target.name == "sm_90" else 1.0)
    busy = min(1.0, programs / target.units)  # units that have anything to do
    computing = flops / (speed * busy) * quantised

    used = sum(rows > 0 for rows in work.rows)
    weights = float(used * outer * parts * inner * BYTES)
    again = float(tiles * outer * parts * inner * BYTES) - weights  # later tiles of an expert find them in the cache
    rows = sum(work.rows)
    moved = weights + rows * (inner + outer * (1 if config.split == 1 else 2 * config.split)) * BYTES
    reread = again + columns * tiles * config.block_m * inner * BYTES
    at_once = min(resident, programs / target.units)  # programs in a unit
    on_way = (config.stages - 1) * config.block_n * parts * config.block_k * BYTES * at_once
    full = min(1.0, on_way / target.in_flight)
    reading = (moved / target.bandwidth + reread / (CACHE_SPEED * target.bandwidth)) / max(full, 1e-6) * quantised
    return max(computing, reading) + target.launch


@cache
def _facts() -> dict[tuple[str, str, str], tuple[int, int, int]]:
    """Return registers, spilled bytes and shared bytes of each target, kernel and tile; the worst of its variants."""
    found: dict[tuple[str, str, str], tuple[int, int, int]] = {}
    for fact in json.loads(FACTS.read_text())["facts"]:
        key = (fact["target"], fact["kernel"], _tile(fact["constants"], fact["options"]))
        mine = (fact["registers"], fact["spilled"], fact["shared"])
        found[key] = tuple(map(max, found.get(key, mine), mine))  # type: ignore[assignment]
    return found


def _tile(constants: dict[str, int], options: dict[str, int]) -> str:
    tile = [constants.get(name) for name in ("BM", "BN", "BK")]
    return " ".join(map(str, [*tile, constants.get("SPLIT", 1), options.get("num_warps"), options.get("num_stages")]))


def facts(config: TileConfig, kernel: str, target: Target) -> dict[str, int] | None:
    """Return registers a thread, bytes spilled and shared, and the programs a unit holds; None if not compiled."""
    constants = config.constants() | {"SPLIT": config.split if kernel == "ragged_matmul" else 1}
    fact = _facts().get((target.name, kernel, _tile(constants, config.options())))
    if fact is None:
        return None
    registers, spilled, shared = fact
    programs = target.occupancy(registers, shared, config.warps)
    return {"registers": registers, "spilled": spilled, "shared": shared, "programs": programs}


def occupancy(config: TileConfig, kernel: str, target: Target) -> int:
    """Return how many programs a unit holds at once; 0 where the compiler's facts forbid the configuration."""
    found = facts(config, kernel, target)
    if found is None or found["spilled"] or found["shared"] > target.shared_block:
        return 0
    return found["programs"]


def histogram(experts: Sequence[int], number: int) -> tuple[int, ...]:
    """Return how many of the picks `experts` name each of `number` experts."""
    counts = [0] * number
    for expert in experts:
        if 0 <= expert < number:
            counts[expert] += 1
    return tuple(counts)
