"""A plain training loop for some of a model's parameters: AdamW, resumable to the same bytes, without pickle."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from espalier.artefacts.store import atomic_file, stable_header
from espalier.errors import InterruptedWork, UserError, nearest

FORMAT = "espalier.training/2"
SCHEDULES = ("constant", "linear", "cosine")
SAVE_SECONDS = 120.0

Loss = Callable[[Any, Any], dict[str, Tensor]]  # (model, batch) -> scalar terms, whose sum is made small


@dataclass(frozen=True)
class Training:
    """What determines a training beside its model, its batches and its loss.

    A step sums the gradients of `accumulation` micro-batches. The rate warms up linearly over `warm_up` steps and
    follows `schedule` to zero after the share `flat` of the steps. Weight decay touches matrices only. `clip` bounds
    the gradient's norm; `bf16` computes in bfloat16 under autocast. UserError for an unknown schedule or a number
    out of its range.
    """

    rate: float
    steps: int
    warm_up: int = 0
    schedule: str = "cosine"
    flat: float = 0.0
    accumulation: int = 1
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float | None = 1.0
    bf16: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise UserError(f"training: schedule={self.schedule!r}; {nearest(self.schedule, list(SCHEDULES))}.")
        for key, least in (("steps", 0), ("accumulation", 1), ("warm_up", 0)):
            if getattr(self, key) < least:
                raise UserError(f"training: {key}={getattr(self, key)}, expected a whole number >= {least}.")
        if not self.rate > 0 or not 0 <= self.flat < 1:
            raise UserError(f"training: rate={self.rate} and flat={self.flat}; use rate > 0 and flat in [0, 1).")

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        falling = (self.steps - step) / ((1 - self.flat) * self.steps)  # 1 where the fall begins, 0 at the end
        if self.schedule == "constant":
            falling = 1.0
        elif self.schedule == "cosine":
            falling = (1 - math.cos(math.pi * min(1.0, falling))) / 2
        return self.rate * min(1.0, (step + 1) / (self.warm_up + 1), falling)


@dataclass(frozen=True)
class Step:
    """One finished step: how many are done, the loss's terms (means over the micro-batches) and seconds so far.

    `measured`: further numbers, means too, that are no part of the loss.
    """

    done: int
    terms: dict[str, float]
    seconds: float
    measured: dict[str, float] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        return sum(self.terms.values())


@dataclass
class Trained:
    """The parameters by name, in fp32 where the model's are narrower, and what each step measured."""

    parameters: dict[str, Tensor]
    curve: list[Step]


@dataclass
class TrainingState:
    """A file with all that a training needs to go on: parameters, moments, random numbers, steps done.

    `identity` is any JSON document that says which training it is. `load` returns None for a file that is missing or
    unreadable, or whose identity `continues(identity of the file, steps done)` rejects (default: another one).
    """

    path: Path
    identity: dict[str, Any]
    save_seconds: float = SAVE_SECONDS
    continues: Callable[[dict[str, Any], int], bool] | None = None
    saved: Callable[[int], None] | None = None  # hears the steps done after each save
    steps: int = 0  # that are done in the file
    _last: float = field(default_factory=time.monotonic)

    def due(self) -> bool:
        """Whether it is time to save again."""
        return time.monotonic() - self._last > self.save_seconds

    def save(self, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, curve: list[Step]) -> None:
        """Replace the file, whole or not at all."""
        tensors = {f"parameter/{name}": p.detach().contiguous() for name, p in parameters.items()}
        for name, p in parameters.items():
            # Cloned: moments that share memory with nothing are what safetensors wants.
            tensors |= {f"moment/{name}/{key}": value.clone() for key, value in optimizer.state[p].items()}
        tensors["rng/cpu"] = torch.get_rng_state()
        device = next(iter(parameters.values())).device
        if device.type == "cuda":
            tensors["rng/cuda"] = torch.cuda.get_rng_state(device)
        steps = [[step.done, step.terms, step.seconds, *([step.measured] if step.measured else [])] for step in curve]
        header = {"format": FORMAT, "identity": json.dumps(self.identity), "curve": json.dumps(steps)}
        with atomic_file(self.path) as temporary:
            save_file(tensors, temporary, header | {"done": str(curve[-1].done if curve else 0)})
            stable_header(temporary)
        self._last, self.steps = time.monotonic(), curve[-1].done if curve else 0
        if self.saved is not None:
            self.saved(self.steps)

    def load(self, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer | None) -> list[Step] | None:
        """Fill parameters, moments and the random generators from the file and return its curve."""
        try:
            with safe_open(self.path, "pt") as file:
                header = file.metadata()
                identity, done = json.loads(header["identity"]), int(header["done"])
                same = identity == json.loads(json.dumps(self.identity))
                if not (same if self.continues is None else self.continues(identity, done)):
                    return None
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                curve = [Step(*row) for row in json.loads(header["curve"])]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(tensors[f"parameter/{name}"])
        if optimizer is not None:
            for key, tensor in tensors.items():
                kind, _, rest = key.partition("/")
                if kind == "moment":
                    name, _, moment = rest.rpartition("/")
                    p = parameters[name]
                    optimizer.state[p][moment] = tensor.to(p.device)
            torch.set_rng_state(tensors["rng/cpu"])
            if "rng/cuda" in tensors and torch.cuda.is_available():
                torch.cuda.set_rng_state(tensors["rng/cuda"], next(iter(parameters.values())).device)
        return curve


class Interruption:
    """Notices that the process is asked to end; `number` is the signal's, None until then."""

    def __init__(self) -> None:
        self.number: int | None = None

    def leave(self, what: str) -> None:
        """Raise InterruptedWork where a signal came; `what` says what was kept."""
        if self.number is not None:
            raise InterruptedWork(f"stopped by {signal.Signals(self.number).name} {what}", self.number)


