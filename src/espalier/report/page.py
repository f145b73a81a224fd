"""The HTML of a report: tables, figures and the page around them; every text that goes in is escaped here."""

import base64
import hashlib
import html
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

from espalier.figures import style


@dataclass(frozen=True)
class Section:
    """A heading with its HTML; `id` is its anchor."""

    id: str
    title: str
    body: str


def text(content: str) -> str:
    """Return a paragraph."""
    return f"<p>{html.escape(content)}</p>"


def strong(content: str) -> str:
    """Return a paragraph that is not overlooked."""
    return f"<p><strong>{html.escape(content)}</strong></p>"


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    caption: str,
    *,
    links: Sequence[str] = (),
    sortable: bool = False,
    prose: bool = False,
) -> str:
    """Return a table in a box in which it scrolls, its caption above; the first cell of a row names the row.

    links: the anchor on this page that each row's name leads to. sortable: the page's script lets readers sort and
    filter it. prose: cells are texts, which wrap, and not numbers.
    """
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in header)
    body = []
    for n, row in enumerate(rows):
        name = html.escape(row[0])
        if links:
            name = f'<a href="#{html.escape(links[n])}">{name}</a>'
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
        body.append(f'<tr><th scope="row">{name}</th>{cells}</tr>')
    kinds = " ".join(kind for kind, asked in (("sortable", sortable), ("prose", prose)) if asked)
    said = html.escape(caption)
    return (
        f'<figure class="table {kinds}"><figcaption>{said}</figcaption>'
        f'<div class="scroll" role="region" aria-label="{said}" tabindex="0"><table aria-label="{said}">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div></figure>"
    )


def figure(svg: str, caption: str, alt: str, prefix: str) -> str:
    """Return an <svg> element in a box in which it scrolls on a narrow screen, its caption below.

    alt: what it shows, for those who do not see it. prefix: what tells its ids from those of other figures.
    """
    width = svg.partition('width="')[2].partition('"')[0]
    named = f'<svg role="img" aria-label="{html.escape(alt)}" style="--width: {width}" '
    picture = style.on_page(svg, prefix).replace("<svg ", named, 1)
    return (
        f'<figure><div class="scroll" tabindex="0" role="group" aria-label="{html.escape(caption)}">{picture}</div>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def part(title: str, body: str) -> str:
    """Return a part of a section under a heading of its own; `body` is HTML."""
    return f"<h3>{html.escape(title)}</h3>\n{body}"


def side_by_side(parts: Sequence[str]) -> str:
    """Return parts, HTML, that stand beside each other where there is room."""
    return f'<div class="side">{"".join(parts)}</div>'


def details(summary: str, body: str, id: str) -> str:
    """Return what opens at a click, and when a link leads there; `body` is HTML."""
    return f'<details id="{id}"><summary>{html.escape(summary)}</summary>{body}</details>'


def code(command: str) -> str:
    """Return a command on lines of its own."""
    return f"<pre><code>{html.escape(command)}</code></pre>"


def bullets(items: Sequence[str]) -> str:
    """Return a list of sentences."""
    return "<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in items) + "</ul>"


def render(title: str, sections: Sequence[Section]) -> str:
    """Return the whole document. Its policy lets a browser run the page's own script alone, and fetch nothing."""
    name = html.escape(title)
    links = "".join(f'<a href="#{section.id}">{html.escape(section.title)}</a>' for section in sections)
    body = "\n".join(
        f'<section id="{section.id}"><h2>{html.escape(section.title)}</h2>\n{section.body}\n</section>'
        for section in sections
    )
    script = _asset("report.js")
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<title>{name}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<style>\n{_asset('report.css')}</style>\n</head>\n<body>\n<header><p>Espalier report</p><h1>{name}</h1>"
        f'<nav aria-label="Sections">{links}</nav></header>\n<main>\n{body}\n</main>\n'
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def _asset(name: str) -> str:
    return (files("espalier") / "assets" / name).read_text(encoding="utf-8")
