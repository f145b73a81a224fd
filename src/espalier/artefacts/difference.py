"""Why two results differ: in the configuration of what they were made from, in code and machine, in their values."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from espalier.artefacts.lineage import Document, find, flat, newest_reports, record, title
from espalier.artefacts.store import MODELS, Store, content_hash, identity, read_json
from espalier.errors import UserError, nearest

FACTS = ("commit", "dirty", "versions", "runtime", "device", "host")  # that change no id
NOTHING = "(none)"


@dataclass(frozen=True)
class Result:
    """What a user means by A or B: a node, or a row or all rows of a table, by the nodes that stand for its values."""

    name: str
    store: Store
    nodes: dict[str, str]  # ids by what they are called in the result: a task, `row: task`, or a stage


@dataclass(frozen=True)
class Change:
    """One key in which nodes of a stage differ; `depth`: how far from the model they lie."""

    stage: str
    key: str
    a: Any
    b: Any
    depth: int


@dataclass(frozen=True)
class Value:
    """A measured value of both results, None where one has none."""

    name: str
    a: float | str | None
    b: float | str | None


@dataclass
class Comparison:
    """All that differs between two results.

    changes: of configurations, the furthest upstream first; `followers`: stages that differ only in what they were
    made from. facts: of the runs that made the two, which change no id. values: of both, equal ones too.
    """

    a: Result
    b: Result
    changes: list[Change] = field(default_factory=list)
    followers: list[str] = field(default_factory=list)
    facts: list[Change] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    same: int = 0  # named nodes of both that are one and the same


def compare(a: Result, b: Result) -> Comparison:
    """Compare two results with everything that they were made from."""
    found = Comparison(a, b)
    walk = _Walk(a.store, b.store)
    for name in _both(a.nodes, b.nodes):
        one, other = a.nodes.get(name), b.nodes.get(name)
        if one and other:
            found.same += one == other
            walk.pair(a.store.read_node(one), b.store.read_node(other))
        found.values += _values(name, a.store, one, b.store, other)
    found.changes = sorted(walk.changes, key=lambda change: change.depth)
    changed = {change.stage for change in found.changes}
    found.followers = [stage for stage in walk.different if stage not in changed]
    found.facts = _facts(walk)
    return found


def resolve(store: Store, text: str) -> Result:
    """Return what a user means: an id or its first digits, a path in results, EXPERIMENT, or EXPERIMENT:ROW.

    ROW is a row's name, with ` seed N` where several seeds have it (default: the first); the experiment is its newest
    table. UserError when there is no such thing.
    """
    experiment, colon, row = text.partition(":")
    reports = newest_reports(store)
    if experiment in reports:
        table = store.parent(store.read_node(reports[experiment]), "table")
        rows = {_row_name(each): each for each in table["config"]["rows"]}
        if not colon:
            nodes = {f"{name}: {part}": id for name, each in rows.items() for part, id in _parts(each).items()}
            return Result(f"{experiment} (table {table['id']})", store, nodes)
        if row not in rows:
            seeds = [name for name, each in rows.items() if each["label"] == row]
            if not seeds:
                raise UserError(f"{text}: no such row in the table of {experiment}; {nearest(row, list(rows))}.")
            row = seeds[0]
        return Result(f"{experiment}: {row}", store, _parts(rows[row]))
    if colon:
        raise UserError(f"{text}: no table of {experiment!r} in {store.root}; {nearest(experiment, list(reports))}.")
    path = Path(text)
    node = find(store, path.resolve().name.split(".")[0] if path.exists() else text)
    return Result(title(node), store, {node["stage"]: node["id"]})


def _parents(store: Store, node: Document) -> dict[str, Document]:
    """Parents by stage and what tells two of one stage apart: the probe, the task, else the label."""
    found: dict[str, Document] = {}
    for parent in map(store.read_node, node["parents"]):
        name = _what(parent, label=False)
        found[_what(parent) if name in found or parent["stage"] == "task" else name] = parent
    return found


def _what(node: Document, label: bool = True) -> str:
    own = node["config"].get("probe") or node["config"].get("task")
    return " ".join(dict.fromkeys(filter(None, [node["stage"], own, node["label"] if label else None])))


def _stands_for(node: Document) -> str:
    return "model" if node["stage"] in MODELS else str(node["stage"])


def _row_name(row: Document) -> str:
    return str(row["label"]) + ("" if row["seed"] is None else f" seed {row['seed']}")


def _parts(row: Document) -> dict[str, str]:
    """What a row's values are made by: its tasks, its times, else its checkpoint."""
    timed = {part: row[part] for part in ("speed", "kernels") if part in row}
    return row["scores"] | timed or {"checkpoint": row["weights"]}


def _both(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys([*a, *b]))


