"""Turn Hydra experiments into a graph of content-addressed nodes, in the main process; imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from espalier import conf, methods
from espalier.artefacts.store import Node, Store, canonical, content_hash, digest, identity, write_json
from espalier.artefacts.temporary import only_scored
from espalier.checkpoints.checkpoint import Checkpoint
from espalier.errors import UserError, nearest
from espalier.inputs import sources
from espalier.inputs.calibration_settings import check_calibration
from espalier.models.running import Running, check_dtype
from espalier.scoring.score_settings import BY_TASK, check_evaluation
from espalier.timing.kernel_settings import KernelBench
from espalier.timing.speed_settings import Timing
from espalier.training.tune_settings import Tuning
from espalier.workflow.labels import left, model_name, published_row, row_label
from espalier.workflow.sweep import Composer, Config, Point, is_seed, is_shown, overrides_of, points

TIMES = ("speed", "kernels")  # what may be timed of a row
COMPARE = ("file", "table", "models", "tasks")  # keys of `compare`
COMPARED = 128  # likeliest tokens of the uncompressed model that a divergence tells apart; the others are one class


@dataclass(frozen=True)
class Experiment:
    """The nodes of one experiment, parents before children; the report is the last."""

    name: str
    nodes: tuple[Node, ...]
    run: Config  # runtime, tracking, temporary checkpoints: what jobs need to know beside their node

    @property
    def target(self) -> Node:
        return self.nodes[-1]


def expand(experiment: str, overrides: Sequence[str], store: Store) -> Experiment:
    """Compose one experiment and return its nodes.

    UserError for unknown names and keys, or a method that does not fit its configuration.
    """
    composer = Composer(experiment, overrides)
    base = composer.compose({})
    swept = list(points(composer.sweep()))
    _refuse_shadowed(experiment, overrides, swept)
    configs = [composer.compose(point) for point in swept]
    models = list(dict.fromkeys(str(config["model"]["id"]) for config in configs))
    builder = _Builder(store)
    rows: dict[str, Config] = {}
    made: list[Point] = []  # the point of each row
    named: dict[str, tuple[Config, Point]] = {}  # the first point of each name
    for point, config in zip(swept, configs, strict=True):
        row = builder.row(config, point, several=len(models) > 1)
        this = (config, point)
        _refuse_equal_names(row["label"], this, named.setdefault(row["label"], this))
        # Points of several models that are one at a smaller scale are one row, beside all that is published of it.
        key = canonical(row | {"published": None})
        if key not in rows:
            rows[key] = row
            made.append(point)
        row = rows[key]
        reference = published_row(composer.written(point), point)
        if reference not in row["published"]:
            row["published"].append(reference)
    rows_of_table = list(rows.values())
    table_config = {
        "experiment": experiment,
        "_overrides": list(overrides),
        "scale": base["scale"]["name"],
        "rows": rows_of_table,
        "compare": _published(base.get("compare")),
    }
    table = builder.add(table_node(table_config))
    plans = [row["plan"] for row in rows_of_table if row["plan"]]
    usage = tuple(dict.fromkeys(builder.usage))
    how = {"overrides": list(overrides), "points": made}  # for the report's commands; no part of its identity
    report_config = {"experiment": experiment, "_run": how}
    builder.add(Node("report", report_config, (table, *dict.fromkeys(plans), *usage), experiment))
    run = {"runtime": base["runtime"], "tracking": base["tracking"]}
    if Running.of(base["runtime"]).checkpoints == "temporary":
        run["temporary"] = only_scored(builder.nodes.values())
    return Experiment(experiment, tuple(builder.nodes.values()), run)


def table_node(config: Config) -> Node:
    """Return the node of the table that `config` describes, made from what was measured of its rows."""
    rows = config["rows"]
    parents = [id for row in rows for id in row["scores"].values()]
    parents += [row[kind] for kind in TIMES for row in rows if kind in row]
    parents += [row["plan"] for row in rows if row["plan"]]
    return Node("table", config, tuple(dict.fromkeys(parents)), config["experiment"])


def _refuse_shadowed(experiment: str, overrides: Sequence[str], swept: Sequence[Point]) -> None:
    """A sweep wins over an override of the same key, which would then do nothing without a word."""
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if any(key in point for point in swept):
            raise UserError(
                f"{override}: the sweep of conf/experiment/{experiment}.yaml sets {key!r} itself. "
                f"Give another sweep: 'sweep=[{{{key}: {value}}}]'."
            )


def _refuse_equal_names(label: str, one: tuple[Config, Point], other: tuple[Config, Point]) -> None:
    """Rows of one name are one line of the table, over seeds: what differs in more would be averaged without a word."""
    if one is other or _seedless(one[0]) == _seedless(other[0]):
        return
    values = [overrides_of(point) for _, point in (one, other)]
    keys = [key for key in values[0] | values[1] if values[0].get(key) != values[1].get(key) and is_shown(key)]
    raise UserError(
        f"sweep: two rows are called {label!r} and differ in {', '.join(keys)}. Give the blocks different names with "
        "`as`, or the values names: KEY: {NAME: VALUE}."
    )


def _seedless(value: Any) -> Any:
    """Return a configuration without seeds and without what changes no result."""
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if key not in ("seed", "seeds", "runtime", "tracking")}
        return {key: _seedless(item) for key, item in kept.items()}
    return value


def _published(compare: Config | str | None) -> Config | None:
    """Return `compare` of an experiment, a file or a mapping with `file`, with the file's hash and the models' ids.

    UserError for a file or a table of it that cannot be compared with.
    """
    from espalier.tables.published import Comparison

    if compare is None:
        return None
    said: Config = {"file": compare} if isinstance(compare, str) else dict(compare)
    for key in said:
        if key not in COMPARE:
            raise UserError(f"compare: unknown key {key!r}; {nearest(key, list(COMPARE))}.")
    if "file" not in said:
        raise UserError("compare: key 'file' has no value. Give compare.file=paper/NAME.csv.")
    path = conf.directory() / said["file"]
    if not path.exists():
        raise UserError(f"compare={said['file']}: no such file {path}. Name a CSV under conf/paper.")
    Comparison(path, table=said.get("table"))
    models = {printed: sources.model_config(name)["id"] for printed, name in (said.get("models") or {}).items()}
    return said | {"models": models, "sha256": content_hash(path)}


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
        self._shapes: dict[tuple[str, str | None], methods.Shape | None] = {}
        self._timed: dict[str, set[str]] = {}  # checkpoints of each name of a row that are timed

    def add(self, node: Node) -> str:
        self.nodes.setdefault(node.id, node)
        return node.id

    def row(self, config: Config, point: Point, several: bool = False) -> Config:
        """Add one point's nodes, from the model to its scores, and return the point's row of the table.

        several: the table has other models too, so that the model stands in the row's name.
        """
        model = config["model"]
        check_dtype(model["dtype"])
        steps = [config[key] for key in ("method", "then") if config[key]["name"] != "none"]
        built = [methods.build(step) for step in steps]  # a bad key is told before anything runs
        label = row_label(config, point)
        if several:
            label = f"{model_name(model)}: {label}"
        fetch = self.add(Node("fetch", self._fetch(model), label=str(model["id"])))
        weights, plan = fetch, None
        shards = _shards(config["calibration"])
        for number, (step, method) in enumerate(zip(steps, built, strict=True)):
            if number == 0:
                self._check(method, model, config["calibration"])
            parents = [weights]
            fitting = methods.fit_of(method)
            if method.probes or fitting is not None:
                tokens = self._tokens(config, fetch)
                if methods.is_sequential(method):  # its statistics are its own, and made with the plan
                    parents.append(tokens)
                    step = step | {"dtype": model["dtype"]}
                else:
                    parents += [self._probe(name, weights, tokens, model, shards) for name in method.probes]
                if fitting is not None:
                    learnt = {"fit": fitting.document(), "dtype": model["dtype"]}
                    parents.append(self.add(Node("fit", learnt, (weights, tokens), fitting.name)))
                if not methods.is_for_dense(method) and not methods.is_for_depth(method):
                    self.usage.append(self._probe("usage", fetch, tokens, model, shards))
            base = methods.base_of(method)
            if base is not None:
                parents.append(self.add(Node("fetch", self._fetch(sources.model_config(base)), label=base)))
            plan = self.add(Node("plan", step, tuple(parents), label))
            weights = self.add(Node("apply", {}, (weights, plan), label))
        tuned = config["tuning"]["name"] != "none"
        if tuned:
            weights = self._tune(config["tuning"], fetch, weights, model, label)
        if config["after"]["name"] != "none":
            methods.build(config["after"])  # a bad key is told before anything runs
            plan = self.add(Node("plan", config["after"], (weights,), label))
            weights = self.add(Node("apply", {}, (weights, plan), label))
        row = {
            "label": label,
            "model": fetch,
            "method": config["method"]["name"],
            "ratio": config["method"].get("ratio"),
            "then": None if config["then"]["name"] == "none" else config["then"]["name"],
            "share": left(config),
            "seed": _seed(steps, point),
            "published": [],
            "plan": plan,
            "weights": weights,
            "scores": {task["task"]: self._task(task, weights, label, fetch) for task in self._tasks(config)},
        }
        if config["speed"]["name"] != "none" and weights != fetch:
            timing = Timing.of(config["speed"])  # a bad key is told before anything runs
            own = {key: value for key, value in config["speed"].items() if key not in ("dtype", "seeds")}
            timed = {"speed": own, "dtype": timing.dtype or model["dtype"]}
            of_line = self._timed.setdefault(label, set())
            if weights in of_line or timing.seeds is None or len(of_line) < timing.seeds:
                of_line.add(weights)
                row["speed"] = self.add(Node("speed", timed, (weights, fetch), label))
        if config["kernel"]["name"] != "none":
            row["kernels"] = self._kernels(config, fetch, weights, model, label)
        return row | ({"tuning": config["tuning"]["name"]} if tuned else {})

    def _kernels(self, config: Config, fetch: str, weights: str, model: Config, label: str) -> str:
        """Add the nodes that time the kernels of a checkpoint, and return the last."""
        bench = KernelBench.of(config["kernel"])  # a bad key is told before anything runs
        parents = [weights, fetch]
        timed: Config = {"kernel": config["kernel"], "dtype": model["dtype"]}
        if "trace" in bench.routings:
            tokens, shards = self._tokens(config, fetch), _shards(config["calibration"])
            traces = [self._probe("routing", each, tokens, model, shards) for each in (weights, fetch)]
            parents += traces
            timed["traces"] = traces
        return self.add(Node("speed", timed, tuple(dict.fromkeys(parents)), label))

    def _tune(self, config: Config, fetch: str, weights: str, model: Config, label: str) -> str:
        """Add the nodes that tune `weights`, on a text of their own, and return the last."""
        settings = Tuning.of(config)  # a bad key is told before anything runs
        text = self._calibration(config["calibration"])
        tokens = self.add(Node("tokens", text, (fetch,), "tuning text"))
        parents = [weights, tokens]
        if settings.objective == "distill":
            answers = {"top": settings.top, "dtype": model["dtype"]}
            parents.append(self.add(Node("teacher", answers, (fetch, tokens), f"top {settings.top}")))
        own = {key: value for key, value in config.items() if key != "calibration"}
        return self.add(Node("tune", {"tuning": own, "dtype": model["dtype"]}, tuple(parents), label))

    def _tokens(self, config: Config, fetch: str) -> str:
        return self.add(Node("tokens", self._calibration(config["calibration"]), (fetch,), "calibration"))

    def _check(self, method: methods.AnyMethod, model: Config, calibration: Config) -> None:
        """Refuse what a method cannot do to a model that is here, before anything is collected."""
        key = (str(model["id"]), model.get("revision"))
        if key not in self._shapes:
            directory = sources.present(*key, self.store.root)
            self._shapes[key] = None if directory is None else Checkpoint(directory).any_shape()
        shape = self._shapes[key]
        if shape is not None:
            methods.check(method, shape, sources.calibration_tokens(calibration))

    def _fetch(self, model: Config) -> Config:
        id = str(model["id"])
        return {"id": id, "revision": self._model_revision(id, model.get("revision"))}

    def _calibration(self, calibration: Config) -> Config:
        calibration = {name: value for name, value in calibration.items() if name != "shards"}
        key = canonical(calibration)
        if key not in self._calibration_revision:
            check_calibration(calibration)
            self._calibration_revision[key] = sources.calibration_revision(calibration)
        return calibration | {"content": self._calibration_revision[key]}

    def _probe(self, name: str, weights: str, tokens: str, model: Config, shards: int) -> str:
        config = {"probe": name, "dtype": model["dtype"], "_shards": shards}
        return self.add(Node("probe", config, (weights, tokens), name))

    def _task(self, task: Config, weights: str, label: str, fetch: str) -> str:
        parents = [weights]
        if str(task["task"]).startswith("kl_"):
            parents.append(self._answers(task, fetch))
        return self.add(Node("task", task, tuple(parents), f"{label}: {task['task']}"))

    def _answers(self, task: Config, fetch: str) -> str:
        """Add the nodes that keep what the uncompressed model answers to a task's windows, and return the last."""
        name, length = str(task["task"]), task.get("length")
        if length is None:
            raise UserError(f"task {name} compares windows of one length. Give evaluation.length=512, say.")
        if task.get("documents") is not None:
            raise UserError(f"task {name} takes all documents. Leave evaluation.documents out.")
        text = {"name": name, "source": "windows", "domains": [name.removeprefix("kl_")], "length": length}
        tokens = self.add(Node("tokens", text | {"content": task["content"]}, (fetch,), f"windows of {name}"))
        answers = {"top": COMPARED, "dtype": task["dtype"]}
        return self.add(Node("teacher", answers, (fetch, tokens), f"top {COMPARED}"))

    def _tasks(self, config: Config) -> list[Config]:
        check_evaluation(config["evaluation"])
        evaluation = identity(config["evaluation"])
        settings = {key: value for key, value in evaluation.items() if key not in ("tasks", "name", *BY_TASK)}
        settings |= {"dtype": config["model"]["dtype"]}
        tasks = []
        for task in evaluation["tasks"]:
            own = {
                key: evaluation[by_task][task]
                for by_task, key in BY_TASK.items()
                if task in (evaluation.get(by_task) or {})
            }
            tasks.append(settings | {"task": task, "content": self._task_revision(task)} | own)
        return tasks


