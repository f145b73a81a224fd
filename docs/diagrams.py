"""Draw the diagrams of the pages: pipeline.svg, of the store's stages, and block.svg, of what plans do to a MoE block.

Each has a background of its own, and follows the reader's light or dark scheme, so that it can stand on any page.
"""

from pathlib import Path

from espalier.artefacts.store import VERSION

DOCS = Path(__file__).parent
STYLE = """
  svg { --paper: #fff; --ink: #24292f; --soft: #656d76; --line: #57606a }
  svg { --box: #f6f8fa; --mark: #1f6f54; --gone: #d0d7de }
  @media (prefers-color-scheme: dark) {
    svg { --paper: #161b22; --ink: #e6edf3; --soft: #9aa4ae; --line: #9aa4ae }
    svg { --box: #22272e; --mark: #4fc79b; --gone: #3d444d }
  }
  text { font: 15px system-ui, "Segoe UI", "DejaVu Sans", sans-serif; fill: var(--ink); text-anchor: middle }
  .small { font-size: 12px; fill: var(--soft) }
  .title { font-weight: 600 }
  .paper { fill: var(--paper); stroke: var(--gone) }
  .box { fill: var(--box); stroke: var(--line) }
  .model { stroke: var(--mark); stroke-width: 2.5 }
  .maybe { stroke-dasharray: 5 4 }
  .arrow, .used { fill: none; stroke: var(--line); stroke-width: 1.5 }
  .arrow { marker-end: url(#head) }
  .used { stroke: var(--mark); stroke-width: 2.5 }
  .on { marker-end: url(#head); stroke-width: 2 }
  .gone { fill: none; stroke: var(--gone); stroke-dasharray: 4 3 }
  #head path { fill: var(--line) }
"""
HEAD = (
    '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
    '<path d="M0 0 8 4 0 8z"/></marker></defs>'
)
# Of each stage: column, row, and what it makes. Probes and tasks are made in bundles by `collect` and `score`.
STAGES = {
    "fetch": (0, 0, "the model"),
    "tokens": (1, 0, "the calibration"),
    "collect": (2, 0, "statistics"),
    "fit": (2, 1, "what is learnt"),
    "reduce": (3, 0, "joins shards"),
    "plan": (4, 0, "a small JSON"),
    "apply": (0, 2, "a checkpoint"),
    "teacher": (1, 3, "original's answers"),
    "tune": (1, 2, "tuned routers"),
    "score": (2, 2, "quality"),
    "speed": (2, 3, "time"),
    "table": (3, 2, "with intervals"),
    "report": (4, 2, "one HTML file"),
}
BUNDLED = {"probe", "task"}
OPTIONAL = {"fit", "reduce", "teacher", "tune", "speed"}
MODELS = {"fetch", "apply", "tune"}
ARROWS = [
    ("fetch", "tokens"), ("tokens", "collect"), ("tokens", "fit"), ("collect", "reduce"), ("reduce", "plan"),
    ("fit", "plan"), ("plan", "apply"), ("apply", "tune"), ("teacher", "tune"), ("tune", "score"), ("tune", "speed"),
    ("score", "table"), ("speed", "table"), ("table", "report"),
]  # fmt: skip
WIDE, HIGH, ACROSS, DOWN = 132, 50, 174, 76


def pipeline() -> str:
    """Return the pipeline as SVG; every stage of the store stands in it."""
    assert set(STAGES) == set(VERSION) - BUNDLED, "docs/diagrams.py: a stage is missing, or is gone"
    place = {name: (20 + ACROSS * column, 20 + DOWN * row) for name, (column, row, _) in STAGES.items()}
    parts = [_arrow(place[start], place[end]) for start, end in ARROWS]
    for name, (x, y) in place.items():
        kind = " ".join(["box", *["maybe"][: name in OPTIONAL], *["model"][: name in MODELS]])
        parts.append(f'<rect class="{kind}" x="{x}" y="{y}" width="{WIDE}" height="{HIGH}" rx="6"/>')
        parts.append(_text(x + WIDE / 2, y + 21, name, "title") + _text(x + WIDE / 2, y + 39, STAGES[name][2], "small"))
    parts.append(_text(694, 268, "Green: a directory that holds a model.", "small"))
    parts.append(_text(694, 286, "Dashed: only where asked for.", "small"))
    return _svg(868, 318, "The stages of the pipeline, from a model to a report", parts)


