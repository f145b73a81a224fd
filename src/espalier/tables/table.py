"""Turn scores into a table: tidy rows with intervals, one summary line a label, and its files; imports no torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from espalier import conf
from espalier.artefacts.store import Store, atomic_file, read_json, run_record_path, write_json
from espalier.scoring import intervals
from espalier.tables import pairs, renderings
from espalier.tables.beside import Beside
from espalier.tables.budgets import missed
from espalier.tables.measured import (
    Measured,
    accuracy_difference,
    base_of,
    divergence,
    log_perplexity,
    measure,
    measures,
    values,
)
from espalier.tables.passes import passes
from espalier.tables.published import MEAN, Comparison, Row
from espalier.workflow.scale import FULL

FORMAT = "espalier.table/1"
PHASES = ("prefill", "decode")  # that are timed
GEOMETRIC = "perplexity"  # the summary's geometric mean over domains
COLUMNS = (
    "label", "model", "method", "ratio", "seed", "task", "metric", "value", "low", "high", "items", "delta",
    "delta_low", "delta_high", "published", "published_delta", "published_z", "beyond", "stored", "unique", "active",
    "calibration", "plan", "commit", "dirty",
)  # fmt: skip
PAIR_COLUMNS = ("model", "share", "measure", "first", "second", "value", "low", "high", "p", "p_holm", "better")

Document = dict[str, Any]


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
        """Write stem.csv and .parquet (tidy), .pairs.csv, .md, .tex and .html (renderings), and last .json (all)."""
        frames = {".csv": self.tidy, ".pairs.csv": pd.DataFrame(self.document["pairs"], columns=list(PAIR_COLUMNS))}
        texts = {".md": renderings.markdown, ".tex": renderings.latex, ".html": renderings.page}
        paths = [stem.with_name(stem.name + suffix) for suffix in (*frames, ".parquet", *texts, ".json")]
        for frame, path in zip(frames.values(), paths, strict=False):
            with atomic_file(path) as temporary:
                frame.to_csv(temporary, index=False)
        with atomic_file(stem.with_name(f"{stem.name}.parquet")) as temporary:
            self.tidy.to_parquet(temporary, index=False)
        for suffix, render in texts.items():
            with atomic_file(stem.with_name(stem.name + suffix)) as temporary:
                temporary.write_text(render(self.document), encoding="utf-8")
        write_json(paths[-1], self.document)
        return paths


def make_table(config: Document, store: Store) -> Table:
    """Assemble the table of an experiment's rows (the configuration of a table node).

    Rows of one label differ in their seed and become one line. Each row is compared with the first uncompressed one of
    its model that was scored as it was, else the first of its model. UserError when seeds or the uncompressed model
    were scored on other items than the row.
    """
    measured = [measure(row, store) for row in config["rows"]]
    groups: dict[str, list[Measured]] = {}
    for one in measured:
        groups.setdefault(one.row["label"], []).append(one)
    bases = {label: base_of(group[0], measured) for label, group in groups.items()}
    same = config["scale"] == FULL  # models and tasks as published
    beside = _beside(config, measured, bases, same)
    tidy = pd.DataFrame(
        [line for one in measured for line in _tidy(one, bases[one.row["label"]], beside, store)],
        columns=list(COLUMNS),
    ).astype({"seed": "Int64", "items": "Int64", "beyond": "boolean"})
    summary = [_summary(group, bases[label], beside, store) for label, group in groups.items()]
    of_base = {label: base.row["label"] for label, base in bases.items() if base is not None}
    by_label = {line["label"]: line for line in summary}
    models = [_model(id, store) for id in dict.fromkeys(one.row["model"] for one in measured)]
    document = {
        "format": FORMAT,
        "experiment": config["experiment"],
        "command": " ".join(["espalier run", config["experiment"], *config.get("_overrides", [])]),
        "scale": config["scale"],
        "not_reproduction": _why_not(config, measured, models),
        "model": models[0],
        "models": models,
        "baseline": of_base.get(measured[0].row["label"]),
        "baselines": of_base,
        "compare": config["compare"] and config["compare"]["file"],
        "tasks": _tasks(measured),
        "task_order": list(_tasks(measured)),  # the file's objects are sorted by key
        "summary": summary,
        "published": [] if beside is None else beside.document(
            summary, {label: by_label[base] for label, base in of_base.items()}
        ),
        "pairs": pairs.compare(list(groups.values())),
        "tidy": _records(tidy),
        "runs": _runs(measured),
        "passes": passes(config["rows"], store),
        "missed_budgets": missed(config["rows"], store),
    }  # fmt: skip
    return Table(tidy, summary, _finite(document))


def _model(fetch: str, store: Store) -> Document:
    config = store.read_node(fetch)["config"]
    return {"node": fetch, "id": config.get("id"), "revision": config.get("revision")}


def _beside(
    config: Document, measured: Sequence[Measured], bases: Mapping[str, Measured | None], same: bool
) -> Beside | None:
    compare = config["compare"]
    if compare is None:
        return None
    counts = {one.row["model"]: one.counts["experts"] for one in bases.values() if one and one.counts["experts"]}
    experts = int(next(iter(counts.values()))) if len(counts) == 1 else None  # where the file names no baseline
    options = {"table": compare.get("table"), "models": compare.get("models")}
    # An absolute path stays as it is.
    comparison = Comparison(conf.directory() / compare["file"], experts, **options)
    rows: dict[str, Row] = {}
    for one in measured:
        plain = one.row.get("then") is None and not one.row.get("tuning")
        row = Row(one.row["label"], one.row["method"], plain, one.row["published"])
        rows.setdefault(row.label, row)
    return Beside(comparison, list(rows.values()), compare.get("tasks") or {}, same)


def _why_not(config: Document, measured: Sequence[Measured], models: Sequence[Document]) -> list[str]:
    """Say why a table reproduces nothing; no sentence where nothing speaks against it."""
    reasons = []
    if config["scale"] != FULL:
        ours = [str(model["id"]) for model in models]
        written = dict.fromkeys(str(each["model"]) for one in measured for each in one.row["published"])
        others = [id for id in written if id not in ours]
        instead = f"{', '.join(ours)} in place of {', '.join(others)}, and " if others else ""
        reasons.append(
            f"Not a reproduction (scale={config['scale']}): {instead}embedded texts, tasks and small budgets. "
            "Published numbers are shown beside ours and not compared with them."
        )
    limits = {one.limit for one in measured if one.limit}
    if limits and not reasons:
        reasons.append(
            f"Not a reproduction: no more than {max(limits)} items of a task were scored (evaluation.limit, documents)."
        )
    return reasons


def _accuracies(one: Measured) -> list[str]:
    """Metrics of the choice tasks, which the mean accuracy is over."""
    return [one.results[task]["metric"] for task in one.of_kind("choice")]


def _tidy(one: Measured, base: Measured | None, beside: Beside | None, store: Store) -> list[Document]:
    row = {key: one.row[key] for key in ("label", "method", "ratio", "seed", "plan")}
    row |= {"model": store.read_node(one.row["model"])["config"]["id"], "commit": one.commit, "dirty": one.dirty}
    row |= {count: one.counts[count] for count in ("stored", "unique", "active")}
    row["calibration"] = _calibration(one.row["plan"], store)
    lines = []
    for task in one.results:
        for metric, found in measures([one], base, task).items():
            other = {} if beside is None else beside.found(row["label"], task, metric, _accuracies(one), found)
            lines.append(row | {"task": task, "metric": metric} | found | other)
    return lines


def _summary(group: Sequence[Measured], base: Measured | None, beside: Beside | None, store: Store) -> Document:
    first = group[0]
    label = first.row["label"]
    tasks = {}
    for task in first.results:
        metric, found = next(iter(measures(group, base, task).items()))
        other = {} if beside is None else beside.found(label, task, metric, _accuracies(first), found)
        tasks[task] = {"kind": first.results[task]["kind"], "metric": metric} | found | other
    line: Document = {
        "label": label,
        "model": store.read_node(first.row["model"])["config"]["id"],
        "method": first.row["method"],
        "ratio": first.row["ratio"],
        "share": first.row.get("share"),
        "then": first.row.get("then"),
        "seeds": [one.row["seed"] for one in group],
        "plans": [one.row["plan"] for one in group if one.row["plan"]],
        "calibration": _calibration(first.row["plan"], store),
        "plan_seconds": _plan_seconds(group, store),
        "commits": list(dict.fromkeys(one.commit for one in group if one.commit)),
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
    if timed:
        line["timed"] = len(timed)
    if timed and "entered" in line:
        line["cache"] = float(np.mean([found["cache"]["model"] / found["cache"]["original"] for found in timed]))
    return line | _means(group, base, beside)


def _means(group: Sequence[Measured], base: Measured | None, beside: Beside | None) -> Document:
    """Return the geometric mean of the perplexities, the mean divergence and accuracy, with paired differences."""
    line: Document = {}
    texts = group[0].of_kind("perplexity")
    if texts:
        both = [[log_perplexity([one], base, task) for task in texts] for one in group]
        value, low, high = intervals.mean_over_seeds([[own for own, _ in by_task] for by_task in both]).exp()
        line[GEOMETRIC] = {"value": value, "low": low, "high": high, "ratio": None}
        ratios = [[d for _, d in by_task if d is not None] for by_task in both]
        if group[0] is not base and all(len(found) == len(texts) for found in ratios):
            ratio, low, high = intervals.mean_over_seeds(ratios).exp()
            line[GEOMETRIC] |= {"ratio": ratio, "ratio_low": low, "ratio_high": high}
    answered = group[0].of_kind("divergence")
    if answered:
        found = intervals.mean_over_seeds([[divergence([one], task) for task in answered] for one in group])
        low, high = found.interval()
        line["kl"] = {"value": found.value, "low": low, "high": high}
    choices = group[0].of_kind("choice")
    if choices:
        own = [[intervals.estimate(values([one], task, "correct")) for task in choices] for one in group]
        found = intervals.mean_over_seeds(own)
        low, high = found.interval()
        line["accuracy"] = {"value": found.value, "low": low, "high": high, "error": found.error, "delta": None}
        paired = [[accuracy_difference([one], base, task) for task in choices] for one in group]
        complete = [[d for d in by_task if d is not None] for by_task in paired]
        if group[0] is not base and all(len(by_task) == len(choices) for by_task in complete):
            difference = intervals.mean_over_seeds(complete)
            low, high = difference.interval()
            line["accuracy"] |= {"delta": difference.value, "delta_low": low, "delta_high": high}
        if beside is not None:
            label, metrics = group[0].row["label"], _accuracies(group[0])
            line["accuracy"] |= beside.found(label, MEAN, "acc", metrics, line["accuracy"])
    return line


def _calibration(plan: str | None, store: Store) -> str | None:
    """Describe the tokens that a plan's evidence was collected on; None for a plan without evidence."""
    if plan is None:
        return None
    for parent in map(store.read_node, store.read_node(plan)["parents"]):
        if parent["stage"] in ("probe", "fit", "tokens"):
            config = (parent if parent["stage"] == "tokens" else store.parent(parent, "tokens"))["config"]
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
