"""Turn Hydra experiments into a graph of content-addressed nodes, in the main process; imports no torch."""

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from espalier import conf, methods, sources
from espalier.errors import UserError, nearest
from espalier.store import Node, Store, canonical, content_hash, digest, write_json

Config = dict[str, Any]
Point = dict[str, Any]  # override key -> value


@dataclass(frozen=True)
class Experiment:
    """The nodes of one experiment, parents before children; the report is the last."""

    name: str
    nodes: tuple[Node, ...]
    run: Config  # runtime and tracking: what jobs need to know beside their node

    @property
    def target(self) -> Node:
        return self.nodes[-1]


def points(sweep: Sequence[Config]) -> Iterator[Point]:
    """Yield the points of a sweep: blocks one after another, keys crossed, `zip` keys walked together.

    UserError when the lists of a `zip` differ in length or a block is not a mapping.
    """
    for block in sweep:
        if not isinstance(block, dict):
            raise UserError(f"sweep: {block!r} is not a mapping of keys to values.")
        axes: list[list[Point]] = []
        for key, values in block.items():
            if key == "zip":
                columns = {name: _values(column) for name, column in values.items()}
                lengths = {name: len(column) for name, column in columns.items()}
                if len(set(lengths.values())) > 1:
                    raise UserError(f"sweep.zip: lists of different lengths {lengths}. Give each key as many values.")
                rows = zip(*columns.values(), strict=True)
                axes.append([dict(zip(columns, row, strict=True)) for row in rows])
            else:
                axes.append([{key: value} for value in _values(values)])
        for combination in itertools.product(*axes):
            yield {key: value for part in combination for key, value in part.items()}


def _values(values: Any) -> list[Any]:
    return list(values) if isinstance(values, list) else [values]


class Composer:
    """Compose points with Hydra: once per choice of groups, values are set on a copy.

    A thousand points over four methods are four compositions and a thousand cheap updates.
    """

    def __init__(self, experiment: str, overrides: Sequence[str]) -> None:
        self.experiment = experiment
        self.overrides = [f"+experiment={experiment}", *_file_overrides(overrides)]
        self._composed: dict[tuple[str, ...], Config] = {}
        if not (conf.directory() / "experiment" / f"{experiment}.yaml").exists():
            known = nearest(experiment, conf.names("experiment"))
            raise UserError(f"experiment={experiment}: no conf/experiment/{experiment}.yaml; {known}.")

    def sweep(self) -> list[Config]:
        """Return the experiment's `sweep`, a list of blocks."""
        blocks: list[Config] = self._group(())["sweep"]
        return blocks

    def compose(self, point: Point) -> Config:
        """Return the configuration of one point as plain dictionaries, interpolations resolved, without `sweep`.

        UserError for a group's unknown choice or a key that does not exist.
        """
        from omegaconf import OmegaConf

        groups = tuple(o for key, value in point.items() if _is_group(key) for o in _file_overrides([f"{key}={value}"]))
        composed = self._group(groups)
        config = copy.deepcopy({key: value for key, value in composed.items() if key != "sweep"})
        for key, value in point.items():
            if not _is_group(key):
                self._set(config, key, value)
        if "${" in canonical(config):
            config = OmegaConf.to_container(OmegaConf.create(config), resolve=True)  # type: ignore[assignment]
        return config

    def _set(self, config: Config, key: str, value: Any) -> None:
        *path, last = key.split(".")
        holder: Any = config
        for name in path:
            holder = holder.get(name) if isinstance(holder, dict) else None
        if not isinstance(holder, dict) or last not in holder:
            raise UserError(_unknown_key(self.experiment, key, config))
        holder[last] = value

    def _group(self, groups: tuple[str, ...]) -> Config:
        from hydra import compose, initialize_config_dir
        from hydra.errors import HydraException
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        if groups not in self._composed:
            try:
                with initialize_config_dir(str(conf.directory()), version_base="1.3"):
                    # Group choices of the point come after the user's, so that a sweep wins over a default.
                    composed = compose("config", [*self.overrides, *groups])
                    self._composed[groups] = OmegaConf.to_container(composed, resolve=False)  # type: ignore[assignment]
            except (HydraException, OmegaConfBaseException) as error:
                raise UserError(_compose_error(error, [*self.overrides[1:], *groups])) from None
        return self._composed[groups]


def _is_group(key: str) -> bool:
    return (conf.directory() / key.split("@")[0]).is_dir()


def _file_overrides(overrides: Sequence[str]) -> list[str]:
    """Let a path stand where a calibration is named: `calibration=PATH` becomes the `file` calibration of PATH."""
    result = []
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "calibration" and value not in conf.names("calibration") and Path(value).is_file():
            result += ["calibration=file", f"calibration.path='{Path(value).resolve()}'"]
        else:
            result.append(override)
    return result


