"""Score a checkpoint: lm-eval tasks, perplexities and the parameters that a token uses, in one process."""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from espalier import runtime
from espalier.checkpoint import Checkpoint
from espalier.collect import check_weights, naming_file
from espalier.embedded.assets import text_directory
from espalier.embedded.documents import read_jsonl
from espalier.embedded.tasks import task_configs, task_names
from espalier.errors import UserError, nearest
from espalier.families import names as family_names
from espalier.ffn_count import count_neurons
from espalier.intervals import estimate
from espalier.perplexity import DocumentScore, document_scores, streamed_scores
from espalier.progress import Progress
from espalier.running import Running
from espalier.samples import FORMAT
from espalier.samples import load_samples as load_samples
from espalier.samples import load_scores as load_scores
from espalier.samples import save_scores as save_scores
from espalier.store import read_json
from espalier.stream import StreamedModel

PREFIX = "perplexity_"
# Accuracies in the order in which one becomes a task's metric: our own tasks correct each choice's score by its
# score without the question (PMI; Holtzman et al., arXiv 2104.08315), the papers' zero-shot tables report `acc`.
ACCURACIES = ("acc_mutual_info", "acc", "acc_norm")
ACTIVE_DOCUMENTS = 8  # a domain, to measure active parameters when no perplexity is asked for
FEWSHOT_SEED = 1234  # lm-eval's default

Document = dict[str, Any]
Documents = Sequence[tuple[str, str]]  # id, text


