"""Score a checkpoint: lm-eval tasks, perplexities and the parameters that a token uses, in one process."""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from espalier.artefacts.store import read_json
from espalier.checkpoints.checkpoint import Checkpoint
from espalier.collecting.collect import check_weights, naming_file
from espalier.errors import UserError, nearest
from espalier.inputs.assets import text_directory
from espalier.inputs.library_tasks import check_indexed
from espalier.inputs.sources import task_revision
from espalier.inputs.tokens import load_tokenizer
from espalier.inputs.windows import cut_documents, held_out, padded
from espalier.models import runtime
from espalier.models.active import count_parameters, is_moe
from espalier.models.running import Running
from espalier.models.stream import StreamedModel
from espalier.progress import Progress
from espalier.scoring.intervals import estimate
from espalier.scoring.perplexity import DocumentScore, Text, document_scores, streamed_scores
from espalier.scoring.samples import FORMAT
from espalier.scoring.samples import load_samples as load_samples
from espalier.scoring.samples import load_scores as load_scores
from espalier.scoring.samples import save_scores as save_scores
from espalier.scoring.tasks import is_own, task_configs, task_names
from espalier.training.teacher import Teacher

# Accuracies in the order in which one becomes a task's metric: our own tasks correct each choice's score by its
# score without the question (PMI; Holtzman et al., arXiv 2104.08315), the papers' zero-shot tables report `acc`.
ACCURACIES = ("acc_mutual_info", "acc", "acc_norm")
ACTIVE_DOCUMENTS = 8  # a domain, to measure active parameters when no perplexity is asked for
FEWSHOT_SEED = 1234  # lm-eval's default

Document = dict[str, Any]


def score(
    directory: Path,
    tasks: Sequence[Document],
    running: Running,
    *,
    dtype: str = "auto",
    answers: Mapping[str, Path] | None = None,
    progress: Progress | None = None,
) -> tuple[Document, pd.DataFrame]:
    """Score the model in `directory` and return (document, samples).

    tasks: {"task": name, "limit": items or None, "length": tokens a window or None}, perhaps "documents" (the first of
    a text), and, where they are not the task's own, "num_fewshot" and the "metric" that stands for the task. A name is
    that of an embedded task or of one of conf/task, `perplexity_DOMAIN` or `kl_DOMAIN` of an embedded text (`limit`
    does not apply to it), or any lm-eval task or group. `answers`: by `kl_` task the original's, of the same
    windows. A model that does not fit is run layer by layer, all choices in one pass over its weights and all texts in
    another.

    samples: one row an item, columns `task`, `item`, for choices `correct` (the task's metric) and each of `acc`,
    `acc_norm`, `acc_mutual_info` that the task has, for texts `nll` or `kl` (nats), `tokens`, `bytes`.

    UserError for an unknown task, data that cannot be had, or a task that generates text with a streamed model.
    """
    checkpoint = Checkpoint(directory)
    if is_moe(checkpoint):
        checkpoint.shape()  # config.json and tensors that disagree are told before the model is loaded
    tokenizer = load_tokenizer(directory)
    measured = _measured(tasks)
    texts = _texts(measured, answers or {}, tokenizer)
    model = _load_model(directory, checkpoint, dtype, running)
    results: dict[str, Document] = {}
    frames: list[pd.DataFrame] = []
    others = [task for task in tasks if task["task"] not in measured]
    if others:
        for name, result, frame in _lm_eval(model, tokenizer, others, running, progress):
            results[name] = result
            frames.append(frame)
    live = model.model if isinstance(model, StreamedModel) else model
    with count_parameters(live, checkpoint) as active:
        scores = _document_scores(model, tokenizer, texts or _few_documents(checkpoint), running, progress)
        active["tokens"] = sum(document.tokens for found in scores.values() for document in found)
    for name, (kind, text) in measured.items():
        bad = sum(not math.isfinite(document.nll + document.divergence) for document in scores[text])
        if bad:
            from espalier.scoring.harness import no_numbers

            raise no_numbers(f"{name} of {bad} of {len(scores[text])} documents are", model.dtype)
        results[name], frame = RESULTS[kind](name, scores[text])
        frames.append(frame)
    document = {
        "format": FORMAT,
        "tasks": {task["task"]: results[task["task"]] for task in tasks},
        "active": active,
        "parameters": _parameters(checkpoint),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    return document, pd.concat(frames, ignore_index=True)


def _measured(tasks: Sequence[Document]) -> dict[str, tuple[str, str]]:
    """Return of each task that is measured on a text what is measured, and the text: domain, window, documents."""
    found = {}
    for task in tasks:
        kind, _, domain = str(task["task"]).partition("_")
        if kind in RESULTS and domain:
            found[str(task["task"])] = kind, f"{domain} {task.get('length')} {task.get('documents')}"
    return found


def _texts(
    measured: Mapping[str, tuple[str, str]], answers: Mapping[str, Path], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Text]:
    """Return the texts that are run, each once, with the original's answers where a divergence is measured."""
    texts: dict[str, Text] = {}
    for name, (kind, key) in measured.items():
        domain, *sizes = key.rsplit(" ", 2)
        length, documents = (None if size == "None" else int(size) for size in sizes)
        text = texts.get(key) or Text(held_out(domain, name)[:documents], length)
        if kind == "kl":
            if name not in answers or text.length is None:
                raise UserError(f"evaluation: task {name!r} needs the original's answers and evaluation.length.")
            ids, _ = padded(cut_documents(tokenizer, text.documents, text.length)[0])
            text = replace(text, answers=Teacher(answers[name], ids))
        texts[key] = text
    return texts


def _load_model(
    directory: Path, checkpoint: Checkpoint, dtype: str, running: Running
) -> PreTrainedModel | StreamedModel:
    if running.streams(checkpoint, dtype):
        return StreamedModel(directory, dtype, running.torch_device())
    model = cast(
        PreTrainedModel,
        runtime.load(directory, dtype, running.torch_device(), experts=running.experts_implementation()),
    )
    with naming_file(checkpoint):
        check_weights(model)
    return model


def _document_scores(
    model: PreTrainedModel | StreamedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, Text],
    running: Running,
    progress: Progress | None,
) -> dict[str, list[DocumentScore]]:
    size = running.score_batch_size
    if isinstance(model, StreamedModel):
        if not texts:
            return {}
        return streamed_scores(
            model,
            tokenizer,
            texts,
            batch_size=size,
            activation_memory=running.activation_memory,
            scratch=running.scratch,
            progress=partial(progress, "texts") if progress else None,
        )
    return {
        name: document_scores(
            model, tokenizer, text, batch_size=size, progress=partial(progress, name) if progress else None
        )
        for name, text in texts.items()
    }


