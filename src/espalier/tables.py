"""Turn scores into a table: tidy rows with intervals, one summary line a label, and its files; imports no torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from espalier import conf, intervals, markup
from espalier.errors import UserError
from espalier.intervals import Estimate
from espalier.passes import passes
from espalier.published import Comparison, Row
from espalier.samples import load_samples, load_scores
from espalier.store import Store, atomic_file, read_json, run_record_path, write_json

FORMAT = "espalier.table/1"
MEAN = "mean accuracy"
PHASES = ("prefill", "decode")  # that are timed
GEOMETRIC = "perplexity"  # the summary's geometric mean over domains
COLUMNS = (
    "label", "method", "ratio", "seed", "task", "metric", "value", "low", "high", "items", "delta", "delta_low",
    "delta_high", "published", "published_delta", "plan", "commit", "dirty",
)  # fmt: skip

Document = dict[str, Any]
Array = NDArray[Any]


@dataclass(frozen=True)
class Table:
    """`tidy` has one row a seed, task and metric, `summary` one line a label; `document` is the JSON of both.

    Values of accuracies are fractions. `delta` is the paired difference from the uncompressed model on the same
    items: of accuracies absolute, of perplexities relative (0.1: a tenth higher). `low`, `high`: 95 %.
    """

    tidy: pd.DataFrame
    summary: list[Document]
    document: Document

    def write(self, stem: Path) -> list[Path]:
        """Write stem.csv and stem.parquet (tidy), stem.md, stem.tex (summary), and last stem.json (both)."""
        paths = {suffix: stem.with_name(stem.name + suffix) for suffix in (".csv", ".parquet", ".md", ".tex", ".json")}
        with atomic_file(paths[".csv"]) as temporary:
            self.tidy.to_csv(temporary, index=False)
        with atomic_file(paths[".parquet"]) as temporary:
            self.tidy.to_parquet(temporary, index=False)
        for suffix, text in ((".md", markup.markdown(self.document)), (".tex", markup.latex(self.document))):
            with atomic_file(paths[suffix]) as temporary:
                temporary.write_text(text)
        write_json(paths[".json"], self.document)
        return list(paths.values())


@dataclass
class Measured:
    """One row of the table's configuration with what was measured of it."""

    row: Document
    results: dict[str, Document] = field(default_factory=dict)  # by task
    samples: dict[str, pd.DataFrame] = field(default_factory=dict)
    counts: dict[str, float | None] = field(default_factory=dict)
    records: list[Document] = field(default_factory=list)
    speed: Document | None = None

    @property
    def dirty(self) -> bool:
        return any(record.get("dirty") for record in self.records)

    @property
    def commit(self) -> str | None:
        return next((record["commit"] for record in self.records if record.get("commit")), None)


def make_table(config: Document, store: Store) -> Table:
    """Assemble the table of an experiment's rows (the configuration of a table node).

    Rows of one label differ in their seed and become one line. UserError when seeds or the uncompressed model
    were scored on other items than the row.
    """
    measured = [_measure(row, store) for row in config["rows"]]
    base = None if config["baseline"] is None else measured[config["baseline"]]
    groups: dict[str, list[Measured]] = {}
    for one in measured:
        groups.setdefault(one.row["label"], []).append(one)
    model = _model(config["rows"][0]["weights"], store)
    experts = None if base is None else base.counts["experts"]
    comparison = _comparison(config.get("compare"), model["id"], None if experts is None else int(experts))
    tidy = pd.DataFrame(
        [line for one in measured for line in _tidy(one, base, comparison)], columns=list(COLUMNS)
    ).astype({"seed": "Int64", "items": "Int64"})
    summary = [_summary(group, base, comparison, store) for group in groups.values()]
    document = {
        "format": FORMAT,
        "experiment": config["experiment"],
        "model": model,
        "baseline": None if base is None else base.row["label"],
        "compare": _compare_name(config.get("compare")),
        "tasks": _tasks(measured),
        "task_order": list(_tasks(measured)),  # the file's objects are sorted by key
        "summary": summary,
        "tidy": _records(tidy),
        "runs": _runs(measured),
        "passes": passes(config["rows"], store),
    }
    return Table(tidy, summary, _finite(document))


