"""Published numbers, to stand beside ours: the lines of conf/paper/*.csv, and which of our rows each is; no torch."""

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from espalier.errors import UserError

REQUIRED = ("paper", "task", "value", "source")
BASELINES = ("baseline", "full", "none")
MEAN = "mean accuracy"
ALIKE = {"em": "exact_match"}  # metrics of papers under lm-eval's name
# Metrics in percent; others (perplexity, speedup, seconds, ...) stand as they are.
PERCENT = ("acc", "acc_norm", "acc_mutual_info", "exact_match", "em", "mixed", "score", "percent", "not_stated", "")
AVERAGE = re.compile(r"(avg|average|mean)(_?(\d+))?")

Reference = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """One published value: `printed` as in the file, `value` a fraction where the metric is in percent."""

    task: str
    metric: str
    value: float
    printed: str


@dataclass
class Line:
    """What one table prints of one method at one setting."""

    paper: str
    table: str
    model: str
    method: str
    setting: str
    calibration: str
    split: bool  # whether only its calibration tells it from another line
    sources: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)

    @property
    def is_baseline(self) -> bool:
        return _plain(self.method) in BASELINES

    @property
    def source(self) -> str:
        """Paper, table and where the numbers were read."""
        return " ".join(part for part in (self.paper, self.table, f"({', '.join(self.sources)})") if part)


@dataclass(frozen=True)
class Row:
    """What identifies a row of our table: its label, method, whether nothing stands on top, and what it is in papers.

    A reference has the model's id and the ratio, and perhaps the paper's `method`, `setting` and `calibration`.
    """

    label: str
    method: str
    plain: bool
    references: Sequence[Reference]


