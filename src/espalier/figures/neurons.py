"""Where the neurons are: what plans for dense models keep, share and leave out, and narrowed experts of others."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from espalier.figures import style
from espalier.figures.experts import grid_axes
from espalier.plans.operations import Narrow
from espalier.plans.plan import Plan
from espalier.plans.split import Split

Document = Mapping[str, Any]
Floats = NDArray[np.float64]
ACROSS = 4
TITLE = 26  # characters
PARTS = (  # of an FFN's neurons, in the order in which they are stacked
    ("run for every token", style.COLOURS[0]),
    ("a token runs some", style.COLOURS[4]),
    ("removed", style.PALE),
)


@style.styled
def neurons(plans: Mapping[str, Sequence[Plan]], active: Mapping[str, Document], width: int) -> Figure | None:
    """Draw by layer the shares of an FFN's `width` neurons that always run, run for some tokens, and are gone.

    A panel a label with the operation `split`; points are what a token ran when it was measured (`active` of scores).
    """
    found = {label: layers for label, chain in plans.items() if (layers := split_of(chain))}
    if not found:
        return None
    across = min(ACROSS, len(found))
    down = -(-len(found) // across)
    high = 1.75 + style.title_inches(found, TITLE)
    figure = style.new_figure(style.WIDTH * across / ACROSS + (0 if across > 1 else 1.5), high * down + 0.4)
    grid = figure.subplots(down, across, squeeze=False, sharey=True)
    for axes, (label, layers) in zip(grid.flat, found.items(), strict=False):
        shares = 100 * np.array([neuron_shares(op, width) for op in layers.values()])  # [layers, 3]
        below = np.zeros(len(layers))
        for n, (name, colour) in enumerate(PARTS):
            axes.bar(range(len(layers)), shares[:, n], bottom=below, color=colour, width=1, label=name)
            below += shares[:, n]
        measured = active.get(label, {}).get("neurons_per_token", {})
        points = [100 * measured[str(layer)] / width if str(layer) in measured else np.nan for layer in layers]
        axes.plot(
            range(len(layers)), points, ls="none", marker="o", ms=3, color=style.COLOURS[1], label="run by a token"
        )
        named = style.evenly(range(len(layers)), 8)
        axes.set_xticks(named, [list(layers)[n] for n in named])
        axes.set_title(style.title(label, TITLE), loc="left")
        axes.set_ylim(0, 100)
    for axes in grid[:, 0]:
        axes.set_ylabel("% of neurons")
    for axes in grid[-1]:
        axes.set_xlabel("layer")
    for axes in grid.flat[len(found) :]:
        axes.set_visible(False)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def split_of(chain: Sequence[Plan]) -> dict[int, Split]:
    """Return the operation `split` of each layer that has one."""
    return {
        layer: op for plan in chain for layer, ops in sorted(plan.layers.items()) for op in ops if isinstance(op, Split)
    }


def neuron_shares(op: Split, width: int) -> tuple[float, float, float]:
    """Return which shares of `width` neurons every token runs, some tokens run, and are removed."""
    always = op.width if op.router == "none" else sum(op.segments[: op.shared])
    return always / width, (op.width - always) / width, 1 - op.width / width


@style.styled
def expert_neurons(plans: Mapping[str, Sequence[Plan]], width: int) -> Figure | None:
    """Draw how many neurons each expert has where experts differ in it, a panel a label, layers down; None for none.

    Experts of dense models are the units of `split`, those of others have lost neurons (`narrow`).
    """
    found: dict[str, tuple[list[int], Floats]] = {}
    for label, chain in plans.items():
        rows = {layer: [op.unit_width(u) for u in range(len(op.units))] for layer, op in split_of(chain).items()}
        rows |= narrowed(chain)
        rows = {layer: row for layer, row in rows.items() if row}
        if rows and any(len(set(row)) > 1 for row in rows.values()):
            matrix = np.full((len(rows), max(map(len, rows.values()))), np.nan)
            for n, row in enumerate(rows.values()):
                matrix[n, : len(row)] = row
            found[label] = (list(rows), 100 * matrix / width)
    if not found:
        return None
    across = min(ACROSS, len(found))
    down = -(-len(found) // across)
    tallest = max(len(layers) for layers, _ in found.values())
    high = min(4.5, 1.2 + 0.12 * tallest) + style.title_inches(found, TITLE)
    figure = style.new_figure(style.WIDTH * across / ACROSS + 0.8, down * high)
    grid = figure.subplots(down, across, squeeze=False)
    images = []
    for axes, (label, (layers, matrix)) in zip(grid.flat, found.items(), strict=False):
        images.append(axes.imshow(matrix, aspect="auto", cmap="YlGnBu", vmin=0, vmax=100, interpolation="nearest"))
        grid_axes(axes, layers, matrix.shape[1], labels=8)
        axes.set_title(style.title(label, TITLE), loc="left")
    for axes in grid.flat[len(found) :]:
        axes.set_visible(False)
    figure.colorbar(images[0], ax=grid, pad=0.015, aspect=30).set_label("% of neurons")
    return figure


def narrowed(chain: Sequence[Plan]) -> dict[int, list[int]]:
    """Return by layer how many neurons each expert keeps where `narrow` removed some."""
    return {
        layer: (plan.tensors[op.neurons].read() >= 0).sum(axis=1).tolist()
        for plan in chain
        for layer, ops in sorted(plan.layers.items())
        for op in ops
        if isinstance(op, Narrow) and op.neurons in plan.tensors
    }