def _few_documents(checkpoint: Checkpoint) -> dict[str, Text]:
    if not is_moe(checkpoint) and "espalier" not in checkpoint.config:
        return {}
    domains = sorted(entry.name for entry in text_directory().iterdir() if entry.is_dir())
    return {domain: Text(held_out(domain, domain)[:ACTIVE_DOCUMENTS]) for domain in domains}


def _parameters(checkpoint: Checkpoint) -> Document:
    """Parameters in the files and, where a plan repeats tensors in several experts, the distinct ones."""
    stored = float(checkpoint.parameters)
    plan = checkpoint.directory / "plan.json"
    counts = read_json(plan, "espalier.plan/1")["counts"] if plan.exists() else {}
    experts = max(checkpoint.expert_counts.values()) if is_moe(checkpoint) else None
    return {"stored": stored, "unique": float(counts.get("unique", stored)), "experts": experts}


def _text_frame(name: str, scores: Sequence[DocumentScore], **measured: list[float]) -> pd.DataFrame:
    """One row a document: what was `measured`, and its tokens and bytes."""
    columns = {"tokens": [s.tokens for s in scores], "bytes": [s.bytes for s in scores]}
    return pd.DataFrame({"task": name, "item": [s.id for s in scores], **measured, **columns})


def _perplexity_result(name: str, scores: Sequence[DocumentScore]) -> tuple[Document, pd.DataFrame]:
    frame = _text_frame(name, scores, nll=[s.nll for s in scores])
    nll, tokens, size = (float(frame[column].sum()) for column in ("nll", "tokens", "bytes"))
    value = math.exp(nll / tokens)
    result = {
        "kind": "perplexity",
        "metric": "perplexity",
        "value": value,
        # The perplexity's own error by the delta method: exp' = exp.
        "stderr": _finite(value * estimate(frame["nll"], frame["tokens"]).error),
        "items": len(frame),
        "tokens": int(tokens),
        "bytes": int(size),
        "bits_per_byte": nll / math.log(2) / size,
    }
    return result, frame


def _divergence_result(name: str, scores: Sequence[DocumentScore]) -> tuple[Document, pd.DataFrame]:
    frame = _text_frame(name, scores, kl=[s.divergence for s in scores])
    found = estimate(frame["kl"], frame["tokens"])
    result = {"kind": "divergence", "metric": "kl", "value": found.value, "stderr": _finite(found.error)}
    return result | {"items": len(frame), "tokens": int(frame["tokens"].sum())}, frame


# What is measured on a text, by the first part of a task's name.
RESULTS = {"perplexity": _perplexity_result, "kl": _divergence_result}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _lm_eval(
    model: PreTrainedModel | StreamedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Document],
    running: Running,
    progress: Progress | None,
) -> Iterator[tuple[str, Document, pd.DataFrame]]:
    from lm_eval import evaluator

    for task in tasks:
        if is_own(task["task"]) and task.get("content") not in (None, task_revision(task["task"])):
            raise UserError(
                f"conf/task/{task['task']}.yaml or its data changed since this run was planned. Run it again."
            )
    with _quiet():
        loaded = {task["task"]: _load(task["task"], task.get("num_fewshot")) for task in tasks}
        leaves = {name: task for found in loaded.values() for name, task in found["tasks"].items()}
        groups = {name: group for found in loaded.values() for name, group in found["groups"].items()}
        chosen: dict[str, range] = {}
        for task in tasks:
            for name in loaded[task["task"]]["tasks"]:
                items = len(leaves[name].eval_docs)
                chosen[name] = range(min(task.get("limit") or items, items))
        lm = _language_model(model, tokenizer, running, partial(progress, "choices") if progress else None)
        # Not `simple_evaluate`: it also runs pip and other programs to describe the machine, which takes seconds.
        found = evaluator.evaluate(
            lm, {"tasks": leaves, "groups": groups}, samples=chosen, bootstrap_iters=0, log_samples=True
        )
    for task in tasks:
        name = task["task"]
        frame = pd.concat([_sample_frame(name, leaf, found["samples"][leaf]) for leaf in loaded[name]["tasks"]])
        yield name, _task_result(name, found["results"].get(name, {}), frame, task.get("metric")), frame


