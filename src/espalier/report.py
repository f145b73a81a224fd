"""One self-contained HTML file about a table: what was measured, what was decided, how it was made."""

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier import markup
from espalier.plan import Plan
from espalier.shape import ModelShape
from espalier.stats import Stats
from espalier.store import atomic_file
from espalier.tables import load_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Document = Mapping[str, Any]


@dataclass(frozen=True)
class Section:
    """A heading with its HTML; `id` is its anchor."""

    id: str
    title: str
    body: str


def make_report(
    table: Path,
    plans: Mapping[str, Path],
    stats: Sequence[Stats],
    out: Path,
    kernels: Mapping[str, Document] | None = None,
) -> Path:
    """Write the report of the table document at `table` to `out` and return it.

    plans: plan files by the node ids that the table's lines name. stats: statistics with the probe `usage`, for
    the heat map of experts and their number (without any, the figures that need them are left out). kernels:
    documents `espalier.kernel_speed/2` by the label of their row. The figures are saved beside the report too, as
    `{out's stem}/*.svg`, and tables of kernels as `{out's stem}/kernels.md` and `.csv`.
    """
    document = load_table(table)
    by_label = _first_plans(document["summary"], plans)
    sections = [
        Section("results", "Results", _results(document)),
        Section("read", "How to read it", _reading(document)),
        *_figures(document, by_label, stats, out.with_suffix("")),
        *_kernels(kernels or {}, out.with_suffix("")),
        Section("made", "How it was made", _provenance(document)),
    ]
    with atomic_file(out) as temporary:
        temporary.write_text(_page(document, sections), encoding="utf-8")
    return out


def _first_plans(summary: Sequence[Document], plans: Mapping[str, Path]) -> dict[str, Plan]:
    """Return each label's plan, of its first seed where there are several."""
    found = {}
    for line in summary:
        if line["plans"] and line["plans"][0] in plans:
            seeds = len(line["seeds"])
            name = f"{line['label']} (first of {seeds} seeds)" if seeds > 1 else line["label"]
            found[name] = Plan.load(plans[line["plans"][0]])
    return found


def _results(document: Document) -> str:
    parts = [
        _table(*markup.main_rows(document), "Means over the tasks, with 95 % intervals."),
        _table(
            *markup.task_rows(document),
            "Each task: perplexity (ppl) of a text, divergence (KL) in nats a token, or accuracy in percent.",
        ),
    ]
    header, rows = markup.published_rows(document)
    if rows:
        note = f"Beside published numbers ({document['compare']}). Models, data and harness may differ."
        parts.append(_table(header, rows, note))
    return "\n".join(parts)


def _reading(document: Document) -> str:
    items = [
        *(line.replace("`", "") for line in markup.legend(document)),
        "Two methods differ when the intervals of their comparison with the uncompressed model are well apart; "
        "the intervals of the values themselves are wider, since they also hold how hard the items are.",
    ]
    return "<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in items) + "</ul>"


def _figures(document: Document, plans: Mapping[str, Plan], stats: Sequence[Stats], folder: Path) -> list[Section]:
    from espalier import plots

    sections = []

    def add(id: str, title: str, draw: "Callable[[], Figure | None]", caption: str, alt: str) -> None:
        figure = draw()
        if figure is not None:
            element = plots.svg(figure)
            plots.save(element, folder / f"{id}.svg")
            sections.append(Section(id, title, _figure(element, caption, alt)))

    add(
        "quality",
        "Quality against parameters",
        lambda: plots.quality(document["summary"], document["baseline"]),
        "Perplexity and accuracy against the parameters that are left. Bars: 95 % intervals of the comparison with "
        "the uncompressed model (star and dashed line). Methods that leave equally many are drawn side by side.",
        "Quality by method. " + _spoken(document),
    )
    add(
        "usage",
        "What the router chooses",
        lambda: plots.usage(stats),
        "Share of the router's choices that goes to each expert of the uncompressed model, by layer. The line in "
        "the colour bar is an even share.",
        "Heat map of layers by experts.",
    )
    experts = max((one.shape.experts for one in stats if isinstance(one.shape, ModelShape)), default=0)
    if plans and experts:
        add(
            "decisions",
            "What each method decided",
            lambda: plots.decisions(plans, experts),
            "Experts by layer: blue is kept as it is, grey is removed; experts of one colour and number in a layer "
            "are merged with each other.",
            "A matrix of layers by experts for each method.",
        )
    for n, (label, plan) in enumerate(plans.items()):
        add(
            f"trees-{n}",
            f"Cluster trees: {label}",
            lambda plan=plan: plots.trees(plan),  # type: ignore[misc]
            "Experts joined by the distance of their outputs. Groups below the dashed line (blue) are merged.",
            f"Dendrograms of the layers for {label}.",
        )
    return sections


