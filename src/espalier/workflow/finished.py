"""Which rows of an experiment's table are scored, and the table of those alone."""

from collections.abc import Sequence
from typing import Any

from espalier.artefacts.store import Node, Store
from espalier.errors import UserError
from espalier.workflow.graph import TIMES, Experiment, table_node

Row = dict[str, Any]


def table_of(experiment: Experiment) -> Node:
    """Return the experiment's table node."""
    return next(node for node in experiment.nodes if node.stage == "table")


def split(experiment: Experiment, store: Store) -> tuple[list[Row], list[Row]]:
    """Return the rows whose scores are all there, without the times that are not, and the other rows."""
    finished: list[Row] = []
    waiting: list[Row] = []
    for row in table_of(experiment).config["rows"]:
        if all(store.path(id).exists() for id in row["scores"].values()):
            gone = [kind for kind in TIMES if kind in row and not store.path(row[kind]).exists()]
            finished.append({key: value for key, value in row.items() if key not in gone})
        else:
            waiting.append(row)
    return finished, waiting


def so_far(experiment: Experiment, store: Store) -> tuple[Node, list[Row]]:
    """Return the node of the table of the rows that are scored, and the other rows.

    Where nothing is missing it is the table that the experiment ends with. The experiment's nodes must be known to
    `store` (`graph.save`). UserError when no row is scored.
    """
    finished, waiting = split(experiment, store)
    if not finished:
        raise UserError(
            f"{experiment.name}: none of {len(waiting)} rows is scored in {store.root}. Give --results the folder "
            f"of the run, or start it: espalier run {experiment.name}."
        )
    whole = table_of(experiment)
    return table_node(whole.config | {"rows": finished}), waiting


def names(rows: Sequence[Row], most: int = 8) -> str:
    """Return what rows are called, in a line."""
    said = [row["label"] + ("" if row["seed"] is None else f" (seed {row['seed']})") for row in rows]
    return ", ".join(said[:most]) + (f" and {len(said) - most} more" if len(said) > most else "")
