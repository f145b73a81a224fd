"""What the router chooses, and what a plan does to each expert: kept, merged, made narrower, replaced, removed."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray

from espalier.checkpoints.shape import ModelShape
from espalier.collecting.stats import Stats
from espalier.figures import style
from espalier.plans.operations import Constant, Keep, Merge
from espalier.plans.plan import Plan

Decision = tuple[list[int], NDArray[np.int64]]  # layers, and what is done to each expert [layers, E]

NUMBERED = 32  # experts a layer, up to which groups carry their number
REMOVED, CONSTANT, KEPT = -1, -2, 0  # in a decision matrix; merged groups are numbered from 1
TINTS = ListedColormap([style.COLOURS[5], "#b9bec5", style.COLOURS[0], *matplotlib.colormaps["Set3"].colors])  # type: ignore[attr-defined]


@style.styled
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
    figure = style.new_figure(min(style.WIDTH, 3.2 + 0.4 * experts), len(maps) * min(8.0, 1.3 + 0.28 * layers))
    for axes, (one, share) in zip(figure.subplots(len(maps), 1, squeeze=False)[:, 0], maps, strict=True):
        image = axes.imshow(100 * share, aspect="auto", cmap="YlGnBu", vmin=0, interpolation="nearest")
        grid_axes(axes, one.shape.layers, share.shape[1], labels=16)
        even = 100 / share.shape[1]
        bar = figure.colorbar(image, ax=axes, pad=0.015)
        bar.set_label("share of choices, %")
        bar.ax.axhline(even, color=style.COLOURS[1], lw=2)
        axes.set_title(f"{one.tokens:,} calibration tokens; an even share is {even:.3g} %", loc="left")
    return figure


def grid_axes(axes: Any, layers: Sequence[int], across: int, labels: int, what: str = "expert") -> None:
    """Name the rows of a map after layers and count its columns, at most so many of them."""
    axes.set_xticks(range(0, across, math.ceil(across / labels)))
    down = math.ceil(len(layers) / 16)
    axes.set_yticks(range(0, len(layers), down), [layers[n] for n in range(0, len(layers), down)])
    axes.set_xlabel(what)
    axes.set_ylabel("layer")
    bare(axes)


def bare(axes: Any) -> None:
    """Leave a map without frame and tick marks."""
    axes.tick_params(which="both", length=0, labelsize=8)
    for spine in axes.spines.values():
        spine.set_visible(False)


@style.styled
def decisions(plans: Mapping[str, Sequence[Plan]], source_experts: int) -> Figure | None:
    """Draw what the plans of each label do to `source_experts` a layer, a panel a label; None for nothing."""
    made: dict[Any, Decision] = {}
    labels: dict[Any, list[str]] = {}
    for label, chain in plans.items():
        first = next((own for plan in chain if (own := decision_matrix(plan, source_experts))), None)
        if first is not None:  # a later plan's ids are those of the experts that this one left
            same = (tuple(first[0]), first[1].tobytes())  # lines that are tuned, or skip on top, share a plan
            made[same] = first
            labels.setdefault(same, []).append(label)
    found = {style.several(labels[same]): decision for same, decision in made.items()}
    if not found:
        return None
    layers = max(len(rows) for rows, _ in found.values())
    across = 3 if source_experts <= 20 else 2 if source_experts <= 40 else 1
    down = math.ceil(len(found) / across)
    figure = style.new_figure(style.WIDTH, down * min(8.0, 1.0 + 0.24 * layers))
    grid = figure.subplots(down, across, squeeze=False)
    for axes, (label, (rows, matrix)) in zip(grid.flat, found.items(), strict=False):
        shown = np.where(matrix > 0, 3 + (matrix - 1) % 12, matrix + 2)
        axes.imshow(shown, aspect="auto", cmap=TINTS, vmin=-0.5, vmax=14.5, interpolation="nearest")
        axes.set_xticks(np.arange(0.5, matrix.shape[1] - 1), minor=True)
        axes.set_yticks(np.arange(0.5, len(rows) - 1), minor=True)
        grid_axes(axes, rows, matrix.shape[1], labels=24 // across)
        if matrix.shape[1] <= NUMBERED:
            axes.grid(which="minor", color="white", lw=1)
            for (y, x), group in np.ndenumerate(matrix):
                if group > 0:
                    axes.text(x, y, str(group), ha="center", va="center", fontsize=6.5, color=style.ON_TINT)
        axes.set_title(style.title(label, 40), loc="left")
    for axes in grid.flat[len(found) :]:
        axes.set_visible(False)
    return figure


def decision_matrix(plan: Plan, experts: int) -> Decision | None:
    """Return (layers, int [layers, E]) of what a plan does to experts; None when it does nothing to any.

    -1 removed, -2 replaced by a constant, 0 kept as it is, g >= 1 merged with the others of group g.
    """
    changing = {
        layer: next((op for op in operations if isinstance(op, Keep | Merge | Constant)), None)
        for layer, operations in sorted(plan.layers.items())
    }
    chosen = {layer: op for layer, op in changing.items() if op is not None}
    if not chosen:
        return None
    matrix = np.full((len(chosen), experts), REMOVED, dtype=np.int64)
    for row, op in enumerate(chosen.values()):  # [E] of one layer
        if isinstance(op, Keep):
            matrix[row, list(op.experts)] = KEPT
        elif isinstance(op, Constant):
            matrix[row] = KEPT
            matrix[row, list(op.experts)] = CONSTANT
        else:
            number = 0
            for group in op.groups:
                number += len(group) > 1
                matrix[row, list(group)] = number if len(group) > 1 else KEPT
    return list(chosen), matrix
