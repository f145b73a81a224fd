"""Write a table document as Markdown, as LaTeX with booktabs, and as a page of plain HTML tables."""

import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from espalier.tables.markup import (
    BEYOND,
    DAGGER,
    NONE,
    ONLY,
    PAIRED,
    legend,
    main_rows,
    millions,
    name_of,
    number,
    ordered_tasks,
    pair_rows,
    percent,
    published_legend,
    published_rows,
    short,
    task_rows,
    value_of,
)  # fmt: skip

Document = Mapping[str, Any]
Rows = tuple[list[str], list[list[str]]]
BY_TASK = "By task"  # the section that every table has
IN_PAIRS = "Methods in pairs"  # whose cells are lists of names


def sections(table: Document) -> Iterator[tuple[str, Rows, list[str]]]:
    """Yield title, header with rows, and explaining sentences of what comes after the table of means."""
    yield BY_TASK, task_rows(table), []
    published = published_rows(table)
    if published[1]:
        yield f"Beside published numbers ({table['compare']})", published, published_legend(table)
    paired = pair_rows(table)
    if paired[1]:
        yield IN_PAIRS, paired, [PAIRED]


def title(table: Document) -> str:
    """The experiment and its models."""
    models = table.get("models") or [table["model"]]
    return f"{table['experiment']}: {', '.join(str(model['id'] or 'model') for model in models)}"


def markdown(table: Document) -> str:
    """Return the tables of means, of tasks, of published numbers and of pairs, padded so that columns align as text."""
    parts = [f"# {title(table)}", *(f"**{reason}**" for reason in table.get("not_reproduction") or ())]
    parts.append(_pipe(*main_rows(table)))
    for name, rows, said in sections(table):
        parts += [f"## {name}", _pipe(*rows), *(["\n".join(f"- {line}" for line in said)] if said else [])]
    parts += ["## How to read it", "\n".join(f"- {line}" for line in legend(table))]
    return "\n\n".join(parts) + "\n"


def _pipe(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[n]) for row in (header, *rows)) for n in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if n == 0 else c.rjust(w) for n, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * w if n == 0 else "-" * (w - 1) + ":" for n, w in enumerate(widths)]
    return "\n".join([line(header), "| " + " | ".join(rule) + " |", *map(line, rows)])


ESCAPES = {character: "\\" + character for character in "%_&#${}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    DAGGER: r"$^\dagger$",
    ONLY: r"$^\ddagger$",
    BEYOND: r"$^*$",
    "×": r"$\times$",
    "Δ": r"$\Delta$",
    NONE: "--",
}


def escape(text: str) -> str:
    """Escape LaTeX's special characters."""
    return "".join(ESCAPES.get(character, character) for character in text)


def latex(table: Document) -> str:
    """Return booktabs tables: parameters, tasks and means with half-widths of intervals; published numbers; pairs."""
    tasks = ordered_tasks(table)
    header = ["Method", "Stored", "Unique", "Active", *(short(task, table) for task in tasks)]
    has_texts = any("perplexity" in line for line in table["summary"])
    has_choices = any("accuracy" in line for line in table["summary"])
    header += ["ppl geo"] * has_texts + ["acc mean"] * has_choices
    body = []
    for line in table["summary"]:
        cells = [
            escape(name_of(line)),
            *(millions(line[key]).replace(",", "{,}") for key in ("stored", "unique", "active")),
        ]
        cells += [escape(value_of(line["tasks"].get(task))) for task in tasks]
        cells += [_half(line.get("perplexity"), number)] * has_texts + [
            _half(line.get("accuracy"), percent)
        ] * has_choices
        body.append(cells)
    reasons = list(table.get("not_reproduction") or ())
    said = [f"{title(table)}.", *reasons, *legend(table, paired=False)]
    parts = [r"% Needs \usepackage{booktabs}.", _tabular(map(escape, header), body, said)]
    for name, (heads, rows), lines in list(sections(table))[1:]:  # tasks are in the first
        escaped = [[escape(cell) for cell in row] for row in rows]
        parts.append(_tabular(map(escape, heads), escaped, [f"{title(table)}: {name}.", *reasons, *lines]))
    return "\n".join(parts) + "\n"


def _tabular(header: Iterator[str], body: Sequence[Sequence[str]], caption: Sequence[str]) -> str:
    heads = list(header)
    lines = [
        r"\begin{table}",
        r"  \centering",
        rf"  \caption{{{escape(' '.join(caption))}}}",
        rf"  \begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}",
        r"    \toprule",
        "    " + " & ".join(heads) + r" \\",
        r"    \midrule",
        *("    " + " & ".join(row) + r" \\" for row in body),
        r"    \bottomrule",
        r"  \end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines)


def page(table: Document) -> str:
    """Return a page of the same tables for a browser: no style, no script, every text escaped."""
    parts = [f"<h1>{html.escape(title(table))}</h1>"]
    parts += [f"<p><strong>{html.escape(reason)}</strong></p>" for reason in table.get("not_reproduction") or ()]
    parts += [_html_table(*main_rows(table)), _html_list(legend(table))]
    for name, rows, said in sections(table):
        parts += [f"<h2>{html.escape(name)}</h2>", _html_table(*rows), _html_list(said)]
    head = f'<meta charset="utf-8">\n<title>{html.escape(title(table))}</title>'
    body = "\n".join(filter(None, parts))
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in header)
    lines = [
        f'<tr><th scope="row">{html.escape(row[0])}</th>'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    ]
    body = "\n".join(lines)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def _html_list(lines: Sequence[str]) -> str:
    items = "".join(f"<li>{html.escape(line.replace('`', ''))}</li>" for line in lines)
    return f"<ul>{items}</ul>" if lines else ""


def _half(found: Document | None, show: Callable[[float | None], str]) -> str:
    if not found:
        return "--"
    if found["high"] is None:
        return show(found["value"])
    return rf"{show(found['value'])} $\pm$ {show((found['high'] - found['low']) / 2)}"
