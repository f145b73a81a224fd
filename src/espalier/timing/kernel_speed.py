"""Time the experts of one MoE block: every implementation in turns, on synthetic and real routing, beside the floor.

Every output is first compared with a plain computation in fp32, and nothing is reported where one differs. The block of
the uncompressed model runs in the same turns. For GPUs that are not here the document says what the compiler made of
the kernels, and the bytes and FLOPs of the same rows: no times.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from espalier import kernels
from espalier.collecting.stats import Stats
from espalier.errors import UserError
from espalier.kernels import chooser, device, packed, peers
from espalier.kernels.targets import TARGETS
from espalier.kernels.traffic import Floor, padded
from espalier.modeling import modeling_espalier
from espalier.models.experts import ExpertWeights
from espalier.timing.kernel_block import Inputs, LoadedBlock, block_layer, loaded_block
from espalier.timing.kernel_clock import Clock
from espalier.timing.kernel_settings import PEERS, KernelBench
from espalier.timing.routing_facts import routing_facts

FORMAT = "espalier.kernel_speed/2"
UNCOMPRESSED = "uncompressed"  # the original's block, by our kernels
OURS = "espalier"
# Largest difference from the plain computation, as part of its largest value.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}

Document = dict[str, Any]


@dataclass(frozen=True)
class Traces:
    """Statistics with the probe `routing`, of a checkpoint and of the uncompressed model; None if not asked for."""

    model: Stats | None = None
    original: Stats | None = None


def measure_kernels(
    directory: Path, original: Path, bench: KernelBench, dtype: str, place: str, traces: Traces
) -> Document:
    """Return what `espalier.kernel_speed/2` says for a checkpoint on the device `place`; `original` is uncompressed.

    UserError for a model without MoE blocks, a layer that has none, a rule of skipping that looks at more than the
    experts' input, or an implementation whose output is wrong.
    """
    kernels.register()
    peers.register_peers()
    clock = Clock(place, bench.threads)
    layer = block_layer(directory, bench)
    with clock.running(), contextlib.ExitStack() as stack:

        def load(path: Path) -> LoadedBlock:
            return stack.enter_context(loaded_block(path, layer, dtype, place))

        # Ours has its own copy: on a processor it packs the weights and lets the stacked ones go.
        theirs, ours = load(directory), load(directory)
        before = None if directory == original else load(original)
        number = theirs.experts.down_proj.dtype
        machine = clock.machine(number, _packed_products if place == "cpu" else None)
        run = _Run(bench, clock, theirs, ours, before, machine)
        measured, compiled = [], []
        for routing in bench.routings:
            for tokens in bench.tokens:
                given = theirs.inputs(routing, tokens, traces.model, layer)
                first = None if before is None else before.inputs(routing, tokens, traces.original, layer)
                measured += [{"routing": routing, "tokens": tokens} | row for row in run.measure(given, first)]
                where: Document = {"routing": routing, "tokens": tokens}
                compiled += [where | _compiled(given.work, tokens, name) for name in bench.targets]
    return {
        "format": FORMAT,
        "kernel": asdict(bench),
        "layer": layer,
        "device": place,
        "dtype": str(number).removeprefix("torch."),
        "block": {
            "experts": theirs.layout.experts,
            "rows": theirs.rows,
            "k": int(theirs.experts.config.num_experts_per_tok),
            "hidden": theirs.layout.hidden,
            "width": theirs.layout.width,
        },
        "machine": machine,
        "left_out": run.left_out,
        "measured": measured,
        "compiled": compiled,
        "routing": [] if traces.model is None else _routing(directory, bench, traces.model),
    }


def _packed_products(weight: Tensor) -> list[Callable[[], Tensor]]:
    """Return the product of a square matrix by itself with weights as the processor's kernels have them."""
    if packed.unpackable(weight.dtype):
        return []
    prepared = torch.ops.mkldnn._reorder_linear_weight(weight)
    return [lambda: torch.ops.mkldnn._linear_pointwise.default(weight, prepared, None, "none", (), "")]


