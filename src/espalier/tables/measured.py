"""What was measured of one row of a table, and the estimates of each task; imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from espalier.artefacts.store import Store, identity, read_json, run_record_path
from espalier.errors import UserError
from espalier.scoring import intervals
from espalier.scoring.intervals import Estimate
from espalier.scoring.samples import load_samples, load_scores

Document = dict[str, Any]
Array = NDArray[Any]


@dataclass
class Measured:
    """One row of the table's configuration with what was measured of it."""

    row: Document
    results: dict[str, Document] = field(default_factory=dict)  # by task
    asked: dict[str, Document] = field(default_factory=dict)  # by task: its settings, such as few-shot examples
    samples: dict[str, pd.DataFrame] = field(default_factory=dict)
    counts: dict[str, float | None] = field(default_factory=dict)
    records: list[Document] = field(default_factory=list)
    speed: Document | None = None
    limit: int | None = None  # items or documents of a task, where not all were scored

    @property
    def dirty(self) -> bool:
        return any(record.get("dirty") for record in self.records)

    @property
    def commit(self) -> str | None:
        return next((record["commit"] for record in self.records if record.get("commit")), None)

    def of_kind(self, kind: str) -> list[str]:
        """Tasks of one kind, in the order of the evaluation."""
        return [task for task, result in self.results.items() if result["kind"] == kind]


def measure(row: Document, store: Store) -> Measured:
    """Read what was measured of a row of a table node's configuration."""
    one = Measured(row)
    documents: dict[Path, Document] = {}
    frames: dict[Path, pd.DataFrame] = {}
    for task, node in row["scores"].items():
        asked = store.read_node(node)
        path = store.path(asked)
        if path not in documents:
            documents[path], frames[path] = load_scores(path), load_samples(path)
        one.results[task] = documents[path]["tasks"][task]
        one.asked[task] = identity(asked["config"])
        frame = frames[path]
        one.samples[task] = frame[frame["task"] == task].set_index("item")
        cut = "limit" if one.results[task]["kind"] in ("choice", "other") else "documents"
        one.limit = asked["config"].get(cut) or one.limit
    # The active parameters of the process that measured them on the most text.
    most = max(documents.values(), key=lambda document: document["active"]["tokens"])
    one.counts = most["parameters"] | {"active": most["active"]["parameters"], "neurons": most["active"].get("neurons")}
    shares = list(most["active"].get("depth", {}).values())
    one.counts["entered"] = float(np.mean(shares)) if shares else None
    if "speed" in row:
        one.speed = read_json(store.path(store.read_node(row["speed"])), "espalier.speed/1")
    artefacts = [*documents, store.path(row["weights"]), *([store.path(row["plan"])] if row["plan"] else [])]
    artefacts += [store.path(store.read_node(row[kind])) for kind in ("speed", "kernels") if kind in row]
    records = [run_record_path(path) for path in artefacts]
    one.records = [read_json(path, "espalier.run/1") for path in records if path.exists()]
    return one


def base_of(one: Measured, measured: Sequence[Measured]) -> Measured | None:
    """Return the uncompressed row that a row is compared with: the first of its model that was scored as it was.

    Where none was (the sweep has other settings for the uncompressed model), the first of its model.
    """
    model = one.row["model"]
    full = [other for other in measured if other.row["model"] == other.row["weights"] == model]
    alike = (other for other in full if other.asked | one.asked == other.asked)
    return next(alike, full[0] if full else None)


def values(group: Sequence[Measured], task: str, column: str) -> Array:
    """Return float [S, n] of a column of the task's samples, items in the first row's order."""
    first = group[0].samples[task]
    rows = []
    for one in group:
        frame = one.samples[task]
        if len(frame) != len(first) or not frame.index.equals(first.index):
            raise UserError(
                f"table: task {task} was scored on {len(frame)} items for {one.row['label']!r} and on {len(first)} "
                f"(or others) for {group[0].row['label']!r}. Score both with one evaluation.limit."
            )
        rows.append(frame[column].to_numpy(dtype=np.float64))
    return np.stack(rows)


def log_perplexity(group: Sequence[Measured], base: Measured | None, task: str) -> tuple[Estimate, Estimate | None]:
    """Return the log-perplexity and its paired difference from `base`; no difference between other tokenisers."""
    nll, tokens = values(group, task, "nll"), values(group[:1], task, "tokens")[0]
    found = intervals.estimate(nll, tokens)
    if base is None or task not in base.samples:
        return found, None
    both = [group[0], base]
    if not np.array_equal(*values(both, task, "tokens")):
        return found, None
    return found, intervals.estimate(nll - values(both, task, "nll")[1], tokens)


def divergence(group: Sequence[Measured], task: str) -> Estimate:
    """Return the divergence from the uncompressed model's predictions, in nats a token."""
    return intervals.estimate(values(group, task, "kl"), values(group[:1], task, "tokens")[0])


def accuracy_difference(
    group: Sequence[Measured], base: Measured | None, task: str, column: str = "correct"
) -> Estimate | None:
    """Return the paired difference of an accuracy from that of `base`, None where it was not scored on the task."""
    if base is None or task not in base.samples:
        return None
    return intervals.estimate(values(group, task, column) - values([group[0], base], task, column)[1])


def measures(group: Sequence[Measured], base: Measured | None, task: str) -> dict[str, Document]:
    """Return what was found of a task by metric, its own metric first.

    Each: value, low, high, items, delta, delta_low, delta_high and `error`, the standard error (of a perplexity that of
    its logarithm).
    """
    result = group[0].results[task]
    blank = dict.fromkeys(("low", "high", "delta", "delta_low", "delta_high", "error")) | {"items": result["items"]}
    if result["kind"] == "perplexity":
        own, difference = log_perplexity(group, base, task)
        value, low, high = own.exp()
        found = blank | {"value": value, "low": low, "high": high, "error": own.error}
        if difference is not None and group[0] is not base:
            found |= dict(zip(("delta", "delta_low", "delta_high"), (x - 1 for x in difference.exp()), strict=True))
        sizes = [one.results[task]["bits_per_byte"] for one in group]
        return {"perplexity": found, "bits_per_byte": blank | {"value": float(np.mean(sizes))}}
    if result["kind"] == "divergence":
        kl = divergence(group, task)
        low, high = kl.interval()
        return {"kl": blank | {"value": kl.value, "low": low, "high": high, "error": kl.error}}
    if result["kind"] == "other":
        mean = [one.results[task]["value"] for one in group]
        return {result["metric"]: blank | {"value": float(np.mean(mean))}}
    found_by_metric = {}
    others = [m for m in result["metrics"] if m != result["metric"] and m in group[0].samples[task]]
    for metric in (result["metric"], *others):
        own_values = values(group, task, metric)
        value, low, high = intervals.accuracy_interval(own_values)
        error = intervals.estimate(own_values).error
        found = blank | {"value": value, "low": low, "high": high, "error": error}
        change = None if group[0] is base else accuracy_difference(group, base, task, metric)
        if change is not None:
            low, high = change.interval()
            found |= {"delta": change.value, "delta_low": low, "delta_high": high}
        found_by_metric[metric] = found
    return found_by_metric
