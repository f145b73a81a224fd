"""The sections of a report that say how it was made: commits, versions, devices, and the command of every cell."""

from collections.abc import Mapping, Sequence
from typing import Any

from espalier.report.commands import Step
from espalier.report.material import Made, Material
from espalier.report.page import Section, code, details, table, text

Document = Mapping[str, Any]

UNKNOWN = "The override that makes this row alone is not known: the run that wrote its nodes did not keep it."


def anchors(material: Material) -> dict[str, str]:
    """Return the place on the page that says how each label's first row was made."""
    found: dict[str, str] = {}
    for number, made in enumerate(material.made):
        found.setdefault(made.label, f"row-{number}")
    return found


def whole(material: Material) -> Section:
    """Return what the table as a whole was made from."""
    document = material.table
    model = document["model"]
    rows = [["command", material.command or f"espalier run {document['experiment']}"]]
    rows.append(["model", f"{model['id']}, revision {model['revision'] or 'unknown'}"])
    if material.imported:
        left = "their plans are elsewhere, so that no map of them is drawn"
        rows.append(["imported results", f"{', '.join(material.imported)}: {left}"])
    calibrations = dict.fromkeys(line["calibration"] for line in document["summary"] if line["calibration"])
    rows += [["calibration", name] for name in calibrations]
    for facts in document["runs"]:
        rows.append(["commit", _commit(facts)])
        if facts["device"]:
            rows.append(["device", facts["device"]])
        versions = facts["versions"] or {}
        rows.append(["versions", ", ".join(f"{name} {version}" for name, version in versions.items())])
    unique = [list(row) for row in dict.fromkeys(map(tuple, rows))]
    body = table(["what", "value"], unique, "What is needed to make this table again.", prose=True)
    return Section("made", "How it was made", body)


def every_row(made: Sequence[Made]) -> Section:
    """Return the jobs of each row with their commands, in something that opens at a click."""
    note = (
        "Each row of the table with the jobs that it hangs on, in their order; the job score NODE makes the row's "
        "cells of the tasks that it names. A stage's command needs what the stages before it left in this run's folder "
        "of results."
    )
    body = [text(note)]
    for number, row in enumerate(made):
        alone = code(row.command) if row.command else text(UNKNOWN)
        header = ["command", "makes", "commit", "device", "seconds"]
        caption = "Jobs, each after those that it reads."
        jobs = table(header, [_job(step) for step in row.steps], caption)
        body.append(details(row.name, text("This row alone:") + alone + jobs, f"row-{number}"))
    return Section("rows", "The command of every cell", "\n".join(body))


def _job(step: Step) -> list[str]:
    record = step.record
    seconds = record.get("seconds")
    commit = _commit(record, 12) if record else "not recorded"
    return [
        step.command,
        step.what or "–",
        commit,
        str(record.get("device") or "–"),
        "–" if seconds is None else f"{seconds:.1f}",
    ]


def _commit(facts: Document, digits: int | None = None) -> str:
    commit = (facts.get("commit") or "installed package")[: digits if facts.get("commit") else None]
    return commit + (" with uncommitted changes" if facts.get("dirty") else "")