def _kernels(kernels: Mapping[str, Document], folder: Path) -> list[Section]:
    """Return the sections about timed kernels, and write their tables into `folder`."""
    if not kernels:
        return []
    from espalier import kernel_plots, kernel_table, plots

    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / "kernels.md") as temporary:
        temporary.write_text(kernel_table.markdown(kernels), encoding="utf-8")
    with atomic_file(folder / "kernels.csv") as temporary:
        kernel_table.timed_frame(kernels).to_csv(temporary, index=False)
    element = plots.svg(kernel_plots.roofline(kernels))
    plots.save(element, folder / "roofline.svg")
    said = "FLOPs a second of each implementation against FLOPs a byte, under what the machine can do at most."
    summary = (
        "Our kernels beside transformers' best and the uncompressed block, each row in one run; medians of ratios."
    )
    body = _table(*kernel_table.summary_rows(kernels), summary) + _figure(element, said, "Rooflines, a panel a row.")
    sections = [Section("roofline", "Kernels and the roofline", body)]
    for number, (label, document) in enumerate(kernels.items()):
        body = _table(*kernel_table.timed_rows(document), kernel_table.caption(document))
        if document["routing"]:
            shared = "What the router chose on the calibration text: what merging joins, and the experts of a batch."
            body += _table(*kernel_table.routing_rows(document), shared)
        if document["compiled"]:
            body += _table(*kernel_table.compiled_rows(document), kernel_table.COMPILED)
        sections.append(Section(f"kernels-{number}", f"Kernels: {label}", body))
    return sections


def _spoken(document: Document) -> str:
    """Say the figure's numbers in words, for those who do not see it."""
    parts = []
    for line in document["summary"]:
        said = [f"{line['unique'] / 1e6:.2f} million unique parameters"]
        if "perplexity" in line:
            said.append(f"perplexity {markup.number(line['perplexity']['value'])}")
        if "accuracy" in line:
            said.append(f"accuracy {markup.percent(line['accuracy']['value'])} %")
        parts.append(f"{line['label']}: {', '.join(said)}")
    return "; ".join(parts) + "."


def _provenance(document: Document) -> str:
    model = document["model"]
    rows = [["command", f"espalier run {document['experiment']}"]]
    rows.append(["model", f"{model['id']}, revision {model['revision'] or 'unknown'}"])
    calibrations = dict.fromkeys(line["calibration"] for line in document["summary"] if line["calibration"])
    rows += [["calibration", text] for text in calibrations]
    for facts in document["runs"]:
        commit = facts["commit"] or "installed package"
        rows.append(["commit", commit + (" with uncommitted changes" if facts["dirty"] else "")])
        if facts["device"]:
            rows.append(["device", facts["device"]])
        versions = facts["versions"] or {}
        rows.append(["versions", ", ".join(f"{name} {version}" for name, version in versions.items())])
    unique = [list(row) for row in dict.fromkeys(map(tuple, rows))]
    return _table(["what", "value"], unique, "What is needed to make this table again.")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{html.escape(row[0])}</th>'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="wide"><table><caption>{html.escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _figure(svg: str, caption: str, alt: str) -> str:
    picture = svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(alt)}" ', 1)
    return f'<figure class="wide">{picture}<figcaption>{html.escape(caption)}</figcaption></figure>'


def _page(document: Document, sections: Sequence[Section]) -> str:
    title = html.escape(f"{document['experiment']}: {document['model']['id'] or 'model'}")
    links = "".join(f'<a href="#{section.id}">{html.escape(section.title)}</a>' for section in sections)
    body = "\n".join(
        f'<section id="{section.id}"><h2>{html.escape(section.title)}</h2>\n{section.body}\n</section>'
        for section in sections
    )
    style = (files("espalier") / "assets" / "report.css").read_text(encoding="utf-8")
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>\n{style}</style>\n</head>\n<body>\n<header><p>Espalier report</p><h1>{title}</h1>"
        f"<nav>{links}</nav></header>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )
