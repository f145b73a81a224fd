"""The commands that make a row of a table again: its stages one by one, or the row alone through the pipeline."""

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from espalier.artefacts.store import Store, read_json, run_record_path
from espalier.workflow.sweep import AS, LABEL, NAMES

Document = Mapping[str, Any]
RESULTS = "results"  # where results lie if nobody says otherwise
PLAIN = re.compile(r"[A-Za-z_][\w.-]*")  # what Hydra reads as a string without quotes
KEY = re.compile(
    r"[\w/+.$%*@?|()\[\]{}:=, -]+", re.ASCII
)  # what a key of a mapping can be to Hydra, some of it escaped
WORDS = ("true", "false", "null", "nan", "inf")  # but for these, in any case


@dataclass(frozen=True)
class Step:
    """A job on the way to a row: its node, the command, and the record of its run (empty if that is gone)."""

    node: Document
    command: str
    record: Document

    @property
    def what(self) -> str:
        """What the job makes, beside its stage."""
        config = self.node["config"]
        if "tasks" in config:
            return ", ".join(str(task["task"]) for task in config["tasks"])
        if "probes" in config:
            return ", ".join(map(str, config["probes"]))
        return str(self.node["label"])


def steps(row: Document, store: Store) -> list[Step]:
    """Return the jobs that the row of a table's configuration hangs on, each after those that it reads."""
    ends = [row["weights"], *row["scores"].values(), *(row[key] for key in ("speed", "kernels") if key in row)]
    found: dict[str, Document] = {}
    for id in ends:
        for node in _before(id, store, found):
            found[node["id"]] = node
    return [Step(node, stage_command(node, store.root), _record(node, store)) for node in found.values()]


def _before(id: str, store: Store, known: Mapping[str, Document]) -> Iterator[Document]:
    """Yield the job that makes a node, after the jobs that make its parents; none that is `known`."""
    node = store.read_node(id)
    node = store.read_node(node["made_by"]) if node["made_by"] else node
    if node["id"] in known:
        return
    for parent in node["parents"]:
        yield from _before(parent, store, known)
    yield node


def _record(node: Document, store: Store) -> Document:
    path = run_record_path(store.path(dict(node)))
    return read_json(path, "espalier.run/1") if path.exists() else {}


def stage_command(node: Document, root: Path) -> str:
    """Return the command of the job that makes a node."""
    return shlex.join(["espalier", node["stage"], node["id"], *_results(root)])


def run_command(experiment: str, how: Document, root: Path, numbers: Sequence[int] | None = None) -> str:
    """Return the command of the run that made a table, or of one that makes the rows `numbers` alone.

    `how` has the `overrides` of the run and the `points` of its rows.
    """
    overrides = [str(override) for override in how.get("overrides", ())]
    if numbers is not None:
        blocks = [_block(how["points"][number]) for number in dict.fromkeys(numbers)]
        overrides = [override for override in overrides if not override.lstrip("+").startswith("sweep=")]
        overrides.append(f"sweep={_grammar(blocks)}")
    return shlex.join(["espalier", "run", experiment, *overrides, *_results(root)])


def _block(point: Document) -> dict[str, Any]:
    """Return the block of a sweep that is this point alone, under the name that it has in the sweep."""
    names = point.get(NAMES, {})
    block: dict[str, Any] = {AS: point[LABEL]} if LABEL in point else {}
    for key, value in point.items():
        if key in (LABEL, NAMES):
            continue
        if KEY.fullmatch(names.get(key, "")):
            block[key] = {names[key]: value}
        else:
            block[key] = [value] if isinstance(value, list | dict) else value  # else each item were a value
    return block


def _results(root: Path) -> list[str]:
    return [] if str(root) == RESULTS else ["--results", str(root)]


def _grammar(value: Any) -> str:
    """Return a value as Hydra's grammar of overrides reads it."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_key(str(key))}:{_grammar(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ",".join(map(_grammar, value)) + "]"
    if isinstance(value, str):
        if PLAIN.fullmatch(value) and value.lower() not in WORDS:
            return value
        return "'" + _escaped(value) + "'"
    return json.dumps(value)


def _key(text: str) -> str:
    """Return a key of a mapping as Hydra's grammar reads it: it knows no quotes there."""
    return re.sub(r"([()\[\]{}:=, ])", r"\\\1", text)


def _escaped(text: str) -> str:
    """Escape a string for Hydra's quotes: a quote, and backslashes before a quote or at the end."""
    text = re.sub(r"(\\*)'", lambda found: found[1] * 2 + r"\'", text)
    return re.sub(r"(\\+)$", lambda found: found[1] * 2, text)
