"""How alike the experts of a layer are: the cluster tree, the distances in its order, and the chosen clusters."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from scipy.cluster.hierarchy import cophenet, dendrogram
from scipy.spatial.distance import squareform

from espalier.figures import style
from espalier.plans.operations import Merge
from espalier.plans.plan import Plan

PANELS = 12  # layers, up to which every one is drawn
ACROSS = 4
NUMBERED = 32  # experts, up to which they carry their number
GREY = style.MUTED

Floats = NDArray[np.float64]


@style.styled
def similarity(plan: Plan, distances: Mapping[int, Floats]) -> Figure | None:
    """Draw of each layer (at most 12, evenly spaced) the cluster tree above the map of distances, clusters framed.

    `distances` [E, E] by layer are those that the method grouped by; of a layer without them the map shows the heights
    at which its tree joins two experts. None for a plan without a tree or groups.
    """
    layers = [
        layer
        for layer, operations in sorted(plan.layers.items())
        if "linkage" in plan.evidence.get(layer, {})
        or (layer in distances and any(isinstance(op, Merge) for op in operations))
    ]
    if not layers:
        return None
    layers = style.evenly(layers, PANELS)
    has_tree = any("linkage" in plan.evidence.get(layer, {}) for layer in layers)
    across, down = min(ACROSS, len(layers)), -(-len(layers) // ACROSS)
    figure = style.new_figure(style.WIDTH * across / ACROSS, (3.7 if has_tree else 2.75) * down)
    for place, part in zip(layers, figure.subfigures(down, across, squeeze=False).flat, strict=False):
        _panel(part, place, plan, distances.get(place), has_tree)
    return figure


def _panel(part: Any, layer: int, plan: Plan, apart: Floats | None, has_tree: bool) -> None:
    groups = groups_of(plan, layer)
    merges = plan.evidence.get(layer, {}).get("linkage")
    grid = part.subplots(2, 1, height_ratios=[1, 2.6]) if has_tree else [None, part.subplots()]
    order = [expert for group in groups for expert in group]
    if merges is not None:
        tree = np.array(merges, dtype=float)  # [E - 1, 4]
        order = draw_tree(grid[0], tree, len(groups))
        if apart is None:
            apart = squareform(cophenet(rising(tree)))
    elif has_tree:
        grid[0].set_visible(False)
    assert apart is not None
    title = f"layer {layer}: {len(order)} experts, {len(groups)} groups"
    (grid[0] if merges is not None else grid[1]).set_title(title, loc="left", fontsize=8.5)
    _map(part, grid[1], apart, order, groups)


def groups_of(plan: Plan, layer: int) -> list[list[int]]:
    """Return the groups of a layer's experts: those that are merged, or the clusters of which one expert each stays.

    A layer that keeps all of its experts (budget=global, knapsack) has as many groups.
    """
    merge = next((op for op in plan.layers.get(layer, ()) if isinstance(op, Merge)), None)
    if merge is not None:
        return [list(group) for group in merge.groups]
    evidence = plan.evidence[layer]
    found: list[list[int]] = evidence.get("clusters") or [[expert] for expert in range(len(evidence["linkage"]) + 1)]
    return found


def rising(tree: Floats) -> Floats:
    """Return the merges [E - 1, 4] with heights that never fall, as drawing a tree needs."""
    found = tree.copy()
    found[:, 2] = np.maximum.accumulate(tree[:, 2])
    return found


def cut_height(tree: Floats, groups: int) -> float | None:
    """Return a height between the last merge that was done and the first that was not; None without either."""
    below = len(tree) + 1 - groups  # merges that were done
    heights = rising(tree)[:, 2]
    return float((heights[below - 1] + heights[below]) / 2) if 0 < below < len(heights) else None


def draw_tree(axes: Any, tree: Floats, groups: int) -> list[int]:
    """Draw the tree with its cut and return the experts in the order of its leaves."""
    cut = cut_height(tree, groups)
    drawn = dendrogram(
        rising(tree), ax=axes, no_labels=True, above_threshold_color=GREY,
        color_threshold=0 if cut is None else cut, link_color_func=None,
    )  # fmt: skip
    for collection in axes.collections:
        collection.set_linewidth(1)
    for collection in axes.collections[:-1]:
        collection.set_color(style.COLOURS[0])
    if cut is not None:
        axes.axhline(cut, color=style.COLOURS[1], lw=1, ls="--")
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(labelsize=7)
    return [int(leaf) for leaf in drawn["leaves"]]


def _map(part: Any, axes: Any, apart: Floats, order: Sequence[int], groups: Sequence[Sequence[int]]) -> None:
    shown = apart[np.ix_(order, order)]
    off = shown[~np.eye(len(order), dtype=bool)]
    low, high = (float(off.min()), float(off.max())) if off.size else (0.0, 1.0)
    image = axes.imshow(shown, cmap="viridis_r", vmin=low, vmax=high, interpolation="nearest", aspect="auto")
    place = {expert: n for n, expert in enumerate(order)}
    for group in groups:
        places = sorted(place[expert] for expert in group)
        if len(places) < 2:
            continue
        if places[-1] - places[0] == len(places) - 1:  # neighbours in this order
            corner, size = places[0] - 0.5, len(places)
            axes.add_patch(Rectangle((corner, corner), size, size, fill=False, edgecolor=style.COLOURS[1], lw=1.6))
    if len(order) <= NUMBERED:
        axes.set_xticks(range(len(order)), order)
        axes.set_yticks(range(len(order)), order)
    else:
        axes.set_xticks([])
        axes.set_yticks([])
    axes.tick_params(length=0, labelsize=5.5 if len(order) > 16 else 6.5)
    bar = part.colorbar(image, ax=axes, location="bottom", pad=0.02, aspect=30)
    bar.ax.tick_params(labelsize=7)
    bar.set_label("distance", fontsize=7.5)