def _arrow(start: tuple[int, int], end: tuple[int, int]) -> str:
    (a, b), (c, d) = start, end
    middle = HIGH / 2
    if c > a and b == d:  # along a row
        path = f"M{a + WIDE} {b + middle}H{c - 2}"
    elif c > a:  # to the next column and another row
        turn = c - 21 if abs(d - b) <= DOWN else a + WIDE + 21
        path = f"M{a + WIDE} {b + middle}H{turn}V{d + middle + (8 if b > d else 0)}H{c - 2}"
    elif c == a:  # up or down a column
        path = f"M{a + WIDE / 2} {b}V{d + HIGH + 2}" if b > d else f"M{a + WIDE / 2} {b + HIGH}V{d - 2}"
    else:  # back to the first column, in the gap between the rows
        gap = d - 13
        path = f"M{a + WIDE / 2} {b + HIGH}V{gap}H{c + WIDE / 2}V{d - 2}"
    return f'<path class="arrow" d="{path}"/>'


PANELS = (
    ("the block as it is", "the router chooses 2 of 6 experts a token"),
    ("keep (pruning)", "experts and their router rows leave the files"),
    ("merge", "several rows of the router lead to one expert"),
    ("skip", "a token leaves out the weaker of its experts"),
    ("split (dense models)", "neurons of an FFN become blocks with a router"),
    ("depth", "a token goes past the whole layer"),
)
TALL, BROAD = 190, 284


def block() -> str:
    """Return what each operation does to a MoE block as SVG."""
    parts: list[str] = []
    for number, (title, says) in enumerate(PANELS):
        left, top = 14 + BROAD * (number % 3), 8 + TALL * (number // 3)
        middle = left + BROAD / 2 - 7
        parts += [_text(middle, top + 24, title, "title"), _text(middle, top + 172, says, "small")]
        parts += _panel(number, left, top)
    return _svg(868, 396, "A Mixture-of-Experts block and what the operations of a plan do to it", parts)


def _panel(number: int, left: float, top: float) -> list[str]:
    """Draw router and experts of one panel."""
    squares = [left + 18 + 41 * n for n in range(6)]
    router, row = left + 87, top + 112
    parts = [
        f'<rect class="box" x="{router}" y="{top + 42}" width="96" height="26" rx="5"/>',
        _text(router + 48, top + 60, "gate" if number == 5 else "router", "small"),
    ]

    def line(kind: str, n: float) -> str:
        return f'<path class="{kind}" d="M{router + 48} {top + 68}L{n} {row}"/>'

    def expert(n: int, kind: str = "box", name: str = "") -> str:
        shape = f'<rect class="{kind}" x="{squares[n]}" y="{row}" width="34" height="34" rx="4"/>'
        return shape + (_text(squares[n] + 17, row + 22, name or str(n), "small") if kind != "gone" else "")

    centre = [square + 17 for square in squares]
    if number == 0:
        parts += [line("used", centre[1]), line("used", centre[4]), *map(expert, range(6))]
    elif number == 1:
        kept = (0, 1, 4)
        parts += [line("used", centre[n]) for n in (1, 4)]
        parts += [expert(n, "box" if n in kept else "gone") for n in range(6)]
    elif number == 2:
        for n, members in enumerate(("0, 3", "1, 5", "2, 4")):
            x = left + 34 + 76 * n
            parts += [line("used", x + 25), line("used", x + 41)] if n == 0 else []
            parts.append(f'<rect class="box" x="{x}" y="{row}" width="66" height="34" rx="4"/>')
            parts.append(_text(x + 33, row + 22, members, "small"))
    elif number == 3:
        parts += [line("used", centre[1]), line("gone", centre[4]), *map(expert, range(6))]
    elif number == 4:
        parts += [line("used", centre[1]), line("used", centre[2])]
        parts.append(f'<rect class="box" x="{squares[0]}" y="{row}" width="239" height="34" rx="4"/>')
        parts += [f'<path class="arrow" style="marker-end:none" d="M{x - 3.5} {row}v34"/>' for x in squares[1:]]
        parts += [_text(c, row + 22, "abcdef"[n], "small") for n, c in enumerate(centre)]
    else:
        parts.append(f'<rect class="box" x="{left + 60}" y="{row}" width="150" height="34" rx="4"/>')
        parts.append(_text(left + 135, row + 22, "attention, experts", "small"))
        parts.append(f'<path class="arrow" d="M{router + 48} {top + 68}V{row - 2}"/>')
        parts.append(f'<path class="used on" d="M{router + 96} {top + 55}H{left + 250}V{top + 156}"/>')
    return parts


def _text(x: float, y: float, words: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}">{words}</text>'


def _svg(width: int, height: int, title: str, parts: list[str]) -> str:
    paper = f'<rect class="paper" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"/>'
    body = "\n".join([HEAD, paper, *parts])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img">\n<title>{title}</title>\n<style>{STYLE}</style>\n{body}\n</svg>\n'
    )


if __name__ == "__main__":
    (DOCS / "pipeline.svg").write_text(pipeline())
    (DOCS / "block.svg").write_text(block())
