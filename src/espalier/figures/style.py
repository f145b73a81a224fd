"""How figures look, and how a figure becomes an SVG element that follows the page's colours."""

import io
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, Locator, NullLocator

from espalier.artefacts.store import atomic_file

# Okabe and Ito's colours, which readers with any colour vision tell apart; for yellow and black, which are lost on one
# of two backgrounds, there is grey.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#5b6470")
MARKERS = "osD^vPX"
INK, MUTED, PALE = "#1f2328", "#6b7280", "#e6e8eb"
ON_TINT = "#202020"  # text on a coloured cell, which stays dark on a dark page
# What the page replaces: each colour is a variable of report.css, so that figures follow its dark mode.
VARIABLES = {INK: "ink", MUTED: "muted", PALE: "pale"} | {colour: f"c{n}" for n, colour in enumerate(COLOURS)}
STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": PALE,
    "text.color": INK,
    "text.parse_math": False,  # a dollar in a name is a dollar
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "espalier",  # equal figures are equal files
    "svg.fonttype": "path",  # looks alike everywhere, and no name in it is ever markup
}
WIDTH = 10.5  # inches
ACROSS = 3  # panels in a row
LEGEND_ROWS, LEGEND_COLUMNS = 16, 4  # of names beside the panels; below them
LONGEST = 44  # characters of a name in a figure
TITLE_LINES, TITLE_LINE = 3, 0.16  # of a panel's title, and inches of one

Draw = TypeVar("Draw", bound=Callable[..., Any])


def styled(draw: Draw) -> Draw:
    """Let a function draw in this style."""
    return matplotlib.rc_context(STYLE)(draw)


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, in inches."""
    return Figure(figsize=(width, height))


def panels(number: int, high: float, below: float = 0.0) -> tuple[Figure, list[Any]]:
    """Return a figure of `number` panels, `high` inches each, and their axes; `ACROSS` stand in a row.

    below: inches that are added for a legend.
    """
    across = min(ACROSS, number)
    down = -(-number // across)
    # A panel alone is wider than one of several: its labels need as much room.
    figure = new_figure(WIDTH * across / ACROSS + (0 if across > 1 else 1.5), high * down + below)
    grid = list(figure.subplots(down, across, squeeze=False).flat)
    for axes in grid[number:]:
        axes.set_visible(False)
    return figure, grid[:number]


def shade(number: int) -> tuple[str, str]:
    """Return colour and marker of the `number`-th name: as many pairs as the product of both before one comes again."""
    return COLOURS[number % len(COLOURS)], MARKERS[(number // len(COLOURS) + number) % len(MARKERS)]


def short(name: str, longest: int = LONGEST) -> str:
    """Return a name that fits into a figure, with an ellipsis where its middle was."""
    if len(name) <= longest:
        return name
    return f"{name[: longest - 16].rstrip()} … {name[-12:].lstrip()}"


def title(name: str, across: int) -> str:
    """Return a panel's title in at most three lines of so many characters: names often differ only in their middle."""
    lines = textwrap.wrap(name, across)
    if len(lines) > TITLE_LINES:
        lines[TITLE_LINES - 1 :] = [short(" ".join(lines[TITLE_LINES - 1 :]), across)]
    return "\n".join(lines)


def title_inches(names: Iterable[str], across: int) -> float:
    """Return what titles of more than one line add to a row of panels."""
    return TITLE_LINE * max(title(name, across).count("\n") for name in names)


def several(names: Sequence[str]) -> str:
    """Return the name of what several lines share."""
    return names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


def evenly(items: Sequence[Any], most: int) -> list[Any]:
    """Return at most so many of the items, evenly spaced, the first and the last among them."""
    places = np.unique(np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int))
    return [items[place] for place in places]


def log_ticks(low: float, high: float) -> list[float]:
    """Return marks of a logarithmic axis: 1, 2, 3, 5 and 7 times powers of ten, of a wide range at most 8 powers."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    if high < 30 * low:
        return [t for n in decades for k in (1, 2, 3, 5, 7) if low <= (t := k * 10.0**n) <= high]
    if high < 1000 * low:
        return [t for n in decades for k in (1, 3) if low <= (t := k * 10.0**n) <= high]
    within = [10.0**n for n in decades if low <= 10.0**n <= high]
    return within[:: -(-len(within) // 8)]


class Powers(Locator):
    """Puts the marks of `log_ticks` on an axis."""

    def __call__(self) -> list[float]:
        assert self.axis is not None
        return self.tick_values(*sorted(self.axis.get_view_interval()))

    def tick_values(self, vmin: float, vmax: float) -> list[float]:
        return log_ticks(vmin, vmax)


def logarithmic(axis: Any) -> None:
    """Make an axis logarithmic, its marks plain numbers: matplotlib writes them as formulas, which are switched off."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(Powers())
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Put one legend beside the panels, or below them in columns where it would be higher than they are."""
    names = [short(label) for label in labels]
    columns = max(1, min(LEGEND_COLUMNS, int(figure.get_figwidth() / (0.35 + 0.075 * max(map(len, names), default=1)))))
    narrow = figure.get_figwidth() < 0.8 * WIDTH
    if narrow or len(names) > LEGEND_ROWS or columns < 2 or max(map(len, names), default=0) > 28:
        rows = -(-len(names) // columns)
        figure.set_figheight(figure.get_figheight() + 0.2 * rows + 0.1)
        figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False)
    else:
        figure.legend(handles, names, loc="outside right upper", frameon=False)


def svg(figure: Figure) -> str:
    """Return the figure as an <svg> element, without comments and metadata."""
    text = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": "Espalier"})
    document = text.getvalue()
    element = document[document.index("<svg") :]
    element = re.sub(r"<!--.*?-->\s*", "", element, flags=re.DOTALL)
    return re.sub(r"<metadata>.*?</metadata>\s*", "", element, flags=re.DOTALL)


def save(element: str, path: Path) -> None:
    """Write an <svg> element as an SVG file, on white."""
    background = element.replace("<svg ", '<svg style="background: #ffffff" ', 1)
    with atomic_file(path) as temporary:
        temporary.write_text('<?xml version="1.0" encoding="utf-8"?>\n' + background, encoding="utf-8")


def on_page(element: str, prefix: str) -> str:
    """Return the element for a page that holds others: ids of its own, and the page's colours in place of ours."""
    element = re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{prefix}-", element)
    for colour, variable in VARIABLES.items():
        element = re.sub(rf"(?<=: ){colour}\b", f"var(--{variable})", element, flags=re.IGNORECASE)
    return element
