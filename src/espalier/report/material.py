"""What a report is about, gathered from a folder of results: the table, and of each of its lines how it came about."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier import methods
from espalier.artefacts.store import MODELS, Store, elsewhere, read_json
from espalier.checkpoints.checkpoint import Checkpoint
from espalier.checkpoints.shape import DenseShape, ModelShape
from espalier.collecting.stats import Stats
from espalier.errors import UserError
from espalier.inputs.tokens import load_tokens
from espalier.plans.operations import Merge, Skip
from espalier.plans.plan import Plan
from espalier.report import skipping
from espalier.report.commands import Step, run_command, steps
from espalier.report.skipping import Skipping
from espalier.tables.table import load_table
from espalier.training import curves
from espalier.training.curves import Curve

Document = Mapping[str, Any]
Floats = NDArray[np.float64]
Shape = ModelShape | DenseShape

SAMPLES = "inputs"  # a probe that keeps whole tokens, of which no figure shows anything
LINES = 48  # of the table, of which decisions, trainings and skipping are shown


@dataclass(frozen=True)
class Line:
    """What is known of a line of the table beside its numbers, of its first seed, or the first whose plan is here.

    `plans` in the order in which they were carried out; `active` what its scores measured of what a token runs;
    `distances` [E, E] by layer, by which experts were grouped; `curves` of what was trained for it.
    """

    label: str
    plans: tuple[Plan, ...] = ()
    active: Document = field(default_factory=dict)
    distances: Mapping[int, Floats] = field(default_factory=dict)
    skipping: Skipping | None = None
    curves: tuple[Curve, ...] = ()


@dataclass(frozen=True)
class Made:
    """How a row of the table was made: its label and name, its jobs, and the command that makes it alone.

    `command` is None where the points of the sweep are not known.
    """

    label: str
    name: str
    steps: tuple[Step, ...]
    command: str | None


@dataclass(frozen=True)
class Material:
    """All that a report shows. `table` is its document, `lines` are of its first LINES.

    `stats` hold the probe `usage`; `kernels` are documents `espalier.kernel_speed/2` by the label of their row; `shape`
    is that of the uncompressed model, None if it is gone; `words` are the texts of the tokens that `Line.skipping`
    names; `command` made the table; `imported` are the labels of lines whose plans are not here, but their results.
    """

    table: Document
    lines: tuple[Line, ...] = ()
    stats: Sequence[Stats] = ()
    kernels: Mapping[str, Document] = field(default_factory=dict)
    shape: Shape | None = None
    words: Mapping[int, str] = field(default_factory=dict)
    command: str = ""
    made: tuple[Made, ...] = ()
    imported: tuple[str, ...] = ()


def gather(node: Document, store: Store) -> Material:
    """Read what there is for the report of a `report` node.

    The table must be there; of what else is gone (a deleted checkpoint, a model elsewhere) the report says less.
    """
    own = _Gatherer(store)
    parents = [store.read_node(id) for id in node["parents"]]
    table_node = next(parent for parent in parents if parent["stage"] == "table")
    rows, how = table_node["config"]["rows"], node["config"].get("_run", {})
    seeds: dict[str, list[Document]] = {}
    for row in rows:
        seeds.setdefault(row["label"], []).append(row)
    lines = tuple(own.line(label, min(seeds[label], key=own.lacks_plan)) for label in list(seeds)[:LINES])
    paths = {row["label"]: store.path(store.read_node(row["kernels"])) for row in rows if "kernels" in row}
    probed = [store.path(parent) for parent in parents if parent["stage"] == "probe"]
    experiment = node["config"]["experiment"]
    origin = store.origin(store.read_node(rows[0]["weights"]))
    return Material(
        table=load_table(store.path(table_node)),
        lines=lines,
        stats=[Stats.load(path, probes=("usage",)) for path in probed if not elsewhere(path)],
        kernels={label: read_json(path, "espalier.kernel_speed/2") for label, path in paths.items()},
        shape=own.shape(origin),
        words=own.words(origin, lines),
        command=run_command(experiment, how, store.root),
        made=own.made(table_node["config"], how),
        imported=tuple(own.imported),
    )


class _Gatherer:
    """Reads a folder of results; what several lines share is read once."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.imported: list[str] = []  # labels of lines without their plans
        self._stats = lru_cache(maxsize=4)(lambda paths, probes: Stats.load(*paths, probes=probes))

    def lacks_plan(self, row: Document) -> bool:
        """Whether a row's plan came with imported results, which leave plans where they were made."""
        return bool(row["plan"]) and elsewhere(self.store.path(self.store.read_node(row["plan"])))

    def line(self, label: str, row: Document) -> Line:
        """Return what is known of a row of the table's configuration."""
        plan_nodes, plans, trained = [], [], []
        node = self.store.read_node(row["weights"])
        while node["stage"] != "fetch":
            if node["stage"] == "tune":
                trained += curves.of_tuning(self.store.path(node), label)
            if node["stage"] == "apply":
                plan_node = self.store.parent(node, "plan")
                path = self.store.path(plan_node)
                if elsewhere(path):
                    self.imported.append(label)
                    return Line(label, active=self._active(row))
                plan_nodes.append(plan_node)
                plans.append(Plan.load(path))
                learnt = [curves.of_fit(self.store.path(fit), label) for fit in self.store.parents(plan_node, "fit")]
                trained += [curve for curve in learnt if curve is not None]
            node = self.store.parent(node, *MODELS)
        plan_nodes.reverse()
        plans.reverse()
        distances: dict[int, Floats] = {}
        skips = None
        for number, plan_node in enumerate(plan_nodes):
            if number == 0:
                distances = self._distances(plan_node, plans[0])
            skips = self._skipping(plan_node, plans[: number + 1]) or skips
        return Line(label, tuple(plans), self._active(row), distances, skips, tuple(reversed(trained)))

    def _active(self, row: Document) -> Document:
        """Return what the process that measured on the most text found that a token runs."""
        paths = dict.fromkeys(self.store.path(id) for id in row["scores"].values())
        found = [read_json(path, "espalier.scores/1")["active"] for path in paths if path.exists()]
        return max(found, key=lambda active: float(active["tokens"]), default={})

    def _distances(self, plan_node: Document, plan: Plan) -> dict[int, Floats]:
        if not _does(plan, Merge):
            return {}
        stats, method = self._evidence(plan_node)
        if stats is None or not isinstance(stats.shape, ModelShape):
            return {}
        return methods.distances_of(method, stats, stats.shape)

    def _skipping(self, plan_node: Document, plans: Sequence[Plan]) -> Skipping | None:
        stats = self._evidence(plan_node)[0] if _does(plans[-1], Skip) else None
        if stats is None or "routing" not in stats.probes:
            return None
        tokens = self.store.path(self.store.parent(self.store.parent(dict(plan_node), "probe"), "tokens"))
        if not tokens.exists():
            return None
        ids, mask, _ = load_tokens(tokens, None)
        return skipping.what_tokens_skip(plans, stats, ids.ravel() if mask is None else ids[mask.astype(bool)])

    def _evidence(self, plan_node: Document) -> tuple[Stats | None, Any]:
        """Return the statistics that a plan was made from but for SAMPLES, None if there are none, and its method."""
        method = methods.build({key: value for key, value in plan_node["config"].items() if key != "dtype"})
        probes = [p for p in self.store.parents(dict(plan_node), "probe") if p["config"]["probe"] != SAMPLES]
        paths = tuple(dict.fromkeys(self.store.path(probe) for probe in probes))
        if not paths or not all(path.exists() for path in paths):
            return None, method
        return self._stats(paths, tuple(probe["config"]["probe"] for probe in probes)), method

    def shape(self, origin: Document) -> Shape | None:
        """Return the shape of the model that all began with, if it is on this machine."""
        directory = self._directory(origin)
        try:
            return None if directory is None else Checkpoint(directory).any_shape()
        except (UserError, OSError):
            return None

    def _directory(self, origin: Document) -> Path | None:
        artefact = self.store.path(dict(origin))
        if not artefact.exists():
            return None
        directory = Path(read_json(artefact, "espalier.model/1")["path"])
        return directory if directory.is_dir() else None

    def words(self, origin: Document, lines: Sequence[Line]) -> dict[int, str]:
        """Return the texts of the tokens that lines name, if the model's tokenizer is on this machine."""
        named = {
            word.id
            for line in lines
            if line.skipping is not None
            for word in (*line.skipping.fewest, *line.skipping.most)
        }
        directory = self._directory(origin)
        if not named or directory is None or not (directory / "tokenizer.json").exists():
            return {}
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        return {id: tokenizer.decode([id], skip_special_tokens=False) for id in sorted(named)}

    def made(self, table: Document, how: Document) -> tuple[Made, ...]:
        """Return how each row of a table's configuration was made, if `how` says the run's overrides and points."""
        found: list[Made] = []
        full: dict[str, int] = {}  # the first row of each model that is left as it was
        origins = [self.store.origin(self.store.read_node(row["weights"]))["id"] for row in table["rows"]]
        for number, (row, origin) in enumerate(zip(table["rows"], origins, strict=True)):
            if row["weights"] == origin:
                full.setdefault(origin, number)
        for number, row in enumerate(table["rows"]):
            name = row["label"] if row["seed"] is None else f"{row['label']}, seed {row['seed']}"
            beside = [full.get(origins[number], number), number]
            root = self.store.root
            command = run_command(table["experiment"], how, root, beside) if "points" in how else None
            found.append(Made(row["label"], name, tuple(steps(row, self.store)), command))
        return tuple(found)


def _does(plan: Plan, operation: type[Merge] | type[Skip]) -> bool:
    return any(isinstance(op, operation) for operations in plan.layers.values() for op in operations)
