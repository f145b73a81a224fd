"""One self-contained HTML file about a table: what was measured, what was decided, how it was made."""

from pathlib import Path

from espalier.artefacts.store import atomic_file
from espalier.report.material import Material
from espalier.report.page import render
from espalier.report.provenance import anchors, every_row, whole
from espalier.report.results import measured, reading


def make_report(material: Material, out: Path) -> Path:
    """Write the report of what was gathered (`material.gather`) to `out` and return it.

    What there is no material for is left out. The figures are saved beside the report too, as `{out's stem}/*.svg`, and
    tables of kernels as `{out's stem}/kernels.md` and `.csv`.
    """
    from espalier.report.figures import drawn  # matplotlib takes a second
    from espalier.report.kernels import timed

    document, folder = material.table, out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.svg"):  # of a report that was made before with other sections
        old.unlink()
    sections = [
        measured(document, anchors(material)),
        reading(document),
        *drawn(material, folder),
        *timed(material.kernels, folder),
        whole(material),
        *([every_row(material.made)] if material.made else []),
    ]
    title = f"{document['experiment']}: {document['model']['id'] or 'model'}"
    with atomic_file(out) as temporary:
        temporary.write_text(render(title, sections), encoding="utf-8")
    return out
