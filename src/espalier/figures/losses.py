"""What a plan's evidence says of each layer: its loss, or the share of something that stays."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from espalier.figures import style
from espalier.plans.plan import Plan

# Numbers of a layer that methods leave as evidence, with what they are; of methods that are not the same thing each
# method has a panel of its own.
EVIDENCE = {
    "relative_loss": "loss over the block's output",
    "loss": "loss",
    "inertia": "sum of squares in clusters",
    "lost_share": "share of the energy that is lost",
    "kept_score": "share of the score that stays",
    "captured_score": "share of the score that the router finds",
    "shared_marks": "share of the marks in the shared block",
    "agreement": "agreement with the whole FFN",
    "arank": "ARank",
    "mean_cka": "mean CKA of two experts",
}
WIDE = 20.0  # the largest value over the smallest, from which an axis is logarithmic


@style.styled
def losses(plans: Mapping[str, Sequence[Plan]]) -> Figure | None:
    """Draw the numbers of EVIDENCE by layer, a panel a method and number, a line a label; None where there are none."""
    panels: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    for label, chain in plans.items():
        for plan in chain:
            for key in _own(plan):
                values = {layer: float(found[key]) for layer, found in sorted(plan.evidence.items()) if key in found}
                panels.setdefault((str(plan.method.get("name")), key), {})[label] = values
    if not panels:
        return None
    figure, grid = style.panels(len(panels), 3.0)
    for axes, ((method, key), lines) in zip(grid, panels.items(), strict=True):
        _panel(axes, lines)
        axes.set_title(f"{method}\n{EVIDENCE[key]}", loc="left", fontsize=8.5)
    return figure


def _own(plan: Plan) -> list[str]:
    """Return which numbers a plan has; of a loss that is also given relative to the output, that one."""
    present = {key for found in plan.evidence.values() for key, value in found.items() if _is_number(value)}
    return [key for key in EVIDENCE if key in present and not (key == "loss" and "relative_loss" in present)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _panel(axes: Any, lines: Mapping[str, Mapping[int, float]]) -> None:
    named: dict[tuple[tuple[int, float], ...], list[str]] = {}  # lines of one plan, tuned or not, lie on each other
    for label, values in lines.items():
        named.setdefault(tuple(values.items()), []).append(label)
    for n, (points, labels) in enumerate(named.items()):
        colour, marker = style.shade(n)
        label = style.short(style.several(labels), 30)
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, ms=4, lw=1, label=label)
    every = [value for values in lines.values() for value in values.values()]
    if min(every) > 0 and max(every) > WIDE * min(every):
        style.logarithmic(axes.yaxis)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.set_xlabel("layer")
    axes.grid(axis="y")
    axes.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2)
