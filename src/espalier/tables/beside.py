"""Our lines beside those that a paper prints: differences in standard errors, and what only the paper has; no torch."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from espalier.tables.published import AVERAGE, MEAN, Cell, Comparison, Line, Row, comparable

Document = dict[str, Any]
BEYOND = 2.0  # standard errors of ours, from which a difference is marked

# What a published column may be of a summary line, by the name that `compare.tasks` gives it.
COUNTS = ("active", "ffn", "decode")


class Beside:
    """The published lines of a table's models, each found by the row of ours that it prints.

    tasks: our names by published ones, of tasks or `COUNTS`. same: whether ours are the paper's models and tasks;
    else nothing is subtracted.
    """

    def __init__(self, comparison: Comparison, rows: Sequence[Row], tasks: Mapping[str, str], same: bool) -> None:
        self.tasks, self.same = dict(tasks), same
        ids = list(dict.fromkeys(str(reference["model"]) for row in rows for reference in row.references))
        self.lines = comparison.of_models(ids)
        self._labels: dict[int, str] = {}
        self._of: dict[str, list[Line]] = {}
        for row in rows:
            self._of[row.label] = comparison.match(row)
            self._labels |= {id(line): row.label for line in self._of[row.label]}

    def cell(self, label: str, task: str, metric: str, accuracies: Sequence[str]) -> tuple[Line, Cell] | None:
        """Return what is printed of our `task` and `metric` for a row, if anything; `accuracies` as in `comparable`."""
        for line in self._of.get(label, ()):
            for cell in line.cells:
                if comparable(cell, task, metric, accuracies, self.tasks):
                    return line, cell
        return None

    def found(self, label: str, task: str, metric: str, accuracies: Sequence[str], ours: Document) -> Document:
        """Return the published value of a measured one, the difference, and by how many standard errors they differ."""
        printed = self.cell(label, task, metric, accuracies) if self.same else None
        if printed is None:
            return {}
        line, cell = printed
        away = errors_away(ours["value"], ours.get("error"), cell.value, metric == "perplexity")
        document = {"published": cell.value, "published_delta": ours["value"] - cell.value, "published_z": away}
        return document | {"beyond": away is not None and abs(away) > BEYOND, "published_source": line.source}

    def document(self, summary: Sequence[Document], bases: Mapping[str, Document]) -> list[Document]:
        """Return the published lines in the order of ours, then those that only the paper has.

        Each: `label` of our line or None, paper, table, model, method, setting, calibration, source, notes, and cells:
        task, metric, printed, and where ours may be subtracted `ours` with value, low, high, delta, z and beyond.
        bases: the uncompressed model's line by our labels.
        """
        by_label = {line["label"]: line for line in summary}
        order = {label: number for number, label in enumerate(by_label)}
        printed = sorted(self.lines, key=lambda line: order.get(self._labels.get(id(line), ""), len(order)))
        return [self._line(line, by_label.get(self._labels.get(id(line), "")), bases) for line in printed]

    def _line(self, line: Line, ours: Document | None, bases: Mapping[str, Document]) -> Document:
        cells = []
        for cell in line.cells:
            own = None if ours is None or not self.same else self._ours(cell, ours, bases.get(ours["label"]))
            cells.append({"task": cell.task, "metric": cell.metric, "printed": cell.printed, "ours": own})
        keys = ("paper", "table", "model", "method", "setting", "calibration", "source", "notes")
        label = None if ours is None else ours["label"]
        return {"label": label} | {key: getattr(line, key) for key in keys} | {"cells": cells}

    def _ours(self, cell: Cell, line: Document, base: Document | None) -> Document | None:
        accuracies = [found["metric"] for found in line["tasks"].values() if found["kind"] == "choice"]
        name = self.tasks.get(cell.task, cell.task)
        if name in COUNTS:
            return _counted(cell, name, line, base)
        if AVERAGE.fullmatch(cell.task):
            task, metric, found = MEAN, "acc", line.get("accuracy")
        else:
            task, found = name, line["tasks"].get(name)
            metric = found["metric"] if found else ""
        if found is None or not comparable(cell, task, metric, accuracies, self.tasks):
            return None
        away = errors_away(found["value"], found.get("error"), cell.value, metric == "perplexity")
        own = {key: found.get(key) for key in ("value", "low", "high")} | {
            "delta": found["value"] - cell.value,
            "z": away,
        }
        return own | {"beyond": away is not None and abs(away) > BEYOND, "percent": metric != "perplexity"}


def _counted(cell: Cell, name: str, line: Document, base: Document | None) -> Document | None:
    """What a line says of a published share of parameters or speed: no interval, no mark."""
    if name == "active" and base is not None:
        value: float | None = line["active"] / base["stored"]
    elif name == "decode" and "decode" in line:
        value = 1 / line["decode"]["value"]
    else:
        value = line.get("ffn") if name == "ffn" else None
    if value is None:
        return None
    own = {"value": value, "low": None, "high": None, "delta": value - cell.value, "z": None, "beyond": False}
    return own | {"percent": name != "decode"}


def errors_away(ours: float, error: float | None, published: float, logarithm: bool) -> float | None:
    """Return by how many of our standard errors ours is above the published value; None without an error.

    logarithm: `error` is that of the logarithm, as of perplexities.
    """
    if error is None or not math.isfinite(error) or error == 0:
        return None
    return (math.log(ours / published) if logarithm else ours - published) / error
