"""The roofline figure of kernel benchmarks."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from espalier.figures import style

COLUMNS = 3
ROUTING = "trace"  # drawn where there is one, else the first

Document = Mapping[str, Any]


@style.styled
def roofline(documents: Mapping[str, Document]) -> Figure:
    """Draw FLOPs a second against FLOPs a byte, a panel a row of the table, a line an implementation.

    The grey line is what the machine can do at most; warm caches where there are two.
    """
    rows = -(-len(documents) // COLUMNS)
    figure = style.new_figure(min(len(documents), COLUMNS) * 3.6, 3.2 * rows + 0.5)
    axes = figure.subplots(rows, min(len(documents), COLUMNS), squeeze=False, sharex=True, sharey=True)
    for panel, (label, document) in zip(axes.flat, documents.items(), strict=False):
        _panel(panel, label, document)
    for panel in axes.flat[len(documents) :]:
        panel.set_visible(False)
    handles: dict[str, Any] = {}
    for panel in axes.flat:
        handles |= {name: handle for handle, name in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, frameon=False)
    return figure


def _panel(axes: Any, label: str, document: Document) -> None:
    machine, measured = document["machine"], document["measured"]
    caches = [row["cache"] for row in measured]
    cache = "warm" if "warm" in caches else caches[0]
    routings = list(dict.fromkeys(row["routing"] for row in measured))
    routing = ROUTING if ROUTING in routings else routings[0]
    shown = [row for row in measured if row["cache"] == cache and row["routing"] == routing]
    intensity = np.array([row["flops"] / row["bytes"] for row in shown if row["bytes"]])
    span = np.geomspace(intensity.min() / 1.5, intensity.max() * 1.5, 100)
    roof = np.minimum(machine["flops"], span * machine["bandwidth"])
    axes.plot(span, roof / 1e9, color=style.INK, alpha=0.4, linewidth=1.5, label="at most")
    for number, name in enumerate(dict.fromkeys(row["implementation"] for row in measured)):
        own = [row for row in shown if row["implementation"] == name]
        points = sorted((row["flops"] / row["bytes"], row["flops"] / row["seconds"]) for row in own)
        if points:
            x, y = np.array(points).T
            colour, marker = style.shade(number)
            axes.plot(x, y / 1e9, color=colour, marker=marker, markersize=4, linewidth=1, label=name)
    style.logarithmic(axes.xaxis)
    style.logarithmic(axes.yaxis)
    axes.grid(True)
    axes.tick_params(labelbottom=True)  # also where the panel below is empty
    axes.set_title(style.title(label, 40))
    axes.set_xlabel(f"FLOPs a byte ({routing}, {cache})")
    axes.set_ylabel("GFLOP/s")
