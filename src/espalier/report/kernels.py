"""The sections of a report about timed kernels: rooflines and tables, which are also written as files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from espalier.artefacts.store import atomic_file
from espalier.figures import roofline, style
from espalier.report.page import Section, figure, table
from espalier.timing import kernel_table

Document = Mapping[str, Any]

SAID = "FLOPs a second of each implementation against FLOPs a byte, under what the machine can do at most."
SUMMARY = "Our kernels beside transformers' best and the uncompressed block, each row in one run; medians of ratios."
SHARED = "What the router chose on the calibration text: what merging joins, and the experts of a batch."


def timed(documents: Mapping[str, Document], folder: Path) -> list[Section]:
    """Return the sections about `documents` by the label of their row, and write their tables into `folder`."""
    if not documents:
        return []
    with atomic_file(folder / "kernels.md") as temporary:
        temporary.write_text(kernel_table.markdown(documents), encoding="utf-8")
    with atomic_file(folder / "kernels.csv") as temporary:
        kernel_table.timed_frame(documents).to_csv(temporary, index=False)
    element = style.svg(roofline.roofline(documents))
    style.save(element, folder / "roofline.svg")
    body = table(*kernel_table.summary_rows(documents), SUMMARY, sortable=True)
    body += figure(element, SAID, "Rooflines, a panel a row.", "roofline")
    sections = [Section("roofline", "Kernels and the roofline", body)]
    for number, (label, document) in enumerate(documents.items()):
        body = table(*kernel_table.timed_rows(document), kernel_table.caption(document), sortable=True)
        if document["routing"]:
            body += table(*kernel_table.routing_rows(document), SHARED)
        if document["compiled"]:
            body += table(*kernel_table.compiled_rows(document), kernel_table.COMPILED)
        sections.append(Section(f"kernels-{number}", f"Kernels: {label}", body))
    return sections