def _language_model(
    model: PreTrainedModel | StreamedModel,
    tokenizer: PreTrainedTokenizerBase,
    running: Running,
    progress: Callable[[int, int], None] | None,
) -> Any:
    if isinstance(model, StreamedModel):
        from espalier.scoring.streamed_harness import StreamedLM

        room = (running.activation_memory, running.scratch)
        return StreamedLM(model, tokenizer, running.score_batch_size, *room, progress=progress)
    from espalier.scoring.harness import SharedContextLM

    return SharedContextLM(model, tokenizer, running.score_batch_size, progress)


def fetch_data(task: str) -> None:
    """Bring the data of a task to this machine's cache, so that it can be scored without a network; UserError."""
    if not _measured([{"task": task}]):
        with _quiet():
            _load(task)


def _load(name: str, shots: int | None = None) -> Document:
    """Load a task or group, with `shots` examples before each item (None: as many as the task's file says, or none).

    lm-eval's own 14,000 task files are indexed only when one of them is asked for.
    """
    from lm_eval.tasks import TaskManager

    own = name in task_names() or is_own(name)
    manager = TaskManager(include_defaults=not own)
    if not own:
        check_indexed(name, manager.all_tasks)
    try:
        loaded: Document = manager.load(task_configs([name]) if own else [name])
    except (ConnectionError, FileNotFoundError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"evaluation: the data of task {name!r} cannot be had ({first}). Go online once.") from None
    for task in loaded["tasks"].values():
        if shots is not None or task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return loaded


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence progress bars of `datasets` and lm-eval, and lm-eval's notes, inside the context."""
    import datasets
    import lm_eval.api.task as lm_task

    logger, bar = logging.getLogger("lm_eval"), lm_task.tqdm
    level, bars = logger.level, not datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    lm_task.tqdm = partial(bar, disable=True)  # the only switch that `build_all_requests` leaves
    try:
        yield
    finally:
        logger.setLevel(level)
        lm_task.tqdm = bar
        if bars:
            datasets.enable_progress_bars()


def _sample_frame(task: str, leaf: str, samples: list[Document]) -> pd.DataFrame:
    """One row an item; metrics of an item that are no plain number (parts of a corpus metric) are left out."""
    first: dict[int, Document] = {}
    for sample in samples:  # several answer filters repeat an item; the first is lm-eval's main one
        first.setdefault(sample["doc_id"], sample)
    rows = []
    for number, sample in sorted(first.items()):
        item = str(sample["doc"].get("id", number)) if leaf in task_names() or is_own(leaf) else str(number)
        values = {name: sample[name] for name in sample["metrics"] if isinstance(sample[name], int | float)}
        rows.append({"task": task, "item": item if leaf == task else f"{leaf}/{item}"} | values)
    return pd.DataFrame(rows)


def _task_result(name: str, found: Document, frame: pd.DataFrame, asked: str | None = None) -> Document:
    """Return a task's result; its metric is the one `asked` for, else the first accuracy, else the first there is.

    UserError for a metric that the task does not have.
    """
    if asked is not None and asked not in frame:
        known = [column for column in frame if column not in ("task", "item")]
        raise UserError(f"evaluation: metrics: task {name!r} has no {asked!r}; {nearest(asked, known)}.")
    accuracy = asked or next((metric for metric in ACCURACIES if metric in frame), None)
    metrics: dict[str, float] = {}
    for key, value in found.items():
        if isinstance(value, int | float) and "," in key and "_stderr" not in key and math.isfinite(value):
            metrics.setdefault(key.partition(",")[0], float(value))  # of several answer filters the first, as of items
    if accuracy is None:
        if not metrics:
            raise UserError(f"evaluation: lm-eval gives no metric for task {name!r}. Leave it out.")
        metric, value = next(iter(metrics.items()))
        return {"kind": "other", "metric": metric, "value": value, "stderr": None, "items": len(frame)} | {
            "metrics": metrics
        }
    frame["correct"] = frame[accuracy].astype(float)
    for metric in {accuracy: None} | dict.fromkeys(ACCURACIES):  # of a group: over all items of its tasks
        if metric in frame:
            metrics[metric] = float(np.mean(frame[metric]))
    return {
        "kind": "choice",
        "metric": accuracy,
        "value": metrics[accuracy],
        "stderr": _finite(estimate(frame["correct"]).error),
        "items": len(frame),
        "metrics": metrics,
    }
