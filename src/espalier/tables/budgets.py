"""Rows whose gates were trained at another share than the one asked for; imports no torch."""

from collections.abc import Sequence
from typing import Any

from espalier.artefacts.store import MODELS, Store, read_json, run_record_path

FAR = 0.1  # of the neurons or tokens: what a threshold that is set afterwards moves without a new model being needed

Document = dict[str, Any]


def missed(rows: Sequence[Document], store: Store) -> list[Document]:
    """Return `label`, `target` and `share` of each row whose training ended more than FAR from its target.

    `rows` are those of a table node; `share` is what ran in the last tenth of the steps. Such a row meets its target
    by the threshold alone, on a model that never learnt to do without the rest.
    """
    found = []
    for row in rows:
        node = store.read_node(row["weights"])
        while node["stage"] != "fetch":
            record = run_record_path(store.path(node))
            if node["stage"] == "tune" and record.exists():
                target = node["config"]["tuning"].get("target")
                share = read_json(record, "espalier.run/1").get("tune", {}).get("trained_share")
                if target is not None and share is not None and abs(share - target) > FAR:
                    found.append({"label": row["label"], "target": target, "share": share})
            node = store.parent(node, *MODELS)
    return found


def sentence(entries: Sequence[Document]) -> str:
    """Say in a line which rows these are, and how far off each was."""
    said = dict.fromkeys(
        f"{entry['label']} ({100 * entry['share']:.0f} % for {100 * entry['target']:.0f} %)" for entry in entries
    )
    return (
        "Trained at another share of neurons or tokens than was asked for, which only the threshold set afterwards "
        f"meets (tuning.router_rate too low or too high?): {', '.join(said)}."
    )
