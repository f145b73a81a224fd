"""Quality against parameters, unique and active, with the Pareto front."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from espalier.figures import style

Document = Mapping[str, Any]
Families = Mapping[str, Sequence[Document]]

# What is drawn, if it was measured: its title and whether less of it is better.
MEASURES = {
    "perplexity": ("Perplexity, geometric mean (lower is better)", True),
    "kl": ("Divergence from the uncompressed model, nats a token (lower is better)", True),
    "accuracy": ("Accuracy, mean, % (higher is better)", False),
}
COUNTS = ("unique", "active")
SPREAD = 0.08  # of the width of a panel, over which methods that leave equally many are put side by side


@style.styled
def quality(summary: Sequence[Document], baselines: Mapping[str, str]) -> Figure | None:
    """Draw each measure against unique and against active parameters, a line a method; None when none was measured.

    `baselines`: by label that of the uncompressed model, a star with a dashed line. The grey staircase is the Pareto
    front: of the lines on it no other is both smaller and better.
    """
    by_label = {str(line["label"]): line for line in summary}
    bases = {label: by_label[base] for label, base in baselines.items() if base in by_label}
    full = [line for label, line in by_label.items() if bases.get(label) is line]
    families: dict[str, list[Document]] = {}
    for label, line in by_label.items():
        if bases.get(label) is not line:
            families.setdefault(family_of(label), []).append(line)
    measures = [key for key in MEASURES if _drawn(key, families, full)]
    if not measures:
        return None
    figure = style.new_figure(style.WIDTH, 3.3 * len(measures))
    grid = figure.subplots(len(measures), len(COUNTS), squeeze=False, sharey="row")
    for row, key in zip(grid, measures, strict=True):
        for axes, count in zip(row, COUNTS, strict=True):
            _panel(axes, key, count, families, full, bases)
        row[0].set_title(MEASURES[key][0], loc="left")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    style.legend(figure, handles, labels)
    return figure


def family_of(label: str) -> str:
    """Return the name that lines share which differ in a ratio or another number of one method."""
    return re.sub(r" \d+(\.\d+)? %| [\w.@]+=-?\d[\d.e+-]*(?= |$)", "", label)


def pareto(points: Sequence[tuple[float, float]], lower: bool) -> list[int]:
    """Return which (parameters, value) are on the front, by falling parameters; of equal points the first.

    A point is on it when none has fewer parameters and a value at least as good, or as many and a better one. `lower`:
    whether lower values are better.
    """
    sign = 1 if lower else -1
    order = sorted(range(len(points)), key=lambda n: (points[n][0], sign * points[n][1], n))
    front, best = [], math.inf
    for n in order:
        if sign * points[n][1] < best:
            best = sign * points[n][1]
            front.append(n)
    return front[::-1]


def _drawn(key: str, families: Families, full: Sequence[Document]) -> list[Document]:
    """Return the lines that a panel has something of: from itself the uncompressed model diverges by rounding only."""
    lines = [line for own in families.values() for line in own]
    return [line for line in (*lines, *(full if key != "kl" else ())) if key in line]


def _panel(
    axes: Any, key: str, count: str, families: Families, full: Sequence[Document], bases: Mapping[str, Document]
) -> None:
    lower = MEASURES[key][1]
    drawn = _drawn(key, families, full)
    counts = [line[count] / 1e6 for line in drawn]
    step = SPREAD * (max(counts) - min(counts) or 0.1 * max(counts)) / max(1, len(families))
    places: list[tuple[float, float]] = []  # on the page
    points: list[tuple[float, float]] = []  # what they stand for
    bounds: list[float] = []
    for n, (name, lines) in enumerate(families.items()):
        shift = (n - (len(families) - 1) / 2) * step  # methods remove equally much: side by side, not on each other
        own = sorted((line for line in lines if key in line), key=lambda line: float(line[count]))
        if not own:
            continue
        triples = [_paired(line, bases.get(str(line["label"])), key) for line in own]
        x, y = [line[count] / 1e6 + shift for line in own], [value for value, _, _ in triples]
        errors = np.abs(np.array([[value - low, high - value] for value, low, high in triples])).T
        colour, marker = style.shade(n)
        axes.errorbar(x, y, errors, color=colour, marker=marker, ms=5, lw=0.8, capsize=2, elinewidth=0.8, label=name)
        places += zip(x, y, strict=True)
        points += [(float(line[count]), value) for line, value in zip(own, y, strict=True)]
        bounds += [bound for triple in triples for bound in triple]
    stars = [line for line in full if any(line is one for one in drawn)]
    for line in stars:
        value = _scaled(line[key]["value"], key)
        axes.axhline(value, color=style.MUTED, lw=1, ls="--")
        places.append((line[count] / 1e6, value))
        points.append((float(line[count]), value))
        bounds.append(value)
    if stars:
        at = places[-len(stars) :]
        axes.plot(*zip(*at, strict=True), marker="*", ms=11, color=style.INK, ls="none", label="uncompressed", zorder=3)
    front = [places[n] for n in pareto(points, lower)]
    axes.step(
        *zip(*front, strict=True), where="pre", color=style.MUTED, lw=5, alpha=0.3, zorder=0, label="Pareto front"
    )
    if lower and min(bounds) > 0 and max(bounds) > 3 * min(bounds):
        style.logarithmic(axes.yaxis)
    axes.set_xlabel(f"{count} parameters, millions")
    axes.grid(axis="y")


def _scaled(value: float, key: str) -> float:
    return 100 * value if key == "accuracy" else value


def _paired(line: Document, full: Document | None, key: str) -> tuple[float, float, float]:
    """Value and interval: of the paired comparison with its uncompressed model `full` where there is one."""
    found = line[key]
    value = found["value"]
    low, high = found["low"], found["high"]
    if full and key in full and found.get("ratio_low") is not None:
        low, high = (full[key]["value"] * found[f"ratio_{end}"] for end in ("low", "high"))
    elif full and key in full and found.get("delta_low") is not None:
        low, high = (full[key]["value"] + found[f"delta_{end}"] for end in ("low", "high"))
    low, high = (value if end is None else end for end in (low, high))
    return _scaled(value, key), _scaled(low, key), _scaled(high, key)