@contextlib.contextmanager
def interruption() -> Iterator[Interruption]:
    """Let SIGTERM and an interrupt wait for the end of a step; a second one acts at once, as it did before."""
    noticed = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield noticed  # only the main thread hears signals
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def notice(number: int, frame: FrameType | None) -> None:
        noticed.number = number
        restore()

    for number in before:
        signal.signal(number, notice)
    try:
        yield noticed
    finally:
        restore()


def train(
    model: nn.Module,
    loss: Loss,
    batch: Callable[[int], Any],
    training: Training,
    *,
    state: TrainingState | None = None,
    stop: Interruption | None = None,
    after: Callable[[Step], None] | None = None,
    log: Callable[[Step], None] | None = None,
    before: Callable[[list[Step]], None] | None = None,
    measure: Callable[[], dict[str, float]] | None = None,
    scale: Callable[[str], float] = lambda name: 1.0,
) -> Trained:
    """Train the parameters of `model` that require a gradient, in place, and return them with the curve.

    `batch(n)` gives the n-th micro-batch, whatever came before. `before` hears the finished steps in front of each
    step, `after` each step behind it; `measure` gives further numbers of the micro-batch that has just run. The rate
    of a parameter is multiplied by `scale` of its name. With `state` a training that was interrupted goes on where it
    was saved last; on a processor the result has the same bytes. `log` hears each step when it is saved (without
    `state`, when it is done), so that one that is done again after an interruption is told once.

    UserError when nothing is to be trained or the loss is not finite; InterruptedWork after the running step when
    `stop` noticed a signal, with the state saved.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise UserError("training: no parameter of the model is to be trained.")
    # Small steps vanish in half precision, so that the optimizer gets copies in fp32 where there is less.
    masters = {name: p if p.dtype.itemsize >= 4 else nn.Parameter(p.detach().float()) for name, p in trained.items()}
    device = next(iter(trained.values())).device
    optimizer = _optimizer(masters, training, scale)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(training.seed)
        curve = (state.load(masters, optimizer) if state is not None else None) or []
        _copy(masters, trained)
        logged = len(curve)
        spent, start = curve[-1].seconds if curve else 0.0, time.monotonic()
        for number in range(len(curve), training.steps):
            if before is not None:
                before(curve)
            for group in optimizer.param_groups:
                group["lr"] = training.rate_at(number) * group["scale"]
            terms: dict[str, float] = {}
            measured: dict[str, float] = {}
            for micro in range(number * training.accumulation, (number + 1) * training.accumulation):
                with torch.autocast(device.type, dtype=torch.bfloat16, enabled=training.bf16):
                    found = loss(model, batch(micro))
                torch.autograd.backward(torch.stack(list(found.values())).sum() / training.accumulation)
                for name, term in found.items():
                    terms[name] = terms.get(name, 0.0) + term.item() / training.accumulation
                for name, value in (measure() if measure is not None else {}).items():
                    measured[name] = measured.get(name, 0.0) + value / training.accumulation
            _update(masters, trained, optimizer, training.clip)
            curve.append(Step(number + 1, terms, round(spent + time.monotonic() - start, 3), measured))
            if not math.isfinite(curve[-1].loss):
                raise UserError(f"training: the loss is {curve[-1].loss} at step {number + 1}. Use a smaller rate.")
            leaving = stop is not None and stop.number is not None
            with torch.random.fork_rng(devices):  # what others draw meanwhile must not change the rest
                if after is not None:
                    after(curve[-1])
                if state is not None and (state.due() or leaving or number + 1 == training.steps):
                    state.save(masters, optimizer, curve)
                if log is not None and (state is None or state.steps == number + 1):
                    for step in curve[logged:]:
                        log(step)
                    logged = len(curve)
            if stop is not None and state is not None:
                stop.leave(f"after step {number + 1} of {training.steps}; the same command goes on from {state.path}")
    return Trained({name: p.detach() for name, p in masters.items()}, curve)


def shuffled(count: int, batch: int, seed: int) -> Callable[[int], list[int]]:
    """Return the function that gives the rows of the n-th micro-batch: all `count` rows in a new order each epoch."""

    @lru_cache(maxsize=2)
    def order(epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        drawn: list[int] = torch.randperm(count, generator=generator).tolist()
        return drawn

    return lambda number: [order(n // count)[n % count] for n in range(number * batch, (number + 1) * batch)]


def _optimizer(
    parameters: Mapping[str, Tensor], training: Training, scale: Callable[[str], float]
) -> torch.optim.AdamW:
    """Make the optimizer: a group for each factor of the rate, of matrices with weight decay and vectors without."""
    by_kind: dict[tuple[float, bool], list[Tensor]] = {}
    for name, p in parameters.items():
        by_kind.setdefault((scale(name), p.dim() > 1), []).append(p)
    groups = [
        {"params": members, "weight_decay": training.weight_decay if matrix else 0.0, "scale": factor}
        for (factor, matrix), members in sorted(by_kind.items(), key=lambda kind: (kind[0][0], not kind[0][1]))
    ]
    return torch.optim.AdamW(groups, lr=training.rate, betas=training.betas, fused=True)


def _update(
    masters: Mapping[str, Tensor], trained: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, clip: float | None
) -> None:
    """Take one step with the gradients of `trained`, which have the new values and no gradients afterwards."""
    for name, p in trained.items():
        if masters[name] is not p and p.grad is not None:
            masters[name].grad, p.grad = p.grad.float(), None
    if clip is not None:
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    _copy(masters, trained)


@torch.no_grad()
def _copy(masters: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> None:
    for name, p in trained.items():
        if masters[name] is not p:
            p.copy_(masters[name])