def _measure(row: Document, store: Store) -> Measured:
    one = Measured(row)
    documents: dict[Path, Document] = {}
    frames: dict[Path, pd.DataFrame] = {}
    for task, node in row["scores"].items():
        path = store.path(node)
        if path not in documents:
            documents[path], frames[path] = load_scores(path), load_samples(path)
        one.results[task] = documents[path]["tasks"][task]
        frame = frames[path]
        one.samples[task] = frame[frame["task"] == task].set_index("item")
    # The active parameters of the process that measured them on the most text.
    most = max(documents.values(), key=lambda document: document["active"]["tokens"])
    one.counts = most["parameters"] | {"active": most["active"]["parameters"], "neurons": most["active"].get("neurons")}
    shares = list(most["active"].get("depth", {}).values())
    one.counts["entered"] = float(np.mean(shares)) if shares else None
    if "speed" in row:
        one.speed = read_json(store.path(store.read_node(row["speed"])), "espalier.speed/1")
    artefacts = [*documents, store.path(row["weights"]), *([store.path(row["plan"])] if row["plan"] else [])]
    records = [run_record_path(path) for path in artefacts]
    one.records = [read_json(path, "espalier.run/1") for path in records if path.exists()]
    return one


def _model(weights: str, store: Store) -> Document:
    """Identify the model that the first row's weights come from."""
    node = store.read_node(weights)
    node = store.origin(node)
    return {"id": node["config"].get("id"), "revision": node["config"].get("revision")}


def _compare_name(compare: Document | str | None) -> str | None:
    return compare["file"] if isinstance(compare, dict) else compare


def _comparison(compare: Document | str | None, model: str | None, experts: int | None) -> Comparison | None:
    name = _compare_name(compare)
    if name is None:
        return None
    return Comparison(conf.directory() / name, model, experts)  # an absolute path stays as it is


def _values(group: Sequence[Measured], task: str, column: str) -> Array:
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


def _log_perplexity(group: Sequence[Measured], base: Measured | None, task: str) -> tuple[Estimate, Estimate | None]:
    """Return the log-perplexity and its paired difference from `base`; no difference between other tokenisers."""
    nll, tokens = _values(group, task, "nll"), _values(group[:1], task, "tokens")[0]
    found = intervals.estimate(nll, tokens)
    if base is None or task not in base.samples:
        return found, None
    both = [group[0], base]
    if not np.array_equal(*_values(both, task, "tokens")):
        return found, None
    return found, intervals.estimate(nll - _values(both, task, "nll")[1], tokens)


def _divergence(group: Sequence[Measured], task: str) -> Estimate:
    return intervals.estimate(_values(group, task, "kl"), _values(group[:1], task, "tokens")[0])


def _accuracy_difference(
    group: Sequence[Measured], base: Measured | None, task: str, column: str = "correct"
) -> Estimate | None:
    if base is None or task not in base.samples:
        return None
    return intervals.estimate(_values(group, task, column) - _values([group[0], base], task, column)[1])


def _measures(group: Sequence[Measured], base: Measured | None, task: str) -> dict[str, Document]:
    """Return {metric: value, low, high, items, delta, delta_low, delta_high} of a task, its own metric first."""
    result = group[0].results[task]
    blank = dict.fromkeys(("low", "high", "delta", "delta_low", "delta_high")) | {"items": result["items"]}
    if result["kind"] == "perplexity":
        own, difference = _log_perplexity(group, base, task)
        value, low, high = own.exp()
        found = blank | {"value": value, "low": low, "high": high}
        if difference is not None and group[0] is not base:
            found |= dict(zip(("delta", "delta_low", "delta_high"), (x - 1 for x in difference.exp()), strict=True))
        sizes = [one.results[task]["bits_per_byte"] for one in group]
        return {"perplexity": found, "bits_per_byte": blank | {"value": float(np.mean(sizes))}}
    if result["kind"] == "divergence":
        kl = _divergence(group, task)
        low, high = kl.interval()
        return {"kl": blank | {"value": kl.value, "low": low, "high": high}}
    if result["kind"] == "other":
        values = [one.results[task]["value"] for one in group]
        return {result["metric"]: blank | {"value": float(np.mean(values))}}
    found_by_metric = {}
    others = [m for m in result["metrics"] if m != result["metric"] and m in group[0].samples[task]]
    for metric in (result["metric"], *others):
        value, low, high = intervals.accuracy_interval(_values(group, task, metric))
        found = blank | {"value": value, "low": low, "high": high}
        difference = None if group[0] is base else _accuracy_difference(group, base, task, metric)
        if difference is not None:
            low, high = difference.interval()
            found |= {"delta": difference.value, "delta_low": low, "delta_high": high}
        found_by_metric[metric] = found
    return found_by_metric