def _compose_error(error: Exception, overrides: Sequence[str]) -> str:
    for override in overrides:
        key, _, value = override.partition("=")
        group = key.lstrip("+~").split("@")[0]
        if (conf.directory() / group).is_dir() and value not in conf.names(group):
            return f"{override}: no conf/{group}/{value}.yaml; {nearest(value, conf.names(group))}."
    first = str(error).strip().splitlines()[0]
    return f"overrides {' '.join(overrides)}: {first}"


def _unknown_key(experiment: str, key: str, config: Config) -> str:
    group, _, name = key.partition(".")
    within = config.get(group) if name else None
    file, keys = "conf/config.yaml", list(config)
    if isinstance(within, dict):
        file, keys = f"conf/{group}/{within.get('name', '?')}.yaml", [k for k in within if k != "_target_"]
    known = nearest(name or key, keys)
    return f"conf/experiment/{experiment}.yaml: sweep key {key!r} is not in {file}; {known}."


def expand(experiment: str, overrides: Sequence[str], store: Store) -> Experiment:
    """Compose one experiment and return its nodes.

    UserError for unknown names and keys, or a method that does not fit its configuration.
    """
    composer = Composer(experiment, overrides)
    base = composer.compose({})
    builder = _Builder(store)
    rows: list[Config] = []
    swept = list(points(composer.sweep()))
    _refuse_shadowed(experiment, overrides, swept)
    for point in swept:
        config = composer.compose(point)
        row = builder.row(config, point)
        if row not in rows:
            rows.append(row)
    scores = [id for row in rows for id in row["scores"].values()]
    plans = [row["plan"] for row in rows if row["plan"]]
    baseline = next((n for n, row in enumerate(rows) if row["plan"] is None), None)
    compare = _published(base.get("compare"))
    table_config = {"experiment": experiment, "rows": rows, "baseline": baseline, "compare": compare}
    table = builder.add(Node("table", table_config, tuple(dict.fromkeys([*scores, *plans])), experiment))
    usage = tuple(dict.fromkeys(builder.usage))
    builder.add(Node("report", {"experiment": experiment}, (table, *dict.fromkeys(plans), *usage), experiment))
    run = {"runtime": base["runtime"], "tracking": base["tracking"]}
    return Experiment(experiment, tuple(builder.nodes.values()), run)


def _refuse_shadowed(experiment: str, overrides: Sequence[str], swept: Sequence[Point]) -> None:
    """A sweep wins over an override of the same key, which would then do nothing without a word."""
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if any(key in point for point in swept):
            raise UserError(
                f"{override}: the sweep of conf/experiment/{experiment}.yaml sets {key!r} itself. "
                f"Give another sweep: 'sweep=[{{{key}: {value}}}]'."
            )


def _published(compare: str | None) -> Config | None:
    if compare is None:
        return None
    path = conf.directory() / compare
    if not path.exists():
        raise UserError(f"compare={compare}: no such file {path}. Name a CSV under conf/paper.")
    return {"file": compare, "sha256": content_hash(path)}