def _seed(steps: Sequence[Config], point: Point) -> int | None:
    """Return what tells a row from others of its label: the methods' seed, else the first that the sweep sets."""
    seeds = [step["seed"] for step in steps if "seed" in step]
    seeds += [value for key, value in point.items() if is_seed(key)]
    return seeds[0] if seeds else None


def _shards(calibration: Config) -> int:
    """Return the number of jobs that share a calibration; how many they are is no part of any identity."""
    shards = calibration.get("shards", 1)
    if not isinstance(shards, int) or isinstance(shards, bool) or shards < 1:
        raise UserError(f"conf/calibration: shards={shards!r} is not a number of jobs. Use 1 or more.")
    return shards


def save(experiment: Experiment, store: Store) -> dict[str, Any]:
    """Write the nodes that are not there yet and return the document of the target.

    Probes (and tasks) that are new get one collecting (scoring) node together, so that one forward pass
    (one process) makes them all; those that another run asked for first keep the node that makes them.
    """
    bundles: dict[tuple[str, ...], list[Node]] = {}
    for node in experiment.nodes:
        if node.stage in ("probe", "task") and not store.has_node(node.id):
            shards = str(node.config.get("_shards", 1))
            # Tasks of one model go together; some also have the original's answers among their parents.
            parents = node.parents if node.stage == "probe" else node.parents[:1]
            bundles.setdefault((node.stage, *parents, str(node.config["dtype"]), shards), []).append(node)
    makers: dict[str, str] = {}
    for (stage, *_, dtype, shards), members in bundles.items():
        members.sort(key=lambda node: node.id)
        parents = tuple(dict.fromkeys(parent for node in members for parent in node.parents))
        config: Config
        if stage == "probe":
            config = {"probes": [node.config["probe"] for node in members], "dtype": dtype}
            maker = _collecting(config, parents, int(shards), store)
        else:
            config = {"tasks": [node.config for node in members], "dtype": dtype}
            answers = {node.config["task"]: node.parents[1] for node in members if len(node.parents) > 1}
            if answers:
                config["answers"] = answers
            maker = Node("score", config, parents, members[0].label.rsplit(":", 1)[0])
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
