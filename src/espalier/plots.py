"""Figures of a report: quality against parameters, expert usage, experts kept or merged, cluster trees."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray

from espalier.operations import Keep, Merge
from espalier.plan import Plan
from espalier.shape import ModelShape
from espalier.stats import Stats
from espalier.store import atomic_file

# Okabe and Ito's colours, which readers with any colour vision tell apart; yellow is left out on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vPX"
INK, PALE = "#1f2328", "#e6e8eb"
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.edgecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": PALE,
    "text.color": INK,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "espalier",  # equal figures are equal files
}
WIDTH = 10.5  # inches
NUMBERED = 32  # experts a layer, up to which groups carry their number
LEGEND_ROWS, LEGEND_COLUMNS = 16, 6  # of methods beside the panels; below them
TREES = 12  # layers, up to which every tree is drawn

Document = Mapping[str, Any]


def svg(figure: Figure) -> str:
    """Return the figure as an <svg> element."""
    text = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": "Espalier"})
    document = text.getvalue()
    return document[document.index("<svg") :]


def save(element: str, path: Path) -> None:
    """Write an <svg> element as an SVG file."""
    with atomic_file(path) as temporary:
        temporary.write_text('<?xml version="1.0" encoding="utf-8"?>\n' + element, encoding="utf-8")


def _figure(width: float, height: float) -> Figure:
    with matplotlib.rc_context(STYLE):
        return Figure(figsize=(width, height))


def _styled(draw: Callable[..., Figure | None]) -> Callable[..., Figure | None]:
    def styled(*arguments: Any) -> Figure | None:
        with matplotlib.rc_context(STYLE):
            return draw(*arguments)

    styled.__doc__ = draw.__doc__
    return styled


@_styled
def quality(summary: Sequence[Document], baseline: str | None) -> Figure | None:
    """Draw perplexity and accuracy against parameters, a line a method; None when neither was measured.

    Unique ones, which fewer experts lower; of a dense model those that a token uses, which is what its methods change.
    """
    panels = [key for key in ("perplexity", "accuracy") if any(key in line for line in summary)]
    if not panels:
        return None
    figure = _figure(4.4 * len(panels) + 1.6, 3.9)
    families: dict[str, list[Document]] = {}
    for line in summary:
        if line["label"] != baseline:
            name = line["method"] + (f" + {line['then']}" if line.get("then") else "")
            families.setdefault(name.removeprefix("none + "), []).append(line)
    full = next((line for line in summary if line["label"] == baseline), None)
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, key in zip(all_axes, panels, strict=True):
        _quality_panel(axes, key, families, full)
    handles, labels = all_axes[0].get_legend_handles_labels()
    # What stands beside the panels is cut where it is higher than they are: many names go below, in columns.
    if len(labels) > LEGEND_ROWS:
        figure.set_figheight(figure.get_figheight() + 0.2 * math.ceil(len(labels) / LEGEND_COLUMNS))
        figure.legend(handles, labels, loc="outside lower center", ncols=LEGEND_COLUMNS, frameon=False)
    else:
        figure.legend(handles, labels, loc="outside right upper", frameon=False)
    return figure


def _quality_panel(axes: Any, key: str, families: Mapping[str, list[Document]], full: Document | None) -> None:
    drawn = [line for lines in families.values() for line in lines] + ([full] if full else [])
    count = "active" if any("ffn" in line or "entered" in line for line in drawn) else "unique"
    counts = [line[count] / 1e6 for line in drawn]
    width = max(counts) - min(counts) or 0.1 * max(counts)
    step = 0.08 * width / max(1, len(families))
    values = []
    for n, (name, lines) in enumerate(families.items()):
        shift = (n - (len(families) - 1) / 2) * step  # methods remove equally much: side by side, not on each other
        points = sorted((line for line in lines if key in line), key=lambda line: line[count])
        x = [line[count] / 1e6 + shift for line in points]
        triples = [_paired(line, full, key) for line in points]
        y = np.array([value for value, _, _ in triples])
        errors = np.abs(np.array([[value - low, high - value] for value, low, high in triples])).T
        values += [bound for triple in triples for bound in triple]
        colour, marker = COLOURS[n % len(COLOURS)], MARKERS[n // len(COLOURS) + n % len(MARKERS) - len(MARKERS)]
        axes.errorbar(x, y, errors, color=colour, marker=marker, ms=5, lw=1, capsize=2, elinewidth=1, label=name)
    if full and key in full:
        value = _scaled(full[key]["value"], key)
        axes.axhline(value, color="#6b7280", lw=1, ls="--")
        axes.plot([full[count] / 1e6], [value], marker="*", ms=11, color=INK, ls="none", label="uncompressed")
        values.append(value)
    if key == "perplexity" and max(values) > 3 * min(values):
        axes.set_yscale("log")
        ticks = _log_ticks(min(values), max(values))
        axes.set_yticks(ticks, [f"{t:g}" for t in ticks], minor=False)
        axes.minorticks_off()
    axes.set_xlabel(f"{count} parameters, millions")
    titles = {
        "perplexity": "Perplexity, geometric mean (lower is better)",
        "accuracy": "Accuracy, mean, % (higher is better)",
    }
    axes.set_title(titles[key], loc="left")
    axes.grid(axis="y")


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    ticks = [factor * 10.0**decade for decade in decades for factor in (1, 2, 3, 5, 7)]
    within = [tick for tick in ticks if 0.9 * low <= tick <= 1.1 * high]
    return within if high < 1000 * low else [10.0**decade for decade in decades if low <= 10.0**decade <= high]


def _scaled(value: float, key: str) -> float:
    return 100 * value if key == "accuracy" else value


def _paired(line: Document, full: Document | None, key: str) -> tuple[float, float, float]:
    """Value and interval: of the paired comparison with the full model where there is one."""
    found = line[key]
    value = found["value"]
    low, high = found["low"], found["high"]
    if full and key in full and found.get("ratio_low") is not None:
        low, high = (full[key]["value"] * found[f"ratio_{end}"] for end in ("low", "high"))
    elif full and key in full and found.get("delta_low") is not None:
        low, high = (full[key]["value"] + found[f"delta_{end}"] for end in ("low", "high"))
    low, high = (value if end is None else end for end in (low, high))
    return _scaled(value, key), _scaled(low, key), _scaled(high, key)


@_styled
def usage(stats: Sequence[Stats]) -> Figure | None:
    """Draw each expert's share of the tokens' choices, layers down, experts across; None without that probe."""
    maps = []
    for one in stats:
        if isinstance(one.shape, ModelShape) and "usage" in one.probes:
            counts = np.array([arrays["counts"] for _, arrays in one.layers("usage")], dtype=float)  # [layers, E]
            maps.append((one, counts / counts.sum(axis=1, keepdims=True)))
    if not maps:
        return None
    experts, layers = maps[0][1].shape[1], len(maps[0][0].shape.layers)
    figure = _figure(min(WIDTH, 2.5 + 0.4 * experts), len(maps) * min(8.0, 1.3 + 0.28 * layers))
    for axes, (one, share) in zip(figure.subplots(len(maps), 1, squeeze=False)[:, 0], maps, strict=True):
        image = axes.imshow(100 * share, aspect="auto", cmap="YlGnBu", vmin=0, interpolation="nearest")
        _expert_axes(axes, one.shape.layers, share.shape[1], labels=16)
        even = 100 / share.shape[1]
        bar = figure.colorbar(image, ax=axes, pad=0.015)
        bar.set_label("share of choices, %")
        bar.ax.axhline(even, color=COLOURS[1], lw=2)
        axes.set_title(f"{one.tokens:,} calibration tokens; an even share is {even:.3g} %", loc="left")
    return figure


def _expert_axes(axes: Any, layers: Sequence[int], experts: int, labels: int) -> None:
    every = math.ceil(experts / labels)
    axes.set_xticks(range(0, experts, every))
    down = math.ceil(len(layers) / 16)
    axes.set_yticks(range(0, len(layers), down), [layers[n] for n in range(0, len(layers), down)])
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.tick_params(length=0, labelsize=8)
    for spine in axes.spines.values():
        spine.set_visible(False)


@_styled
def decisions(plans: Mapping[str, Plan], source_experts: int) -> Figure | None:
    """Draw which of `source_experts` each plan keeps and merges, a panel a label; None when no plan does either."""
    found = {label: made for label, plan in plans.items() if (made := decision_matrix(plan, source_experts))}
    if not found:
        return None
    experts = max(matrix.shape[1] for _, matrix in found.values())
    layers = max(len(rows) for rows, _ in found.values())
    across = 3 if experts <= 20 else 2 if experts <= 40 else 1
    down = math.ceil(len(found) / across)
    figure = _figure(WIDTH, down * min(8.0, 1.0 + 0.24 * layers))
    grid = figure.subplots(down, across, squeeze=False)
    tints = ListedColormap([PALE, COLOURS[0], *matplotlib.colormaps["Set3"].colors])  # type: ignore[attr-defined]
    for axes, (label, (rows, matrix)) in zip(grid.flat, found.items(), strict=False):
        shown = np.where(matrix > 0, 2 + (matrix - 1) % 12, np.where(matrix == 0, 1, 0))
        axes.imshow(shown, aspect="auto", cmap=tints, vmin=-0.5, vmax=13.5, interpolation="nearest")
        axes.set_xticks(np.arange(0.5, matrix.shape[1] - 1), minor=True)
        axes.set_yticks(np.arange(0.5, len(rows) - 1), minor=True)
        _expert_axes(axes, rows, matrix.shape[1], labels=24 // across)
        axes.tick_params(which="minor", length=0)
        if matrix.shape[1] <= NUMBERED:
            axes.grid(which="minor", color="white", lw=1)
            for (y, x), group in np.ndenumerate(matrix):
                if group > 0:
                    axes.text(x, y, str(group), ha="center", va="center", fontsize=6.5)
        axes.set_title(label, loc="left")
    for axes in grid.flat[len(found) :]:
        axes.set_visible(False)
    return figure


def decision_matrix(plan: Plan, experts: int) -> tuple[list[int], NDArray[np.int64]] | None:
    """Return (layers, int [layers, E]): -1 removed, 0 kept as it is, g >= 1 merged with the others of group g.

    None when the plan neither keeps nor merges.
    """
    removing = {
        layer: next((op for op in operations if isinstance(op, Keep | Merge)), None)
        for layer, operations in sorted(plan.layers.items())
    }
    chosen = {layer: op for layer, op in removing.items() if op is not None}
    if not chosen:
        return None
    matrix = np.full((len(chosen), experts), -1, dtype=np.int64)
    for row, op in enumerate(chosen.values()):  # [E] of one layer
        if isinstance(op, Keep):
            matrix[row, list(op.experts)] = 0
        else:
            number = 0
            for group in op.groups:
                number += len(group) > 1
                matrix[row, list(group)] = number if len(group) > 1 else 0
    return list(chosen), matrix


@_styled
def trees(plan: Plan) -> Figure | None:
    """Draw the cluster tree of each layer (at most 12, evenly spaced) and the cut; None without linkage evidence."""
    from scipy.cluster.hierarchy import dendrogram

    layers = [layer for layer, evidence in sorted(plan.evidence.items()) if "linkage" in evidence]
    if not layers:
        return None
    layers = [
        layers[n] for n in np.unique(np.linspace(0, len(layers) - 1, min(TREES, len(layers))).round().astype(int))
    ]
    across = 2 if len(layers) > 1 else 1
    down = math.ceil(len(layers) / across)
    figure = _figure(WIDTH, 2.1 * down)
    grid = figure.subplots(down, across, squeeze=False)
    for axes, layer in zip(grid.flat, layers, strict=False):
        merges = np.array(plan.evidence[layer]["linkage"], dtype=float)  # [E - 1, 4]
        experts = len(merges) + 1
        # A layer that keeps all of its experts (budget=global, knapsack) has no merge.
        merge = next((op for op in plan.layers.get(layer, ()) if isinstance(op, Merge)), None)
        groups = experts if merge is None else len(merge.groups)
        below = experts - groups  # merges that were done
        heights = np.maximum.accumulate(merges[:, 2])
        cut = (heights[below - 1] + heights[below]) / 2 if 0 < below < len(heights) else None
        tree = merges.copy()
        tree[:, 2] = heights
        dendrogram(
            tree, ax=axes, color_threshold=0 if cut is None else cut, above_threshold_color="#9aa1a9",
            leaf_font_size=7, no_labels=experts > NUMBERED,
        )  # fmt: skip
        for collection in axes.collections[:-1]:
            collection.set_color(COLOURS[0])
        if cut is not None:
            axes.axhline(cut, color=COLOURS[1], lw=1, ls="--")
        axes.set_title(f"layer {layer}: {experts} experts, {groups} groups", loc="left")
        axes.spines["bottom"].set_visible(False)
        axes.set_ylabel("distance")
    for axes in grid.flat[len(layers) :]:
        axes.set_visible(False)
    return figure