class _Walk:
    """Go up from pairs of nodes to all that they were made from, each pair once."""

    def __init__(self, a: Store, b: Store) -> None:
        self.a, self.b = a, b
        self.changes: list[Change] = []
        self.different: dict[str, None] = {}  # stages, in the order met
        self.pairs: dict[tuple[str, str], tuple[Document, Document]] = {}
        self._depths: dict[str, int] = {}

    def pair(self, a: Document, b: Document) -> None:
        """Compare two nodes that stand in one place."""
        if (a["id"], b["id"]) in self.pairs or (a["id"] == b["id"] and self.a is self.b):
            return
        self.pairs[a["id"], b["id"]] = a, b
        self._parents(a, b)
        if a["id"] == b["id"]:
            return
        self.different.setdefault(a["stage"])
        left, right = (dict(flat(identity(node["config"]))) for node in (a, b))
        for key in _both(left, right):
            if left.get(key) != right.get(key):
                self._add(a, key, left.get(key, NOTHING), right.get(key, NOTHING))
        if a["version"] != b["version"]:
            self._add(a, "version", a["version"], b["version"])

    def _parents(self, a: Document, b: Document) -> None:
        """Pair what two nodes were made from: by name, else by stage, models whatever made them."""
        parents = [_parents(store, node) for store, node in self._sides(a, b)]
        for name in [name for name in parents[0] if name in parents[1]]:
            self.pair(*(side.pop(name) for side in parents))
        ones, others = (list(side.values()) for side in parents)
        for one in ones:
            other = next((each for each in others if _stands_for(each) == _stands_for(one)), None)
            if other is None:
                self._add(a, "made from", _what(one), NOTHING)
                continue
            others.remove(other)
            if one["stage"] == other["stage"]:
                self.pair(one, other)
            else:
                self._models(one, other)
        for other in others:
            self._add(a, "made from", NOTHING, _what(other))

    def _models(self, a: Document, b: Document) -> None:
        """Take from two models the step that only one has, the last that was made, and pair what is left."""
        peeled = b if MODELS.index(b["stage"]) > MODELS.index(a["stage"]) else a
        store = self.b if peeled is b else self.a
        for step in (peeled, *store.parents(peeled, "plan")):
            for key, value in flat(identity(step["config"])) if step["config"] else ():
                self._add(step, key, *((NOTHING, value) if peeled is b else (value, NOTHING)))
        before = store.parent(peeled, *MODELS)
        one, other = (a, before) if peeled is b else (before, b)
        if one["stage"] == other["stage"]:
            self.pair(one, other)
        else:
            self._models(one, other)

    def _sides(self, a: Document, b: Document) -> tuple[tuple[Store, Document], tuple[Store, Document]]:
        return (self.a, a), (self.b, b)

    def _add(self, node: Document, key: str, a: Any, b: Any) -> None:
        change = Change(node["stage"], key, a, b, self._depth(node))
        if not any((c.stage, c.key, c.a, c.b) == (change.stage, key, a, b) for c in self.changes):
            self.changes.append(change)

    def _depth(self, node: Document) -> int:
        if node["id"] not in self._depths:
            store = self.a if self.a.has_node(node["id"]) else self.b
            self._depths[node["id"]] = 1 + max(map(self._depth, map(store.read_node, node["parents"])), default=0)
        return self._depths[node["id"]]


def _facts(walk: _Walk) -> list[Change]:
    """Return in what the runs of paired nodes differ, with the stages in which they do."""
    stages: dict[tuple[str, str, str], list[str]] = {}
    for a, b in walk.pairs.values():
        records = [record(store.path(node)) for store, node in walk._sides(a, b)]
        sides = [dict(flat({key: each[key] for key in FACTS if key in each})) for each in records]
        for key in sides[0].keys() & sides[1].keys():
            if sides[0][key] != sides[1][key]:
                found = stages.setdefault((key, json.dumps(sides[0][key]), json.dumps(sides[1][key])), [])
                found += [a["stage"]] if a["stage"] not in found else []
    changes = [Change(", ".join(where), key, json.loads(a), json.loads(b), 0) for (key, a, b), where in stages.items()]
    return sorted(changes, key=lambda change: [*FACTS].index(change.key.split(".")[0]))


def _values(name: str, a: Store, one: str | None, b: Store, other: str | None) -> Iterator[Value]:
    """Yield what two nodes of one name measured, or whether their files are equal."""
    sides = [{} if id is None else _measured(store, store.read_node(id)) for store, id in ((a, one), (b, other))]
    for part in _both(*sides):
        yield Value(f"{name} {part}".strip(), sides[0].get(part), sides[1].get(part))


def _measured(store: Store, node: Document) -> dict[str, float | str]:
    """The numbers of a task's or a score's artefact; of a plan the number of its layers' operations; else a hash."""
    path = store.path(node)
    if not path.exists():
        return {}
    if node["stage"] in ("task", "score"):
        tasks = read_json(path, "espalier.scores/1")["tasks"]
        wanted = [node["config"]["task"]] if node["stage"] == "task" else list(tasks)
        return {"" if node["stage"] == "task" else task: tasks[task]["value"] for task in wanted if task in tasks}
    if node["stage"] == "plan":
        layers = read_json(path, "espalier.plan/1")["layers"]
        return {f"layer {layer}": json.dumps(operations, sort_keys=True) for layer, operations in layers.items()}
    return {"content": content_hash(path)[:12]} if path.is_file() else {}