class _Run:
    """Times the implementations of one block in turns."""

    def __init__(
        self,
        bench: KernelBench,
        clock: Clock,
        theirs: LoadedBlock,
        ours: LoadedBlock,
        before: LoadedBlock | None,
        machine: Document,
    ) -> None:
        self.bench, self.clock, self.machine = bench, clock, machine
        self.theirs, self.ours, self.before = theirs, ours, before
        where = torch.device(clock.place)
        reasons = {
            name: peers.unsupported(name, theirs.layout, where) for name in PEERS if name in bench.implementations
        }
        self.left_out = {name: reason for name, reason in reasons.items() if reason is not None}

    def measure(self, given: Inputs, first: Inputs | None) -> Iterator[Document]:
        """Yield a row for each implementation and cache; UserError where an output is wrong."""
        tokens = len(given.hidden)
        calls: dict[str, Callable[[], Tensor]] = {}
        for name in self.bench.implementations:
            if name not in self.left_out and (name != "batched_mm" or tokens <= self.bench.copying):
                block = self.ours if name == OURS else self.theirs
                calls[name] = lambda block=block, name=name: block.call(name, given)  # type: ignore[misc]
        wanted = self.theirs.plain_output(given)
        errors = {name: _error(name, call(), wanted, given) for name, call in calls.items()}
        if first is not None and self.before is not None:
            before = self.before
            wanted = before.plain_output(first) if not errors.get(UNCOMPRESSED) else wanted
            calls[UNCOMPRESSED] = lambda: before.call(OURS, first)
            errors[UNCOMPRESSED] = _error(UNCOMPRESSED, calls[UNCOMPRESSED](), wanted, first)
        for cache in self.bench.caches:
            seconds = self._times(calls, cold=cache == "cold")
            for name in calls:
                inputs = first if name == UNCOMPRESSED and first is not None else given
                yield {"implementation": name, "cache": cache, "error": errors[name]} | self._row(name, inputs, seconds)

    def _times(self, calls: Mapping[str, Callable[[], Tensor]], *, cold: bool) -> dict[str, list[float]]:
        names = list(calls)
        timers = {name: self.clock.timer(call, cold=cold) for name, call in calls.items()}
        found: dict[str, list[float]] = {name: [] for name in names}
        for number in range(self.bench.rounds):
            turn = number % len(names)
            for name in [*names[turn:], *names[:turn]]:
                found[name].append(timers[name]())
        return found

    def _row(self, name: str, inputs: Inputs, seconds: Mapping[str, Sequence[float]]) -> Document:
        low, middle, high = (float(value) for value in np.quantile(seconds[name], [0.2, 0.5, 0.8]))
        rows, flops, bandwidth = inputs.work.rows, self.machine["flops"], self.machine["bandwidth"]
        floor = Floor.of(inputs.work, len(inputs.hidden), str(inputs.hidden.dtype).removeprefix("torch."))
        row: Document = {
            "distinct": sum(number > 0 for number in rows),
            "imbalance": max(rows) * len(rows) / sum(rows) if sum(rows) else 0.0,
            "rows": sum(rows),
            "seconds": middle,
            "seconds_20": low,
            "seconds_80": high,
            "flops": floor.flops,
            "bytes": floor.bytes,
            "floor_seconds": floor.seconds(flops, bandwidth),
            "bound": floor.bound(flops, bandwidth),
        }
        library = [other for other in seconds if other not in (OURS, UNCOMPRESSED)]
        if library:
            best = min(library, key=lambda other: float(np.median(seconds[other])))
            row |= {"over_library": _ratio(seconds[best], seconds[name]), "library": best}
        if "eager" in seconds:
            row["over_eager"] = _ratio(seconds["eager"], seconds[name])
        if UNCOMPRESSED in seconds:
            row["over_uncompressed"] = _ratio(seconds[UNCOMPRESSED], seconds[name])
        if name in (OURS, UNCOMPRESSED) and self.clock.place != "cpu":
            block = self.before if name == UNCOMPRESSED and self.before is not None else self.ours
            target = device.target_of(inputs.hidden.device)
            choice = device.choose(block.layout, len(inputs.hidden), inputs.indices.shape[1], inputs.hidden.device)
            row |= _tiles(choice, inputs.work, target.name)
        return row


