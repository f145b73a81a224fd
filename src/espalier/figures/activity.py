"""What a token runs, layer by layer: experts under skipping rules, layers under rules of depth."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from espalier.figures import style
from espalier.figures.experts import bare
from espalier.plans.depth import Depth
from espalier.plans.operations import Skip
from espalier.plans.plan import Plan

Document = Mapping[str, Any]
Floats = NDArray[np.float64]
NUMBERED = 40  # layers, up to which a cell says its value
SIGNS = {"attention": "a", "ffn": "f"}  # of what of a layer is skipped; nothing for all of it


@style.styled
def experts_run(active: Mapping[str, Document], plans: Mapping[str, Sequence[Plan]]) -> Figure | None:
    """Draw the mean number of experts that a token runs, a row a label with a rule of skipping, a column a layer.

    `active` are the measured `active` of scores by label. None where no label has such a rule.
    """
    rows = {
        label: {int(layer): float(value) for layer, value in active[label]["experts_per_token"].items()}
        for label, chain in plans.items()
        if label in active and any(isinstance(op, Skip) for plan in chain for ops in plan.layers.values() for op in ops)
    }
    return _map(rows, "experts a token runs", "YlGnBu", None, "{:.2f}") if any(rows.values()) else None


@style.styled
def experts_run_shares(shares: Mapping[str, Mapping[int, Floats]]) -> Figure | None:
    """Draw by layer what share of the calibration tokens runs one expert, two, ...; a panel a label.

    `shares` by label and layer: [K], the shares of the tokens that run 1 .. K experts.
    """
    if not shares:
        return None
    across = min(3, len(shares))
    down = -(-len(shares) // across)
    figure = style.new_figure(style.WIDTH * across / 3 + 0.8, 2.5 * down)
    grid = figure.subplots(down, across, squeeze=False, sharey=True)
    number = max(len(share) for layers in shares.values() for share in layers.values())
    tints = _tints(number)
    for axes, (label, layers) in zip(grid.flat, shares.items(), strict=False):
        below = np.zeros(len(layers))
        stacked = np.array(list(layers.values()))  # [layers, K]
        for k in range(stacked.shape[1]):
            places = np.arange(len(layers))
            axes.bar(places, 100 * stacked[:, k], bottom=100 * below, color=tints[k], width=0.85, label=str(k + 1))
            below += stacked[:, k]
        named = style.evenly(range(len(layers)), 12)
        axes.set_xticks(named, [list(layers)[n] for n in named])
        axes.set_xlabel("layer")
        axes.set_ylabel("% of tokens")
        axes.set_title(style.title(label, 36), loc="left")
    for axes in grid.flat[len(shares) :]:
        axes.set_visible(False)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, title="experts", loc="outside right upper", frameon=False)
    return figure


def _tints(number: int) -> list[Any]:
    import matplotlib

    return [matplotlib.colormaps["YlGnBu"](0.25 + 0.7 * k / max(1, number - 1)) for k in range(number)]


@style.styled
def tokens_entering(active: Mapping[str, Document], plans: Mapping[str, Sequence[Plan]]) -> Figure | None:
    """Draw the share of the tokens that enter each layer, a row a label whose layers tokens may skip.

    A layer that is gone counts 0. `a` and `f` mark those of which only attention or the FFN is skipped; None where no
    label routes layers.
    """
    rows: dict[str, dict[int, float]] = {}
    signs: dict[tuple[str, int], str] = {}
    for label, chain in plans.items():
        routed = {
            layer: op for plan in chain for layer, ops in plan.layers.items() for op in ops if isinstance(op, Depth)
        }
        if not routed:
            continue
        measured = active.get(label, {}).get("depth", {})
        rows[label] = {int(layer): 100 * float(value) for layer, value in measured.items()}
        rows[label] |= {layer: 0.0 for layer, op in routed.items() if op.rule == "drop"}
        signs |= {(label, layer): SIGNS.get(op.granularity, "") for layer, op in routed.items()}
    return _map(rows, "% of tokens that enter", "YlGnBu", 100.0, "{:.0f}", signs) if any(rows.values()) else None


def _map(
    rows: Mapping[str, Mapping[int, float]],
    what: str,
    colours: str,
    largest: float | None,
    form: str,
    signs: Mapping[tuple[str, int], str] | None = None,
) -> Figure:
    layers = sorted({layer for found in rows.values() for layer in found})
    matrix = np.array([[found.get(layer, np.nan) for layer in layers] for found in rows.values()])
    names = [style.short(label) for label in rows]
    width = min(style.WIDTH + 2, 1.6 + 0.075 * max(map(len, names)) + 0.34 * max(6, len(layers)))
    figure = style.new_figure(width, 1.1 + 0.26 * len(rows))
    axes = figure.subplots()
    top = float(np.nanmax(matrix)) if largest is None else largest
    image = axes.imshow(matrix, aspect="auto", cmap=colours, vmin=0, vmax=top, interpolation="nearest")
    if len(layers) <= NUMBERED:
        for (y, x), value in np.ndenumerate(matrix):
            if not np.isnan(value):
                sign = (signs or {}).get((list(rows)[y], layers[x]), "")
                colour = "#fdfdfd" if value > 0.6 * top else style.ON_TINT
                axes.text(x, y, form.format(value) + sign, ha="center", va="center", fontsize=6.5, color=colour)
    every = style.evenly(range(len(layers)), 32)
    axes.set_xticks(every, [layers[n] for n in every])
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("layer")
    axes.set_xticks(np.arange(0.5, len(layers) - 1), minor=True)
    axes.set_yticks(np.arange(0.5, len(rows) - 1), minor=True)
    axes.grid(which="minor", color=style.PALE, lw=0.7)
    bare(axes)
    figure.colorbar(image, ax=axes, pad=0.01, aspect=12).set_label(what)
    return figure