class Comparison:
    """The lines of one CSV, of the tables that are compared; columns as in conf/paper/README.md.

    Of the columns only paper, task, value, source and one of `label`, `row` and `method` are needed. `label` (or `row`)
    is our row's label, else a line is found by the model, the method and what is left: `experts=6` of as many as the
    file's baseline of the model has (else `experts`), `ratio=0.25`, or `active=75%`. models: our ids by published
    names. UserError for a missing column or a value that is no number.
    """

    def __init__(
        self,
        path: Path,
        experts: int | None = None,
        *,
        table: str | Sequence[str] | None = None,
        models: Mapping[str, str] | None = None,
    ) -> None:
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
        self.path, self.models, self._experts = path, dict(models or {}), experts
        self._counts = _expert_counts(rows)
        tables = [table] if isinstance(table, str) else list(table or ())
        for name in tables:
            if name not in {row.get("table") for row in rows}:
                known = sorted({row.get("table") or "" for row in rows})
                raise UserError(f"{path}: no table {name!r}; it has {', '.join(known)}.")
        self.lines = self._gather([row for row in rows if not tables or row.get("table") in tables])

    def _gather(self, rows: Sequence[dict[str, str]]) -> list[Line]:
        """Gather values into lines; those of one method and setting are one line unless calibrations repeat a task."""
        keys = ("paper", "table", "model", "method", "setting", "label", "row")
        by_task: dict[tuple[Any, ...], set[str]] = {}
        for row in rows:
            cell = (*(row.get(name) or "" for name in keys), row["task"], row.get("metric"))
            by_task.setdefault(cell, set()).add(row.get("calibration") or "")
        several = {cell[: len(keys)] for cell, calibrations in by_task.items() if len(calibrations) > 1}
        lines: dict[tuple[Any, ...], Line] = {}
        for row in rows:
            key = tuple(str(row.get(name) or "") for name in keys)
            calibration = row.get("calibration") or ""
            own = (*key, calibration) if key in several else key
            if own not in lines:
                paper, table, model, method, setting, *labels = key
                method = next(filter(None, labels), method).strip()
                lines[own] = Line(paper, table, model, method, setting, calibration, key in several)
            line = lines[own]
            if calibration and calibration not in line.calibration.split("; "):
                line.calibration = "; ".join(filter(None, (line.calibration, calibration)))
            for value, seen in ((row["source"], line.sources), (row.get("note") or "", line.notes)):
                if value and value not in seen:
                    seen.append(value)
            line.cells.append(self._cell(row))
        return list(lines.values())

    def _cell(self, row: dict[str, str]) -> Cell:
        metric, printed = (row.get("metric") or "").strip(), row["value"].strip()
        try:
            value = float(printed)
        except ValueError:
            raise UserError(f"{self.path}: value {printed!r} is not a number.") from None
        return Cell(row["task"].strip(), metric, value / 100 if metric in PERCENT else value, printed)

    def of_models(self, ids: Sequence[str]) -> list[Line]:
        """The lines that speak of one of the models, all where the file names none."""
        return [line for line in self.lines if any(self.same_model(line.model, id) for id in ids)]

    def same_model(self, printed: str, id: str) -> bool:
        """Whether a published model's name means the model `id`."""
        if not printed:
            return True
        known = self.models.get(printed, printed)
        return known.lower().rsplit("/", 1)[-1] == id.lower().rsplit("/", 1)[-1]

    def match(self, row: Row) -> list[Line]:
        """Return the lines that print our row.

        UserError where a line's calibration has to be named to tell it from another.
        """
        found = [line for line in self.lines if any(self._same(line, row, one) for one in row.references)]
        unclear = [line for line in found if line.split and not any("calibration" in one for one in row.references)]
        if unclear:
            raise UserError(
                f"{self.path}: {row.label!r} is printed for several calibrations, such as {unclear[0].calibration!r}. "
                "Give paper.calibration in the sweep."
            )
        return found

    def _same(self, line: Line, row: Row, reference: Reference) -> bool:
        if not self.same_model(line.model, reference["model"]):
            return False
        if "calibration" in reference and reference["calibration"] != line.calibration:
            return False
        if line.is_baseline:
            return row.method == "none" and row.plain and self._left(line, reference, 0.0)
        if "method" in reference:
            return reference["method"] == line.method and self._left(line, reference, reference.get("ratio") or 0.0)
        if row.label == line.method and not line.setting:
            return True
        same = _plain(line.method) == row.method and row.plain and bool(line.setting)
        return same and self._left(line, reference, reference.get("ratio") or 0.0)

    def _left(self, line: Line, reference: Reference, ratio: float) -> bool:
        """Whether a line's setting is the one that is named, or else one that says no more than how much is left."""
        if "setting" in reference:
            return bool(reference["setting"] == line.setting)
        removed = [self._removed(part, line.model) for part in line.setting.split(";") if part]
        return all(one is not None and (one < 0 or abs(one - ratio) < 1e-6) for one in removed)

    def _removed(self, part: str, model: str) -> float | None:
        """Return the fraction removed that a part of a setting says, -1 if it says none, None if something else."""
        key, _, value = part.partition("=")
        if part == "not stated" or (key == "active" and not value.endswith("%")):
            return -1.0
        if key == "active":
            return 1 - float(value.removesuffix("%")) / 100
        if key == "ratio":
            return float(value)
        experts = self._counts.get(model, self._experts)
        if key == "experts" and experts and value.isdigit():
            return 1 - int(value) / experts
        return None


def comparable(cell: Cell, task: str, metric: str, accuracies: Sequence[str], tasks: Mapping[str, str]) -> bool:
    """Whether a published value is of our `task` and `metric`, so that they may be subtracted.

    `mean accuracy` stands for averages over as many tasks as ours, whose metrics are `accuracies`; `mixed` is one over
    acc and acc_norm. A metric that is not stated is none. tasks: our names by published ones.
    """
    average = AVERAGE.fullmatch(cell.task)
    if task == MEAN:
        if average is None or average[3] is None or int(average[3]) != len(accuracies):
            return False
        kinds = set(accuracies)
        return kinds == ({"acc", "acc_norm"} if cell.metric == "mixed" else {ALIKE.get(cell.metric, cell.metric)})
    return tasks.get(cell.task, cell.task) == task and ALIKE.get(cell.metric, cell.metric) == metric


def _expert_counts(rows: Sequence[dict[str, str]]) -> dict[str, int]:
    """Experts of each model's MoE block: those of its baseline, by the model's published name."""
    counts: dict[str, int] = {}
    for row in rows:
        found = re.search(r"(?:^|;)experts=(\d+)", row.get("setting") or "")
        if found and _plain(row.get("method") or "") in BASELINES:
            name = row.get("model") or ""
            counts[name] = max(counts.get(name, 0), int(found[1]))
    return counts


def _plain(method: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", method.lower()).strip("_")
