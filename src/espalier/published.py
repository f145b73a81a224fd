"""Published numbers, to stand beside ours: rows of conf/paper/*.csv matched by method, ratio, task and metric."""

import csv
import re
from dataclasses import dataclass
from pathlib import Path

from espalier.errors import UserError

REQUIRED = ("paper", "task", "value", "source")
BASELINES = ("baseline", "full", "none")


@dataclass(frozen=True)
class Published:
    """One published value; accuracies are fractions, as ours."""

    paper: str
    table: str
    source: str
    value: float


@dataclass(frozen=True)
class Row:
    """What identifies a row of our table for a match."""

    label: str
    method: str
    ratio: float | None
    plain: bool  # no second method on top


class Comparison:
    """The rows of one CSV that speak of `model` (all rows where the file has no column `model`).

    Columns: paper, task, value, source, and either `label` (or `row`), equal to our row's label, or `method` with
    `ratio` or `setting` (`ratio=0.25`, or `experts=6` of the model's `experts`). Optional: table, metric, model.
    Values are percentages unless the metric is a perplexity. UserError when a column is missing.
    """

    def __init__(self, path: Path, model: str | None, experts: int | None) -> None:
        try:
            with path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                columns, rows = list(reader.fieldnames or ()), list(reader)
        except FileNotFoundError:
            raise UserError(f"{path}: no such file. Name a CSV of published numbers in `compare`.") from None
        missing = [name for name in REQUIRED if name not in columns]
        if not {"label", "row", "method"} & set(columns):
            missing.append("label")
        if missing:
            raise UserError(f"{path}: column {missing[0]!r} is missing; found: {', '.join(columns)}.")
        self.path, self.experts = path, experts
        self.rows = [row for row in rows if _same_model(row.get("model"), model)]

    def find(self, row: Row, task: str, metric: str) -> Published | None:
        """Return the published value of a row, task and metric; `mean accuracy` stands for the papers' averages."""
        for found in self.rows:
            if self._same_row(found, row) and _same_task(found, task) and _same_metric(found, metric):
                try:
                    value = float(found["value"])
                except ValueError:
                    raise UserError(f"{self.path}: value {found['value']!r} is not a number.") from None
                percent = 1.0 if metric == "perplexity" else 100.0
                return Published(found["paper"], found.get("table", ""), found["source"], value / percent)
        return None

    def _same_row(self, found: dict[str, str], row: Row) -> bool:
        label = found.get("label") or found.get("row")
        if label:
            return label.strip() == row.label
        method = re.sub(r"[^a-z0-9]+", "_", (found.get("method") or "").lower()).strip("_")
        if method in BASELINES:
            return row.method == "none" and row.plain
        ratio = self._ratio(found)
        same = ratio is not None and row.ratio is not None and abs(ratio - row.ratio) < 1e-6
        return method == row.method and row.plain and same

    def _ratio(self, found: dict[str, str]) -> float | None:
        if found.get("ratio"):
            return float(found["ratio"])
        key, _, value = (found.get("setting") or "").partition("=")
        if key == "ratio":
            return float(value)
        if key == "experts" and self.experts and value.isdigit():
            return 1 - int(value) / self.experts
        return None


def _same_model(found: str | None, model: str | None) -> bool:
    if not found:
        return True
    return model is not None and found.lower().rsplit("/", 1)[-1] == model.lower().rsplit("/", 1)[-1]


def _same_task(found: dict[str, str], task: str) -> bool:
    name = found["task"].strip()
    return name == task or (task == "mean accuracy" and re.fullmatch(r"(avg|average|mean)(_?\d+)?", name) is not None)


def _same_metric(found: dict[str, str], metric: str) -> bool:
    stated = (found.get("metric") or "not_stated").strip()
    return stated == metric or (stated == "not_stated" and metric in ("acc", "acc_mutual_info", "perplexity"))