def _tidy(one: Measured, base: Measured | None, comparison: Comparison | None) -> list[Document]:
    row = {key: one.row[key] for key in ("label", "method", "ratio", "seed", "plan")}
    lines = []
    for task in one.results:
        for metric, found in _measures([one], base, task).items():
            line = row | {"task": task, "metric": metric, "commit": one.commit, "dirty": one.dirty} | found
            lines.append(line | _beside(one, comparison, task, metric, found["value"]))
    return lines


def _beside(one: Measured, comparison: Comparison | None, task: str, metric: str, value: float) -> Document:
    if comparison is None:
        return {}
    ratio = one.row["ratio"]
    row = Row(one.row["label"], one.row["method"], ratio, one.row.get("then") is None and not one.row.get("tuning"))
    found = comparison.find(row, task, metric)
    if found is None:
        return {}
    source = " ".join(part for part in (found.paper, found.table, f"({found.source})") if part)
    return {"published": found.value, "published_delta": value - found.value, "published_source": source}


def _summary(group: Sequence[Measured], base: Measured | None, comparison: Comparison | None, store: Store) -> Document:
    first = group[0]
    tasks = {}
    for task in first.results:
        metric, found = next(iter(_measures(group, base, task).items()))
        kind = first.results[task]["kind"]
        tasks[task] = (
            {"kind": kind, "metric": metric} | found | _beside(first, comparison, task, metric, found["value"])
        )
    line: Document = {
        "label": first.row["label"],
        "method": first.row["method"],
        "ratio": first.row["ratio"],
        "then": first.row.get("then"),
        "seeds": [one.row["seed"] for one in group],
        "plans": [one.row["plan"] for one in group if one.row["plan"]],
        "calibration": _calibration(first.row["plan"], store),
        "plan_seconds": _plan_seconds(group, store),
        "commit": first.commit,
        "dirty": any(one.dirty for one in group),
        "tasks": tasks,
    }
    for count in ("stored", "unique", "active"):
        line[count] = float(np.mean([one.counts[count] or 0 for one in group]))
    if base is not None and first.counts["neurons"] and base.counts["neurons"]:
        line["ffn"] = float(np.mean([one.counts["neurons"] or 0 for one in group])) / base.counts["neurons"]
    if first.counts["entered"] is not None:
        line["entered"] = float(np.mean([one.counts["entered"] or 0 for one in group]))
    timed = [one.speed for one in group if one.speed is not None]
    for phase in PHASES if timed else ():
        value, low, high = intervals.mean_ratio([found[phase]["ratios"] for found in timed])
        ideal = float(np.mean([found[phase]["ideal"] for found in timed]))
        line[phase] = {"value": value, "low": low, "high": high, "ideal": ideal}
    if timed and "entered" in line:
        line["cache"] = float(np.mean([found["cache"]["model"] / found["cache"]["original"] for found in timed]))
    return line | _means(group, base, comparison)


