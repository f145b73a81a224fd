"""Tuning: freeze a checkpoint but for its routers, or its FFNs, and train those; resumable, stopped between steps.

Objectives: `lm`, `distill` and `layerwise`, see `tune_settings.Tuning`. Trained are the routers' weights and, where a
family has them, biases; the correction bias of sigmoid routers only chooses, gets no gradient and stays as it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from espalier.checkpoints.checkpoint import Checkpoint
from espalier.errors import UserError
from espalier.models.running import Running
from espalier.models.runtime import load, moe_blocks
from espalier.training.teacher import Teacher
from espalier.training.train import Step, Trained, Training, TrainingState, interruption, shuffled, train
from espalier.training.tune_adapters import Adapters, linear_weights
from espalier.training.tune_checkpoint import write_tuned
from espalier.training.tune_depth import DepthGates
from espalier.training.tune_gates import Controller, Gates, batches_of
from espalier.training.tune_layerwise import LayerwiseTuner
from espalier.training.tune_losses import divergence, entropy, next_token, router_logits
from espalier.training.tune_names import tuned_names
from espalier.training.tune_settings import Tuning

FORMAT = "espalier.tuning/1"

Log = Callable[[Mapping[str, float], int], None]  # named numbers and the step that they are of


@dataclass(frozen=True)
class Text:
    """The tuning text: `ids` int [N, L], `mask` [N, L] or None, and how it is called in the model card."""

    ids: NDArray[Any]
    mask: NDArray[Any] | None = None
    name: str = "tokens"


def tune(
    source: Path,
    out: Path,
    tuning: Tuning,
    text: Text,
    running: Running,
    state: Path,
    *,
    dtype: str = "float32",
    original: Path | None = None,
    teacher: Path | None = None,
    node: str | None = None,
    replace: bool = False,
    log: Log | None = None,
) -> dict[str, Any]:
    """Write the checkpoint `source` with tuned routers to `out`.

    `original` is the uncompressed model (layerwise), `teacher` what `save_teacher` wrote of it (distill), `dtype` what
    models compute in. `state` is a folder for an interrupted call: the same call goes on from it, on a processor to the
    same bytes; the caller removes it when the result is safe. `log` hears named numbers of each step.

    Returns `parameters` (tuned), `steps`, `loss` (first and last tenth of the curve) and what `write_tuned` does; with
    a target also the `threshold` set in the end, the share that it lets through (`threshold_share`), and the share that
    ran in the last tenth of the steps (`trained_share`).
    UserError for a model without routers, one that does not fit into memory (lm, distill), tokens that are too few, a
    teacher for other tokens; InterruptedWork after a signal, with the state saved.
    """
    checkpoint = Checkpoint(source)
    names = tuned_names(source, dtype, tuning)
    training = _training(tuning, text.ids.shape[1])
    log = log or (lambda values, step: None)
    threshold: tuple[float, float] | None = None
    digest = hashlib.sha256(np.ascontiguousarray(text.ids).tobytes())
    digest.update(b"" if text.mask is None else np.ascontiguousarray(text.mask).tobytes())
    identity: dict[str, Any] = {
        "files": checkpoint.fingerprint,
        "tokens": digest.hexdigest(),
        "tuning": asdict(tuning),
        "dtype": dtype,
        "device": running.torch_device(),
    }
    if tuning.objective == "layerwise":
        if original is None:
            raise UserError(f"conf/tuning/{tuning.name}.yaml: objective=layerwise needs the original model.")
        identity |= {"original": Checkpoint(original).fingerprint, "batch_size": running.collect_batch_size}
        ids = torch.as_tensor(text.ids).long()
        mask = None if text.mask is None else torch.as_tensor(text.mask).bool()
        tuner = LayerwiseTuner(
            original, source, list(names), ids, mask, tuning, training, running, dtype, state, identity
        )
        with interruption() as stop:
            tensors, curves = tuner.run(
                stop, lambda layer, step: log(_named(step, f"layer {layer}/"), layer * training.steps + step.done)
            )
    else:
        trained, threshold = _end_to_end(
            source, names, tuning, training, text, running, dtype, teacher, state, identity, log
        )
        tensors, curves = trained.parameters, {-1: trained.curve}
    each = training.accumulation * tuning.batch * text.ids.shape[1]
    curve = [_row(layer, step, each) for layer, steps in curves.items() for step in steps]
    losses = [step.loss for steps in curves.values() for step in steps]
    tenth = max(1, len(losses) // 10)
    facts: dict[str, Any] = {
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "steps": training.steps,
        "loss": [sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth],
    }
    record: dict[str, Any] = {"format": FORMAT, "tuning": asdict(tuning), "text": text.name, "dtype": dtype}
    record |= {"node": node, "tensors": sorted(names.values()), "curve": curve, "parameters": facts["parameters"]}
    config = None
    if threshold is not None:
        found = dict(zip(("threshold", "threshold_share"), threshold, strict=True))
        shares = [step.measured["active"] for step in curves[-1][-tenth:]]
        found["trained_share"] = sum(shares) / len(shares)
        facts, record = facts | found, record | found
        config = _with_threshold(checkpoint.config, threshold[0], depth=bool(tuning.load))
    named = {names[name]: tensor for name, tensor in tensors.items()}
    workers = running.apply_workers
    section = _section(tuning, training, text, facts, node)
    return facts | write_tuned(source, named, out, section, record, replace=replace, workers=workers, config=config)


def _training(tuning: Tuning, length: int) -> Training:
    steps = tuning.steps(length)
    return Training(
        rate=tuning.rate,
        steps=steps,
        warm_up=round(tuning.warm_up * steps),
        schedule=tuning.schedule,
        accumulation=tuning.accumulation,
        weight_decay=tuning.weight_decay,
        clip=tuning.clip,
        bf16=tuning.bf16,
        seed=tuning.seed,
    )


def _end_to_end(
    source: Path,
    names: Mapping[str, str],
    tuning: Tuning,
    training: Training,
    text: Text,
    running: Running,
    dtype: str,
    teacher: Path | None,
    state: Path,
    identity: dict[str, Any],
    log: Log,
) -> tuple[Trained, tuple[float, float] | None]:
    """Train through the whole model: objectives lm and distill.

    With a target also return the gates' threshold, and the share of neurons or tokens that it lets through.
    """
    where = f"conf/tuning/{tuning.name}.yaml: objective={tuning.objective}"
    if running.streams(Checkpoint(source), dtype):
        raise UserError(
            f"{where} runs the whole model, and {source} does not fit into memory (or runtime.stream says so). "
            "Use tuning=router_layerwise, which holds one layer at a time."
        )
    if tuning.objective == "distill" and teacher is None:
        raise UserError(f"{where} needs the original's answers. Run its teacher node.")
    answers = Teacher(teacher, text.ids) if teacher is not None else None
    device = running.torch_device()
    model = load(source, dtype, device)
    checkpoint = Checkpoint(source)
    adapters = None
    if tuning.train == "lora":
        linear = [name for name in linear_weights(model) if name in names]
        adapters = Adapters(model, linear, tuning.rank, tuning.alpha, tuning.seed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names or ".lora_" in name)  # the weights with adapters have other names now
    if checkpoint.is_dense and tuning.entropy:
        raise UserError(
            f"conf/tuning/{tuning.name}.yaml: entropy={tuning.entropy} is for routers of MoE blocks. Use 0."
        )
    gates = Gates(model, checkpoint.dense_family, where) if tuning.gates else None
    depth = DepthGates(model, where, load=bool(tuning.load), straight_through=tuning.straight_through)
    controller = Controller(tuning.gates or tuning.load, tuning.target)
    if gates is not None:
        for ffn in gates.ffns:
            ffn.router.straight_through = tuning.straight_through
    if checkpoint.is_dense:
        model.train()  # for the straight-through gates; these families drop nothing out
    ids = torch.as_tensor(text.ids).long()
    mask = None if text.mask is None else torch.as_tensor(text.mask).long()
    rows = shuffled(len(ids), tuning.batch, tuning.seed)

    def batch(number: int) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
        chosen = rows(number)
        given = None if mask is None else mask[chosen].to(device)
        told = None if answers is None else tuple(part.to(device) for part in answers.rows(chosen))
        return ids[chosen].to(device), given, told  # type: ignore[return-value]

    def losses(model: Any, batch: tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]) -> dict[str, Tensor]:
        inputs, given, told = batch
        seen.clear()
        logits = model(input_ids=inputs, attention_mask=given, use_cache=False).logits
        terms = {"lm": next_token(logits, inputs, given)} if told is None else {"kl": divergence(logits, *told, given)}
        if tuning.entropy:
            terms["entropy"] = tuning.entropy * entropy(seen, given)
        if gates is not None:
            terms["gates"] = controller.coefficient * gates.loss(given)
            measured["active"] = gates.active(given)
        if tuning.load:
            terms["load"] = controller.coefficient * depth.load(given, tuning.load_term, tuning.target)
            measured["active"] = depth.kept(given)
        elif depth.routers:
            measured["kept"] = depth.kept(given)
        guesses = depth.predictors(given)
        if guesses is not None:
            terms["predictors"] = guesses
        return terms

    saved = TrainingState(state / "training.safetensors", identity)
    measured: dict[str, float] = {}
    ratio = (tuning.router_rate or tuning.rate) / tuning.rate
    with router_logits(*_routers(model, checkpoint)) as seen, interruption() as stop:
        trained = train(
            model,
            losses,
            batch,
            training,
            state=saved,
            stop=stop,
            log=lambda step: log(_named(step, ""), step.done),
            before=controller.follow,
            measure=lambda: measured,
            scale=lambda name: ratio if "router." in name else 1.0,
        )
    if adapters is not None:
        trained = Trained(adapters.merged(trained.parameters), trained.curve)
    thresholds = gates if gates is not None else depth if tuning.load else None
    if thresholds is None or tuning.target is None:
        return trained, None
    count = min(len(ids), max(1, tuning.threshold_tokens // ids.shape[1]))
    some = torch.linspace(0, len(ids) - 1, count).long()  # of all domains: the text has one after another
    parts = list(batches_of(ids[some], None if mask is None else mask[some], tuning.batch, device))
    return trained, thresholds.set_threshold(model.eval(), parts, tuning.target)


def _with_threshold(config: dict[str, Any], threshold: float, depth: bool) -> dict[str, Any]:
    """Return config.json with another threshold for every gated FFN, or for every layer with gates of depth."""
    own = config["espalier"]
    if depth:
        routed = {
            layer: settings | {"threshold": threshold} if settings["rule"] == "threshold" else settings
            for layer, settings in own["depth"]["layers"].items()
        }
        return config | {"espalier": own | {"depth": own["depth"] | {"layers": routed}}}
    layers = {
        layer: settings | {"router": settings["router"] | {"threshold": threshold}}
        if settings["router"]["choose"] == "threshold" else settings
        for layer, settings in own["layers"].items()
    }  # fmt: skip
    return config | {"espalier": own | {"layers": layers}}


def _routers(model: Any, checkpoint: Checkpoint) -> tuple[list[nn.Module], int]:
    """Return the routers of MoE blocks and which item of what they return are the logits."""
    if checkpoint.is_dense:
        return [], 0
    family = checkpoint.family
    blocks = moe_blocks(model, family).values()
    return [getattr(block, family.router_module) for block in blocks], 1 if family.scales_input else 0


def _named(step: Step, prefix: str) -> dict[str, float]:
    numbers = step.terms | step.measured
    return {f"{prefix}loss": step.loss} | {f"{prefix}{name}": value for name, value in numbers.items()}


def _row(layer: int, step: Step, each: int) -> dict[str, Any]:
    """One line of the loss curve; `layer` is -1 where all layers are trained together, and is then left out."""
    row: dict[str, Any] = {"step": step.done, "tokens": step.done * each, "seconds": step.seconds, "loss": step.loss}
    measured = {"measured": step.measured} if step.measured else {}
    return ({} if layer < 0 else {"layer": layer}) | row | {"terms": step.terms} | measured


def _section(tuning: Tuning, training: Training, text: Text, facts: dict[str, Any], node: str | None) -> str:
    """Return the part of the model card that says what was tuned."""
    what = {
        "lm": "next-token loss",
        "distill": f"KL divergence from the original's {tuning.top} likeliest tokens",
        "layerwise": f"each block's routed output against the original's (inputs: {tuning.inputs})",
    }[tuning.objective]
    n, length = text.ids.shape
    rows = {
        "Objective": what + (f", {tuning.entropy:g} x router entropy" if tuning.entropy else ""),
        "Tuned": f"{tuning.train}{' and norms' if tuning.norms else ''}, {facts['parameters']:,} parameters",
        "Text": f"{text.name}: {n} sequences of {length} tokens, {training.steps} steps of "
        f"{training.accumulation * tuning.batch} sequences",
        "Settings": f"rate {tuning.rate:g}, {tuning.schedule}, seed {tuning.seed}",
        "Loss, first and last tenth": f"{facts['loss'][0]:.4g}, {facts['loss'][1]:.4g}",
    }
    if node:
        rows["Espalier node"] = node
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    title = "Router tuning" if tuning.train == "routers" else "Tuning"
    return f"## {title}\n\n| | |\n| --- | --- |\n{table}\n\n`tuning.json` holds the loss curve."