def score(
    directory: Path,
    tasks: Sequence[Document],
    running: Running,
    *,
    dtype: str = "auto",
    progress: Progress | None = None,
) -> tuple[Document, pd.DataFrame]:
    """Score the model in `directory` and return (document, samples).

    tasks: {"task": name, "limit": items or None, "length": tokens a window or None}; a name is that of an
    embedded task, `perplexity_DOMAIN` of an embedded text (`limit` does not apply: all its documents), or any
    lm-eval task or group. A model that does not fit is run layer by layer, all choices in one pass over its weights
    and all perplexities in another.

    samples: one row an item, columns `task`, `item`, for choices `correct` (the task's metric) and each of `acc`,
    `acc_norm`, `acc_mutual_info` that the task has, for perplexities `nll` (nats), `tokens`, `bytes`.

    UserError for an unknown task, data that cannot be had, or a task that generates text with a streamed model.
    """
    checkpoint = Checkpoint(directory)
    if _is_moe(checkpoint):
        checkpoint.shape()  # config.json and tensors that disagree are told before the model is loaded
    texts = {task["task"]: _documents(task["task"]) for task in tasks if task["task"].startswith(PREFIX)}
    lengths = {task["task"]: task.get("length") for task in tasks}
    model = _load_model(directory, checkpoint, dtype, running)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    results: dict[str, Document] = {}
    frames: list[pd.DataFrame] = []
    others = [task for task in tasks if task["task"] not in texts]
    if others:
        for name, result, frame in _lm_eval(model, tokenizer, others, running, progress):
            results[name] = result
            frames.append(frame)
    with _counted(model, checkpoint) as active:
        corpora = {name: (found, lengths.get(name)) for name, found in (texts or _few_documents(checkpoint)).items()}
        for name, found in _document_scores(model, tokenizer, corpora, running, progress).items():
            active["tokens"] += sum(document.tokens for document in found)
            if name in texts:
                results[name], frame = _perplexity_result(name, found)
                frames.append(frame)
    document = {
        "format": FORMAT,
        "tasks": {task["task"]: results[task["task"]] for task in tasks},
        "active": active,
        "parameters": _parameters(checkpoint),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    return document, pd.concat(frames, ignore_index=True)


def _load_model(
    directory: Path, checkpoint: Checkpoint, dtype: str, running: Running
) -> PreTrainedModel | StreamedModel:
    if running.streams(checkpoint, dtype):
        return StreamedModel(directory, dtype, running.torch_device())
    model = cast(PreTrainedModel, runtime.load(directory, dtype, running.torch_device()))
    with naming_file(checkpoint):
        check_weights(model)
    return model


def _document_scores(
    model: PreTrainedModel | StreamedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpora: Mapping[str, tuple[Documents, int | None]],
    running: Running,
    progress: Progress | None,
) -> dict[str, list[DocumentScore]]:
    size = running.score_batch_size
    if isinstance(model, StreamedModel):
        if not corpora:
            return {}
        return streamed_scores(
            model,
            tokenizer,
            corpora,
            batch_size=size,
            activation_memory=running.activation_memory,
            scratch=running.scratch,
            progress=partial(progress, "perplexity") if progress else None,
        )
    return {
        name: document_scores(
            model,
            tokenizer,
            documents,
            length=length,
            batch_size=size,
            progress=partial(progress, name) if progress else None,
        )
        for name, (documents, length) in corpora.items()
    }


def _documents(task: str) -> list[tuple[str, str]]:
    domain = task.removeprefix(PREFIX)
    path = text_directory() / domain / "validation.jsonl"
    if not path.exists():
        domains = sorted(entry.name for entry in text_directory().iterdir() if entry.is_dir())
        raise UserError(f"evaluation: task {task!r} is unknown; {nearest(task, [PREFIX + name for name in domains])}.")
    return [(row["id"], row["text"]) for row in read_jsonl(path)]


def _few_documents(checkpoint: Checkpoint) -> dict[str, list[tuple[str, str]]]:
    if not _is_moe(checkpoint) and "espalier" not in checkpoint.config:
        return {}
    domains = sorted(entry.name for entry in text_directory().iterdir() if entry.is_dir())
    return {PREFIX + domain: _documents(PREFIX + domain)[:ACTIVE_DOCUMENTS] for domain in domains}


def _is_moe(checkpoint: Checkpoint) -> bool:
    return checkpoint.config.get("model_type") in family_names()


@contextlib.contextmanager
def _counted(model: PreTrainedModel | StreamedModel, checkpoint: Checkpoint) -> Iterator[Document]:
    """Count the experts that tokens run inside the context; the yielded document is filled when it ends.

    `parameters` are those that a token uses on average: all but the routed experts, and the distinct experts
    that it runs in each layer. A dense model uses all of its parameters.
    """
    active: Document = {"tokens": 0, "experts_per_token": {}}
    live = model.model if isinstance(model, StreamedModel) else model
    if not _is_moe(checkpoint):
        with _counted_neurons(live, checkpoint, active):
            yield active
        return
    with runtime.count_active(live, checkpoint.family) as counter:
        yield active
    means = counter.means()
    one_expert = checkpoint.shape().expert_parameters
    active["experts_per_token"] = {str(layer): value for layer, value in sorted(means.items())}
    active["parameters"] = checkpoint.always_active_parameters + math.fsum(means.values()) * one_expert


@contextlib.contextmanager
def _counted_neurons(model: Any, checkpoint: Checkpoint, active: Document) -> Iterator[None]:
    """Fill `active` for a dense model: all parameters, but for neurons of split FFNs that tokens do not run."""
    active["parameters"] = float(checkpoint.parameters)
    split = checkpoint.config.get("espalier", {}).get("layers")
    if not checkpoint.is_dense or split is None:
        yield
        return
    with count_neurons(model, checkpoint.dense_family) as counter:
        yield
    shape, means = checkpoint.dense_shape(), counter.means()
    active["neurons_per_token"] = {str(layer): value for layer, value in sorted(means.items())}
    stored = {int(layer): sum(settings["segments"]) for layer, settings in split.items()}
    for layer, settings in split.items():
        router = settings["router"]
        if router["kind"] == "oracle":  # what it would run if it knew
            widths = [sum(settings["segments"][s] for s in unit) for unit in settings["units"]]
            always = sum(settings["segments"][: settings["shared"]])
            means[int(layer)] = always + router["k"] * (1 if router["level"] == "neurons" else np.mean(widths))
    idle = math.fsum(stored[layer] - value for layer, value in means.items())
    active["parameters"] -= idle * shape.neuron_parameters
    whole = shape.width * len(shape.layers)
    active["ffn"] = (whole - math.fsum(shape.width - stored[layer] for layer in stored) - idle) / whole


def _parameters(checkpoint: Checkpoint) -> Document:
    """Parameters in the files and, where a plan repeats tensors in several experts, the distinct ones."""
    stored = float(checkpoint.parameters)
    plan = checkpoint.directory / "plan.json"
    counts = read_json(plan, "espalier.plan/1")["counts"] if plan.exists() else {}
    experts = max(checkpoint.expert_counts.values()) if _is_moe(checkpoint) else None
    return {"stored": stored, "unique": float(counts.get("unique", stored)), "experts": experts}


def _perplexity_result(name: str, scores: Sequence[DocumentScore]) -> tuple[Document, pd.DataFrame]:
    frame = pd.DataFrame(
        {
            "task": name,
            "item": [s.id for s in scores],
            "nll": [s.nll for s in scores],
            "tokens": [s.tokens for s in scores],
            "bytes": [s.bytes for s in scores],
        }
    )
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

    with _quiet():
        loaded = {task["task"]: _load(task["task"]) for task in tasks}
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
        yield name, _task_result(name, found["results"].get(name, {}), frame), frame


def _language_model(
    model: PreTrainedModel | StreamedModel,
    tokenizer: PreTrainedTokenizerBase,
    running: Running,
    progress: Callable[[int, int], None] | None,
) -> Any:
    if isinstance(model, StreamedModel):
        from espalier.streamed_harness import StreamedLM

        room = (running.activation_memory, running.scratch)
        return StreamedLM(model, tokenizer, running.score_batch_size, *room, progress=progress)
    from espalier.harness import SharedContextLM

    return SharedContextLM(model, tokenizer, running.score_batch_size, progress)


def _load(name: str) -> Document:
    """Load a task or group; lm-eval's own 14,000 task files are indexed only when one of them is asked for."""
    from lm_eval.tasks import TaskManager

    own = name in task_names()
    manager = TaskManager(include_defaults=not own)
    if not own and name not in manager.all_tasks:
        known = [*task_names(), *manager.all_tasks]
        hint = nearest(name, known).split("known:")[0].strip() or "`lm_eval ls tasks` prints the names."
        raise UserError(f"evaluation: task {name!r} is neither embedded nor lm-eval's; {hint}")
    try:
        loaded: Document = manager.load(task_configs([name]) if own else [name])
    except (ConnectionError, FileNotFoundError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"evaluation: the data of task {name!r} cannot be had ({first}). Go online once.") from None
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
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
        item = str(sample["doc"].get("id", number)) if leaf in task_names() else str(number)
        values = {name: sample[name] for name in sample["metrics"] if isinstance(sample[name], int | float)}
        rows.append({"task": task, "item": item if leaf == task else f"{leaf}/{item}"} | values)
    return pd.DataFrame(rows)


def _task_result(name: str, found: Document, frame: pd.DataFrame) -> Document:
    accuracy = next((metric for metric in ACCURACIES if metric in frame), None)
    metrics = {
        key.partition(",")[0]: float(value)
        for key, value in found.items()
        if isinstance(value, int | float) and "," in key and "_stderr" not in key and math.isfinite(value)
    }
    if accuracy is None:
        if not metrics:
            raise UserError(f"evaluation: lm-eval gives no metric for task {name!r}. Leave it out.")
        metric, value = next(iter(metrics.items()))
        return {"kind": "other", "metric": metric, "value": value, "stderr": None, "items": len(frame)} | {
            "metrics": metrics
        }
    frame["correct"] = frame[accuracy].astype(float)
    for metric in ACCURACIES:  # of a group: over all items of its tasks
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