def _means(group: Sequence[Measured], base: Measured | None, comparison: Comparison | None) -> Document:
    """Return the geometric mean of the perplexities, the mean divergence and accuracy, with paired differences."""
    kinds = {task: result["kind"] for task, result in group[0].results.items()}
    line: Document = {}
    texts = [task for task, kind in kinds.items() if kind == "perplexity"]
    if texts:
        both = [[_log_perplexity([one], base, task) for task in texts] for one in group]
        value, low, high = intervals.mean_over_seeds([[own for own, _ in by_task] for by_task in both]).exp()
        line[GEOMETRIC] = {"value": value, "low": low, "high": high, "ratio": None}
        ratios = [[d for _, d in by_task if d is not None] for by_task in both]
        if group[0] is not base and all(len(found) == len(texts) for found in ratios):
            ratio, low, high = intervals.mean_over_seeds(ratios).exp()
            line[GEOMETRIC] |= {"ratio": ratio, "ratio_low": low, "ratio_high": high}
    answered = [task for task, kind in kinds.items() if kind == "divergence"]
    if answered:
        kl = [[_divergence([one], task) for task in answered] for one in group]
        found = intervals.mean_over_seeds(kl)
        low, high = found.interval()
        line["kl"] = {"value": found.value, "low": low, "high": high}
    choices = [task for task, kind in kinds.items() if kind == "choice"]
    if choices:
        own = [[intervals.estimate(_values([one], task, "correct")) for task in choices] for one in group]
        found = intervals.mean_over_seeds(own)
        low, high = found.interval()
        line["accuracy"] = {"value": found.value, "low": low, "high": high, "delta": None}
        paired = [[_accuracy_difference([one], base, task) for task in choices] for one in group]
        complete = [[d for d in by_task if d is not None] for by_task in paired]
        if group[0] is not base and all(len(by_task) == len(choices) for by_task in complete):
            difference = intervals.mean_over_seeds(complete)
            low, high = difference.interval()
            line["accuracy"] |= {"delta": difference.value, "delta_low": low, "delta_high": high}
        line["accuracy"] |= _beside(group[0], comparison, MEAN, "acc", line["accuracy"]["value"])
    return line


def _calibration(plan: str | None, store: Store) -> str | None:
    """Describe the tokens that a plan's evidence was collected on; None for a plan without evidence."""
    if plan is None:
        return None
    for parent in map(store.read_node, store.read_node(plan)["parents"]):
        if parent["stage"] in ("probe", "fit"):
            config = store.parent(parent, "tokens")["config"]
            keys = ("domains", "samples", "length", "seed", "content", "revision")
            facts = [f"{key} {_short(config[key])}" for key in keys if config.get(key) is not None]
            return f"{config.get('name', 'calibration')} ({', '.join(facts)})"
    return None


def _plan_seconds(group: Sequence[Measured], store: Store) -> float | None:
    """Mean time that making the last plan of a row took, statistics apart; None without a plan."""
    records = [run_record_path(store.path(one.row["plan"])) for one in group if one.row["plan"]]
    seconds = [read_json(path, "espalier.run/1")["seconds"] for path in records if path.exists()]
    return float(np.mean(seconds)) if seconds else None


def _short(value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text[:19] + "..." if text.startswith("sha256:") else text


def _tasks(measured: Sequence[Measured]) -> Document:
    tasks: Document = {}
    for one in measured:
        for task, result in one.results.items():
            tasks.setdefault(task, {key: result[key] for key in ("kind", "metric", "items")})
    return tasks


def _runs(measured: Sequence[Measured]) -> list[Document]:
    """Return what made the table: the distinct combinations of commit, versions, device and settings."""
    found: list[Document] = []
    for one in measured:
        for record in one.records:
            facts = {key: record.get(key) for key in ("commit", "dirty", "versions", "device", "runtime")}
            if facts not in found:
                found.append(facts)
    return found


def _finite(value: Any) -> Any:
    """Return `value` with null for infinite and unknown numbers (an interval from one item), which JSON lacks."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _records(tidy: pd.DataFrame) -> list[Document]:
    return [
        {str(key): None if pd.isna(value) else value for key, value in record.items()}
        for record in tidy.astype(object).to_dict("records")
    ]


def load_table(path: Path) -> Mapping[str, Any]:
    """Return the table document at `path`."""
    return read_json(path, FORMAT)