class _Builder:
    """Collect the nodes of all points; equal nodes are shared because their ids are equal."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.nodes: dict[str, Node] = {}
        self.usage: list[str] = []
        # Content hashes read files: once each, however many points name them.
        self._model_revision = cache(lambda id, revision: sources.revision_of(id, revision, store.root))
        self._task_revision = cache(sources.task_revision)
        self._calibration_revision: dict[str, str | None] = {}

    def add(self, node: Node) -> str:
        self.nodes.setdefault(node.id, node)
        return node.id

    def row(self, config: Config, point: Point) -> Config:
        """Add one point's nodes, from the model to its scores, and return the point's row of the table."""
        model, label = config["model"], _label(config, point)
        fetch = self.add(Node("fetch", self._fetch(model), label=str(model["id"])))
        weights, plan = fetch, None
        shards = _shards(config["calibration"])
        steps = [config[key] for key in ("method", "then") if config[key]["name"] != "none"]
        for step in steps:
            method = methods.build(step)  # a bad key is told before anything runs
            tokens = self.add(Node("tokens", self._calibration(config["calibration"]), (fetch,), "calibration"))
            probes = [self._probe(name, weights, tokens, model, shards) for name in method.probes]
            plan = self.add(Node("plan", step, (weights, *probes), label))
            weights = self.add(Node("apply", {}, (weights, plan), label))
        if steps:
            tokens = self.add(Node("tokens", self._calibration(config["calibration"]), (fetch,), "calibration"))
            self.usage.append(self._probe("usage", fetch, tokens, model, shards))
        return {
            "label": label,
            "method": config["method"]["name"],
            "ratio": config["method"].get("ratio"),
            "then": None if config["then"]["name"] == "none" else config["then"]["name"],
            "seed": next((step["seed"] for step in steps if "seed" in step), None),
            "plan": plan,
            "weights": weights,
            "scores": {task["task"]: self._task(task, weights, label) for task in self._tasks(config)},
        }

    def _fetch(self, model: Config) -> Config:
        id = str(model["id"])
        return {"id": id, "revision": self._model_revision(id, model.get("revision"))}

    def _calibration(self, calibration: Config) -> Config:
        calibration = {name: value for name, value in calibration.items() if name != "shards"}
        key = canonical(calibration)
        if key not in self._calibration_revision:
            self._calibration_revision[key] = sources.calibration_revision(calibration)
        return calibration | {"content": self._calibration_revision[key]}

    def _probe(self, name: str, weights: str, tokens: str, model: Config, shards: int) -> str:
        config = {"probe": name, "dtype": model["dtype"], "_shards": shards}
        return self.add(Node("probe", config, (weights, tokens), name))

    def _task(self, task: Config, weights: str, label: str) -> str:
        return self.add(Node("task", task, (weights,), f"{label}: {task['task']}"))

    def _tasks(self, config: Config) -> list[Config]:
        evaluation = {key: value for key, value in config["evaluation"].items() if key not in ("tasks", "name")}
        settings = evaluation | {"dtype": config["model"]["dtype"]}
        return [
            settings | {"task": task, "content": self._task_revision(task)} for task in config["evaluation"]["tasks"]
        ]


def _shards(calibration: Config) -> int:
    """Return the number of jobs that share a calibration; how many they are is no part of any identity."""
    shards = calibration.get("shards", 1)
    if not isinstance(shards, int) or isinstance(shards, bool) or shards < 1:
        raise UserError(f"conf/calibration: shards={shards!r} is not a number of jobs. Use 1 or more.")
    return shards


def _label(config: Config, point: Point) -> str:
    """The name of a table's row: the method, what it removes, and what else the sweep varies but the seed."""
    method, then = config["method"], config["then"]
    parts = ["full" if method["name"] == "none" else method["name"]]
    if method.get("ratio") is not None:
        parts.append(f"{100 * method['ratio']:g} %")
    if then["name"] != "none":
        parts = [] if method["name"] == "none" else [*parts, "+"]
        parts.append(then["name"])
    known = {"method", "method@then", "method.ratio", "method.seed", "then.seed"}
    parts += [f"{key.removeprefix('method.')}={value}" for key, value in point.items() if key not in known]
    return " ".join(parts)


def save(experiment: Experiment, store: Store) -> dict[str, Any]:
    """Write the nodes that are not there yet and return the document of the target.

    Probes (and tasks) that are new get one collecting (scoring) node together, so that one forward pass
    (one process) makes them all; those that another run asked for first keep the node that makes them.
    """
    bundles: dict[tuple[str, ...], list[Node]] = {}
    for node in experiment.nodes:
        if node.stage in ("probe", "task") and not store.has_node(node.id):
            shards = str(node.config.get("_shards", 1))
            bundles.setdefault((node.stage, *node.parents, str(node.config["dtype"]), shards), []).append(node)
    makers: dict[str, str] = {}
    for (stage, *parents, dtype, shards), members in bundles.items():
        members.sort(key=lambda node: node.id)
        if stage == "probe":
            config = {"probes": [node.config["probe"] for node in members], "dtype": dtype}
            maker = _collecting(config, tuple(parents), int(shards), store)
        else:
            config = {"tasks": [node.config for node in members], "dtype": dtype}
            maker = Node("score", config, tuple(parents), members[0].label.rsplit(":", 1)[0])
        store.write_node(maker)
        makers |= dict.fromkeys((node.id for node in members), maker.id)
    for node in experiment.nodes:
        store.write_node(replace(node, made_by=makers.get(node.id, "")))
    return store.read_node(experiment.target.id)


def _collecting(config: Config, parents: tuple[str, ...], shards: int, store: Store) -> Node:
    """Return the node that collects some probes; with shards it reduces what a job a shard collects."""
    label = f"{len(config['probes'])} probes"
    if shards == 1:
        return Node("collect", config, parents, label)
    parts = [
        Node("collect", config | {"shard": [n, shards]}, parents, f"{label}, {n + 1} of {shards}")
        for n in range(shards)
    ]
    for part in parts:
        store.write_node(part)
    return Node("reduce", config, tuple(part.id for part in parts), label)


def save_run(experiment: Experiment, store: Store) -> str:
    """Write the runtime and tracking settings under their hash and return it: jobs find them by that name."""
    id = digest(experiment.run)
    path = store.run_path(id)
    if not store.dry and not path.exists():
        write_json(path, {"format": "espalier.runtime/1"} | experiment.run)
    return id