def _ratio(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the median of the rounds' ratios: what else ran on the machine in a round slowed both."""
    return float(np.median(np.array(one) / np.array(other)))


def _error(name: str, found: Tensor, wanted: Tensor, inputs: Inputs) -> float:
    error = float((found.float() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))
    limit = TOLERANCE.get(inputs.hidden.dtype, 1e-2)
    if not error <= limit:  # NaN too
        raise UserError(
            f"{name}: its output for {len(inputs.hidden)} tokens is {error:.1e} of the largest value away from the "
            f"plain computation (allowed: {limit:.0e}), so that its time means nothing. Take it out of conf/kernel's "
            "implementations and report it."
        )
    return error


def _tiles(choice: chooser.Choice, work: chooser.Work, target: str) -> Document:
    known = TARGETS[target]
    pairs = (("ragged_gate_up", choice.gate_up), ("ragged_matmul", choice.down))
    return {
        "target": target,
        "gate_up": choice.gate_up.document(),
        "down": choice.down.document(),
        "padded": padded(work, choice.down.block_m),
        "facts": {kernel: chooser.facts(config, kernel, known) for kernel, config in pairs},
    }


def _compiled(work: chooser.Work, tokens: int, name: str) -> Document:
    """Return, for a GPU that need not be here, the chooser's tiles, what the compiler says of them, and the floor."""
    target = TARGETS[name]
    floor = Floor.of(work, tokens, "bfloat16")
    return {
        "distinct": sum(rows > 0 for rows in work.rows),
        "rows": sum(work.rows),
        "launches": 4,
        "flops": floor.flops,
        "bytes": floor.bytes,
        "floor_seconds": floor.seconds(target.flops, target.bandwidth),
        "bound": floor.bound(target.flops, target.bandwidth),
        **_tiles(chooser.rank(work, target, 1)[0], work, name),
    }


def _routing(directory: Path, bench: KernelBench, trace: Stats) -> list[Document]:
    """Return for each layer what its picks share (routing_facts.py)."""
    weights = ExpertWeights(directory)
    found = []
    for layer, arrays in trace.layers("routing"):
        mapped = weights.expert_map(layer)
        rows = len(mapped) if mapped is not None else int(trace.shape.experts)  # type: ignore[union-attr]
        skipped = _skipped(weights, layer, arrays)
        found.append({"layer": layer} | routing_facts(arrays["experts"], rows, mapped, bench.tokens, skipped))
    return found


def _skipped(weights: ExpertWeights, layer: int, arrays: dict[str, NDArray[Any]]) -> NDArray[np.bool_] | None:
    """Return which picks [N, K] a checkpoint's rule leaves out, None where it has none."""
    checkpoint, family = weights.checkpoint, weights.family
    rule = checkpoint.config.get("espalier", {}).get("layers", {}).get(str(layer), {}).get("skip")
    if rule is None:
        return None
    names = {"expert_map": family.expert_map_tensor(layer), "skip_factor": family.skip_factor_tensor(layer)}
    tensors = {key: checkpoint.tensor(name) for key, name in names.items() if name in checkpoint.entries}
    weighed, picks = torch.from_numpy(arrays["weights"]).float(), torch.from_numpy(arrays["experts"]).long()
    return ~modeling_espalier.kept_slots(weighed, picks, SimpleNamespace(**tensors), rule).numpy()
