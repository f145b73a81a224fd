"""Curves of what was trained: routers, gates and routers of depth (`tune`), masks and routers (`fit`)."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from espalier.figures import style
from espalier.training.curves import Curve

SMOOTH = 40  # parts of a curve over which steps are averaged
NAMES = {"kl": "KL divergence, nats", "lm": "next-token loss, nats", "active": "share that runs or enters"}

Floats = NDArray[np.float64]


@style.styled
def training(curves: Sequence[Curve]) -> Figure | None:
    """Draw each term of the loss, and what was measured on the way, over the tokens; a panel a term, a line a label.

    Faint: every step. Strong: means over a fortieth of the steps. `curves` are of one tuning or fit; those that were
    trained layer by layer are drawn by `layerwise`.
    """
    terms = list(dict.fromkeys(term for curve in curves for term in curve.terms))
    if not terms:
        return None
    figure, grid = style.panels(len(terms), 2.7, below=0.2)
    for axes, term in zip(grid, terms, strict=True):
        drawn = []
        for n, curve in enumerate(curves):
            if term in curve.terms:
                x, y = np.array(curve.places), np.array(curve.terms[term])
                colour, _ = style.shade(n)
                dash = ("-", "--", ":", "-.")[n // len(style.COLOURS) % 4]
                axes.plot(x, y, color=colour, lw=0.6, alpha=0.25)
                axes.plot(*smooth(x, y), color=colour, lw=1.5, ls=dash, label=curve.label)
                drawn.append(y)
        every = np.concatenate(drawn)
        if every.min() > 0 and every.max() > 20 * every.min():
            style.logarithmic(axes.yaxis)
        axes.set_title(NAMES.get(term, term), loc="left")
        axes.set_xlabel(curves[0].unit)
        axes.grid(axis="y")
    handles: dict[str, Any] = {}
    for axes in grid:
        handles |= {name: handle for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    style.legend(figure, list(handles.values()), list(handles))
    return figure


def smooth(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Return means of neighbouring steps, at most SMOOTH of them, at the means of their places."""
    parts = np.array_split(np.arange(len(x)), min(SMOOTH, len(x)))
    return np.array([x[part].mean() for part in parts]), np.array([y[part].mean() for part in parts])


@style.styled
def layerwise(curves: Mapping[str, Mapping[int, Curve]]) -> Figure | None:
    """Draw the loss of routers that were tuned layer by layer, a panel a label, a line a layer; None for none."""
    if not curves:
        return None
    figure, grid = style.panels(len(curves), 2.7)
    for axes, (label, layers) in zip(grid, curves.items(), strict=True):
        for n, (layer, curve) in enumerate(sorted(layers.items())):
            tint = matplotlib.colormaps["viridis"](0.15 + 0.75 * n / max(1, len(layers) - 1))
            x, y = smooth(np.array(curve.places), np.array(curve.terms["loss"]))
            axes.plot(x, y, color=tint, lw=1.4, label=str(layer))
        axes.set_title(style.title(label, 34), loc="left")
        axes.set_xlabel(next(iter(layers.values())).unit)
        axes.grid(axis="y")
    for axes in grid[:: style.ACROSS]:
        axes.set_ylabel("loss")
    handles, names = grid[0].get_legend_handles_labels()
    shown = style.evenly(range(len(names)), 12)
    figure.legend([handles[n] for n in shown], [names[n] for n in shown], title="layer",
                  loc="outside right upper", frameon=False)  # fmt: skip
    return figure
