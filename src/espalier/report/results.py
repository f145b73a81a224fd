"""The sections of a report that say what was measured: the table's tables, and how to read them."""

from collections.abc import Mapping
from typing import Any

from espalier.report.page import Section, bullets, strong, table
from espalier.tables import markup, renderings

Document = Mapping[str, Any]

HINT = (
    "Two methods differ when the intervals of their comparison with the uncompressed model are well apart; the "
    "intervals of the values themselves are wider, since they also hold how hard the items are."
)


def measured(document: Document, anchors: Mapping[str, str]) -> Section:
    """Return the tables of a table document; `anchors` are the places on the page that say how a label was made."""
    links = [anchors.get(line["label"], "made") for line in document["summary"]]
    parts = [strong(reason) for reason in document.get("not_reproduction") or ()]
    parts.append(
        table(*markup.main_rows(document), "Means over the tasks, with 95 % intervals.", links=links, sortable=True)
    )
    for title, (header, rows), said in renderings.sections(document):
        own = links if title == renderings.BY_TASK else ()
        prose = title == renderings.IN_PAIRS
        parts.append(table(header, rows, " ".join([f"{title}.", *said]), links=own, sortable=True, prose=prose))
    return Section("results", "Results", "\n".join(parts))


def reading(document: Document) -> Section:
    """Return what the columns mean."""
    return Section(
        "read", "How to read it", bullets([*(line.replace("`", "") for line in markup.legend(document)), HINT])
    )


def spoken(document: Document) -> str:
    """Say the numbers in words, for those who do not see the figure."""
    parts = []
    for line in document["summary"]:
        said = [f"{line[count] / 1e6:.2f} million {count} parameters" for count in ("unique", "active")]
        if "perplexity" in line:
            said.append(f"perplexity {markup.number(line['perplexity']['value'])}")
        if "accuracy" in line:
            said.append(f"accuracy {markup.percent(line['accuracy']['value'])} %")
        parts.append(f"{line['label']}: {', '.join(said)}")
    return "; ".join(parts) + "."
