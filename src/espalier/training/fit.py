"""The stage `fit`: learn some numbers about a model, whose weights stay as they are, from calibration tokens.

Evidence for a plan like what `collect` observes, and read by methods in the same way. Resumable, stopped between steps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from espalier.checkpoints.checkpoint import Checkpoint
from espalier.collecting.stats import Stats
from espalier.errors import UserError
from espalier.models.running import Running
from espalier.models.runtime import load
from espalier.training.fit_settings import Fitting
from espalier.training.train import Step, Training, TrainingState, interruption, shuffled, train

Log = Callable[[Mapping[str, float], int], None]  # named numbers and the step that they are of
Progress = Callable[[int, int], None]


def fit(
    directory: Path,
    fitting: Fitting,
    ids: NDArray[Any],
    mask: NDArray[Any] | None,
    running: Running,
    state: Path,
    *,
    dtype: str = "float32",
    log: Log | None = None,
    progress: Progress | None = None,
) -> tuple[Stats, list[Step]]:
    """Learn what `fitting` says of the checkpoint in `directory` and return the arrays and the loss of each step.

    `ids` int [N, L], `mask` int [N, L] or None; `dtype` is what the model computes in. The arrays stand in the
    statistics as those of a probe `fitting.name`. `state` is a folder for an interrupted call: the same call goes on
    from it, on a processor to the same bytes; the caller removes it when the result is safe. `log` hears named numbers
    of each step.

    UserError for a model that does not fit into memory or has weights that are not finite; InterruptedWork after a
    signal, with the state saved.
    """
    checkpoint = Checkpoint(directory)
    shape = checkpoint.any_shape()
    family = checkpoint.dense_family if checkpoint.is_dense else checkpoint.family
    if running.streams(checkpoint, dtype):
        raise UserError(
            f"conf/method/{fitting.name}.yaml: learns by running the whole model, and {directory} does not fit into "
            "memory (or stream=always was asked for). Use a method that observes, such as reap, or stream=never."
        )
    from espalier.fits import fit_class  # what is learnt uses the loop beside this file

    device = running.torch_device()
    model = load(directory, dtype, device).requires_grad_(False)
    learner = fit_class(fitting.name)(model, shape, family, **fitting.own).to(device)
    every = torch.as_tensor(np.asarray(ids)).long()
    kept = None if mask is None else torch.as_tensor(np.asarray(mask)).long()
    if hasattr(learner, "prepare"):  # what the text says before anything is learnt
        learner.prepare(every, kept)
    steps, each = fitting.steps(*every.shape), fitting.accumulation
    rows = shuffled(len(every), fitting.batch, fitting.seed)

    def batch(number: int) -> tuple[Tensor, Tensor | None, int]:
        chosen = rows(number)
        given = None if kept is None else kept[chosen].to(device)
        return every[chosen].to(device), given, number // each

    def tell(step: Step) -> None:
        if log is not None:
            log({"loss": step.loss, **step.terms}, step.done)

    def after(step: Step) -> None:
        if progress is not None:
            progress(step.done, steps)

    identity = {
        "files": checkpoint.fingerprint,
        "tokens": _digest(ids, mask),
        "fit": fitting.document(),
        "dtype": dtype,
        "device": device,
    }
    saved = TrainingState(state / "training.safetensors", identity)
    with interruption() as stop:
        trained = train(
            learner,
            lambda learner, batch: learner(*batch),
            batch,
            Training(
                rate=fitting.rate,
                steps=steps,
                schedule=fitting.schedule,
                accumulation=each,
                clip=fitting.clip,
                weight_decay=fitting.weight_decay,
                seed=fitting.seed,
            ),
            state=saved,
            stop=stop,
            after=after,
            log=tell,
        )
    tokens = [len(row) for row in every] if kept is None else kept.bool().sum(1).tolist()
    arrays = {(fitting.name, layer): named for layer, named in learner.arrays().items()}
    return Stats(shape, tuple(tokens), arrays), trained.curve


def save_fit(path: Path, stats: Stats, fitting: Fitting, curve: list[Step], **facts: Any) -> None:
    """Write what was learnt, as statistics whose header also has `fit` and `curve`: the terms of each step's loss."""
    stats.save(path, fit=fitting.document(), curve=[step.terms for step in curve], **facts)


def _digest(ids: NDArray[Any], mask: NDArray[Any] | None) -> str:
    found = hashlib.sha256(np.ascontiguousarray(ids).tobytes())
    found.update(b"" if mask is None else np.ascontiguousarray(mask).tobytes())
    return found.hexdigest()
