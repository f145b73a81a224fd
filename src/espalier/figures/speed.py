"""How long a checkpoint takes beside the uncompressed model, and how long it would at best."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from espalier.figures import style

Document = Mapping[str, Any]
PHASES = {"prefill": "Prefill", "decode": "Decoding, one sequence"}


@style.styled
def speed(summary: Sequence[Document]) -> Figure | None:
    """Draw the time of prefill and of decoding over the uncompressed model's, a row a label; None where none was timed.

    Points: geometric means of the rounds with 95 % intervals; hollow: the ideal.
    """
    timed = [line for line in summary if any(phase in line for phase in PHASES)]
    phases = [phase for phase in PHASES if any(phase in line for line in timed)]
    if not timed:
        return None
    figure = style.new_figure(style.WIDTH, 1.2 + 0.27 * len(timed))
    grid = figure.subplots(1, len(phases), squeeze=False, sharey=True)[0]
    rows = np.arange(len(timed))
    for axes, phase in zip(grid, phases, strict=True):
        axes.axvline(1, color=style.MUTED, lw=1, ls="--")
        for row, line in zip(rows, timed, strict=True):
            if phase not in line:
                continue
            found = line[phase]
            low, high = (found["value"] if found[end] is None else found[end] for end in ("low", "high"))
            axes.plot([low, high], [row, row], color=style.COLOURS[0], lw=1.5, solid_capstyle="butt")
            axes.plot(found["value"], row, color=style.COLOURS[0], marker="o", ms=5, ls="none", label="measured")
            axes.plot(
                found["ideal"], row, color=style.COLOURS[1], marker="D", ms=5, mfc="none", ls="none", label="ideal"
            )
        axes.set_title(PHASES[phase], loc="left")
        axes.set_xlabel("time over the uncompressed model's")
        axes.set_xlim(left=0)
        axes.grid(axis="x")
    grid[0].set_yticks(rows, [style.short(str(line["label"])) for line in timed])
    grid[0].invert_yaxis()
    handles, labels = grid[0].get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    figure.legend(list(once.values()), list(once), loc="outside lower center", ncols=2, frameon=False)
    return figure
