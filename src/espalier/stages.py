"""What each node's job does: read the node, call the stage's function, write the artefact and its run record."""

import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier import conf
from espalier.artefacts import temporary
from espalier.artefacts.partial import resumable_work
from espalier.artefacts.provenance import run_record
from espalier.artefacts.store import MODELS, Store, identity, read_json, write_json
from espalier.errors import UserError
from espalier.machine import heap
from espalier.models.running import Running

if TYPE_CHECKING:
    from espalier.plans.plan import Plan
    from espalier.tracking import Tracker

Document = dict[str, Any]

DOWNLOADS = ("fetch", "tokens")  # stages that may ask the hub; on a cluster they run where the main process does
EVIDENCE = ("probe", "fit")  # stages whose artefact is statistics that a plan is made from


def run(node_id: str, store: Store) -> Path:
    """Make the artefact of one node and return its path; UserError for an unknown node or stage."""
    node = store.read_node(node_id)
    if node["made_by"]:
        raise UserError(f"node {node_id} ({node['stage']}) is made by node {node['made_by']}: run that one.")
    artefact = store.path(node)
    if "SLURM_JOB_ID" in os.environ and node["stage"] not in DOWNLOADS:
        _stay_offline()
    with run_record(artefact, node, runtime=runtime(store)["runtime"]) as record:
        STAGES[node["stage"]](node, store, artefact, record)
    return artefact


def _stay_offline() -> None:
    """Let the hub's libraries, which look when they are imported, ask nobody: compute nodes have no network."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ.setdefault(name, "1")


def runtime(store: Store) -> Document:
    """Return the run's settings: those that ESPALIER_RUNTIME names, else the defaults of conf/."""
    id = os.environ.get("ESPALIER_RUNTIME")
    if id:
        return read_json(store.run_path(id), "espalier.runtime/1")
    return {"runtime": conf.load("runtime", "default"), "tracking": conf.load("tracking", "off")}


def weights(node: Document, store: Store) -> Path:
    """Return the model directory that a node's `fetch`, `apply` or `tune` parent stands for."""
    return _directory(store.parent(node, *MODELS), store)


def _directory(model: Document, store: Store) -> Path:
    """Return the directory of a node whose artefact is a model."""
    if model["stage"] != "fetch":
        return store.path(model)
    return Path(read_json(store.path(model), "espalier.model/1")["path"])


def _fetch(node: Document, store: Store, artefact: Path, record: Document) -> None:
    from espalier.inputs import sources

    config = node["config"]
    directory = sources.resolve(config["id"], config["revision"], store.root).resolve()
    write_json(artefact, {"format": "espalier.model/1", "path": str(directory), **config})


def _tokens(node: Document, store: Store, artefact: Path, record: Document) -> None:
    from espalier.inputs import tokens

    ids, mask, facts = tokens.make_tokens(node["config"], weights(node, store))
    tokens.save_tokens(artefact, ids, mask, facts)
    record["tokens"] = facts


def _collect(node: Document, store: Store, artefact: Path, record: Document) -> None:
    from espalier.checkpoints.checkpoint import Checkpoint
    from espalier.collecting.collect import collect_checkpoint
    from espalier.inputs import tokens

    config, running = node["config"], Running.of(runtime(store)["runtime"])
    with resumable_work(artefact, node["id"], replace=True) as work:
        directory = weights(node, store)
        ids, mask, _ = tokens.load_tokens(
            store.path(store.parent(node, "tokens")), Checkpoint(directory).config["vocab_size"]
        )
        shard = tuple(config.get("shard", (0, 1)))
        stats = collect_checkpoint(
            directory, config["dtype"], running, ids, mask, config["probes"], state=work / "state", shard=shard
        )
        stats.save(artefact, node=node["id"])


def _reduce(node: Document, store: Store, artefact: Path, record: Document) -> None:
    from espalier.collecting.reduce import reduce
    from espalier.collecting.stats import Stats

    reduce([Stats.load(store.path(parent)) for parent in node["parents"]]).save(artefact, node=node["id"])


def _fit(node: Document, store: Store, artefact: Path, record: Document) -> None:
    from espalier.checkpoints.checkpoint import Checkpoint
    from espalier.inputs import tokens
    from espalier.training.fit import fit, save_fit
    from espalier.training.fit_settings import Fitting

    settings, fitting, directory = runtime(store), Fitting(**node["config"]["fit"]), weights(node, store)
    vocabulary = Checkpoint(directory).config["vocab_size"]
    ids, mask, _ = tokens.load_tokens(store.path(store.parent(node, "tokens")), vocabulary)
    running, dtype, state = Running.of(settings["runtime"]), node["config"]["dtype"], _training_state(artefact)
    with _tracked(node, store, settings) as tracker:
        stats, curve = fit(directory, fitting, ids, mask, running, state, dtype=dtype, log=tracker.log)
        save_fit(artefact, stats, fitting, curve, node=node["id"])  # before the tracker waits for its server
    record["fit"] = {"steps": len(curve), "seconds": curve[-1].seconds, "loss": [curve[0].loss, curve[-1].loss]}
    shutil.rmtree(state, ignore_errors=True)


def _training_state(artefact: Path) -> Path:
    """Return the hidden folder beside an artefact in which an interrupted training of it is kept."""
    return artefact.with_name(f".{artefact.name}.training.partial")


def _tracked(node: Document, store: Store, settings: Document) -> AbstractContextManager["Tracker"]:
    from espalier import tracking

    folder = {"directory": settings["tracking"].get("directory") or str(store.root)}
    facts = {key: value for key, value in identity(node["config"]).items() if key != "rows"}  # of a table, hundreds
    return tracking.track(settings["tracking"] | folder, node["id"], node["label"], node["stage"], facts)


def _plan(node: Document, store: Store, artefact: Path, record: Document) -> None:
    from espalier.checkpoints.checkpoint import Checkpoint
    from espalier.collecting.stats import Stats
    from espalier.methods import build, evidence_of, is_sequential, make_plan

    directory = weights(node, store)
    checkpoint = Checkpoint(directory)
    shape = checkpoint.any_shape()
    method = build({key: value for key, value in node["config"].items() if key != "dtype"})
    if is_sequential(method):
        plan = _plan_sequentially(method, directory, node, store, record)
    else:
        paths = [store.path(parent) for parent in store.parents(node, *EVIDENCE)]
        stats = Stats.load(*paths, probes=evidence_of(method)) if paths else Stats.empty(shape)
        base = [_directory(model, store) for model in store.parents(node, *MODELS)[1:]]
        plan = make_plan(method, stats, shape, directory, *base)
    identified = plan.identified(_model(node, store) | {"family": shape.family}, shape)
    identified.save(artefact)


def _plan_sequentially(method: Any, directory: Path, node: Document, store: Store, record: Document) -> "Plan":
    """Run the model on the plan's own tokens, and decide as it runs."""
    from espalier.checkpoints.checkpoint import Checkpoint
    from espalier.collecting.sequential import PASSES, plan_sequentially
    from espalier.inputs import tokens

    vocabulary = Checkpoint(directory).config["vocab_size"]
    ids, mask, _ = tokens.load_tokens(store.path(store.parent(node, "tokens")), vocabulary)
    record["passes"] = PASSES
    running = Running.of(runtime(store)["runtime"])
    return plan_sequentially(method, directory, node["config"]["dtype"], running, ids, mask)


def _model(node: Document, store: Store) -> Document:
    """Identify the model that a chain of nodes started from: the id and revision of its `fetch` node."""
    origin = store.origin(node)
    return {"id": origin["config"]["id"], "revision": origin["config"]["revision"]}


def _apply(node: Document, store: Store, artefact: Path, record: Document) -> None:
    record["apply"] = _write_checkpoint(node, store, artefact)


def _write_checkpoint(node: Document, store: Store, out: Path) -> Document:
    """Write the checkpoint that an `apply` node stands for to `out`, and return the facts of its making."""
    from espalier.plans.plan import Plan
    from espalier.surgery.apply import apply

    plan_node = store.parent(node, "plan")
    plan = Plan.load(store.path(plan_node))
    card = {"node": node["id"], "calibration": _calibration(plan_node, store)}
    workers = Running.of(runtime(store)["runtime"]).apply_workers
    return apply(weights(node, store), plan, out, replace=True, card=card, workers=workers)


def _calibration(plan_node: Document, store: Store) -> str | None:
    """Describe the calibration that a plan's evidence was collected on, or None when it needed none."""
    for parent in map(store.read_node, plan_node["parents"]):
        if parent["stage"] in EVIDENCE:
            return _text(store.parent(parent, "tokens"))
        if parent["stage"] == "tokens":
            return _text(parent)
    return None


def _text(tokens_node: Document) -> str:
    """Name a calibration with the content that it was drawn from."""
    config = tokens_node["config"]
    return f"{config['name']} ({config.get('content') or config.get('revision')})"


def _teacher(node: Document, store: Store, artefact: Path, record: Document) -> None:
    from espalier.inputs import tokens
    from espalier.training.teacher import make_teacher, save_teacher

    config, directory = node["config"], weights(node, store)
    ids, mask, facts = tokens.load_tokens(store.path(store.parent(node, "tokens")), None)
    running = Running.of(runtime(store)["runtime"])
    tensors = make_teacher(directory, ids, mask, config["top"], config["dtype"], running)
    save_teacher(artefact, tensors, {"node": node["id"], "model": _model(node, store), "tokens": facts})


def _tune(node: Document, store: Store, artefact: Path, record: Document) -> None:
    from espalier.checkpoints.checkpoint import Checkpoint
    from espalier.inputs import tokens
    from espalier.training.tune import Text, tune
    from espalier.training.tune_settings import Tuning

    settings, tuning = runtime(store), Tuning.of(node["config"]["tuning"])
    directory, text_node = weights(node, store), store.parent(node, "tokens")
    ids, mask, _ = tokens.load_tokens(store.path(text_node), Checkpoint(directory).config["vocab_size"])
    teachers = [store.path(id) for id in node["parents"] if store.read_node(id)["stage"] == "teacher"]
    state = _training_state(artefact)
    with _tracked(node, store, settings) as tracker:
        record["tune"] = tune(
            directory,
            artefact,
            tuning,
            Text(ids, mask, _text(text_node)),
            Running.of(settings["runtime"]),
            state,
            dtype=node["config"]["dtype"],
            original=_directory(store.origin(node), store),
            teacher=teachers[0] if teachers else None,
            node=node["id"],
            replace=True,
            log=tracker.log,
        )
    shutil.rmtree(state, ignore_errors=True)


def _score(node: Document, store: Store, artefact: Path, record: Document) -> None:
    from espalier.scoring.score import save_scores, score

    settings = runtime(store)
    running = Running.of(settings["runtime"])
    with resumable_work(artefact, node["id"], replace=True), _scored(node, store, record) as directory:
        tasks, dtype = node["config"]["tasks"], node["config"]["dtype"]
        answers = {task: store.path(store.read_node(id)) for task, id in node["config"].get("answers", {}).items()}
        document, samples = score(directory, tasks, running, dtype=dtype, answers=answers)
        save_scores(artefact, document | {"node": node["id"]}, samples)
    with _tracked(node, store, settings) as tracker:
        tracker.log({name: result["value"] for name, result in document["tasks"].items()}, step=0)


def _scored(node: Document, store: Store, record: Document) -> AbstractContextManager[Path]:
    """The model directory that a score node is about: its parent's, or one made for as long as the context lasts."""
    settings = runtime(store)
    made = temporary.made_by(node, store, settings.get("temporary", ()))
    if made is None:
        return nullcontext(weights(node, store))
    apply = made

    def make(out: Path) -> None:
        record["apply"] = _write_checkpoint(apply, store, out)

    return temporary.checkpoint(made["id"], Running.of(settings["runtime"]).scratch, make)


def _speed(node: Document, store: Store, artefact: Path, record: Document) -> None:
    heap.keep_primitives()
    config, running = node["config"], Running.of(runtime(store)["runtime"])
    original = _directory(store.origin(node), store)
    if "kernel" in config:
        _kernels(node, store, artefact, original, running.torch_device())
        return
    from espalier.timing.speed import measure_speed
    from espalier.timing.speed_settings import Timing

    timing = Timing.of(config["speed"])
    document = measure_speed(weights(node, store), original, timing, config["dtype"], running)
    write_json(artefact, document | {"node": node["id"]})


def _kernels(node: Document, store: Store, artefact: Path, original: Path, place: str) -> None:
    from espalier.collecting.stats import Stats
    from espalier.timing.kernel_settings import KernelBench
    from espalier.timing.kernel_speed import Traces, measure_kernels

    config = node["config"]
    own, before = (
        (Stats.load(store.path(store.read_node(id)), probes=("routing",)) for id in config["traces"])
        if "traces" in config
        else (None, None)
    )
    bench = KernelBench.of(config["kernel"])
    document = measure_kernels(weights(node, store), original, bench, config["dtype"], place, Traces(own, before))
    write_json(artefact, document | {"node": node["id"]})


def _table(node: Document, store: Store, artefact: Path, record: Document) -> None:
    from espalier.tables.table import make_table

    table = make_table(node["config"], store)
    table.write(artefact.with_suffix(""))
    with _tracked(node, store, runtime(store)) as tracker:
        rows = table.tidy.astype(object).where(table.tidy.notna(), None)
        tracker.table("scores", list(rows.columns), rows.to_numpy().tolist())


def _report(node: Document, store: Store, artefact: Path, record: Document) -> None:
    from espalier.report import make_report
    from espalier.report.material import gather

    make_report(gather(node, store), artefact)
    link_names(node, store)


def link_names(node: Document, store: Store) -> None:
    """Link results/refs/EXPERIMENT/ to the report, the table and each checkpoint, by readable names."""
    table = store.parent(node, "table")
    targets = {"report.html": store.path(node)} | _table_names(table, store)
    if any("kernels" in row for row in table["config"]["rows"]):
        folder = store.path(node).with_suffix("")
        targets |= {f"kernels{suffix}": folder / f"kernels{suffix}" for suffix in (".md", ".csv")}
    for row in table["config"]["rows"]:
        if row["plan"]:
            seed = "" if row["seed"] is None else f" seed {row['seed']}"
            name = (row["label"] + seed).replace(" %", "%").replace(" + ", "+").replace(" ", "-").replace("/", "_")
            if store.path(row["weights"]).exists():
                targets[f"checkpoints/{name}"] = store.path(row["weights"])
    _link(node["config"]["experiment"], targets, store)


def link_table(node: Document, store: Store) -> None:
    """Link results/refs/EXPERIMENT/ to a table that was made without its report."""
    _link(node["config"]["experiment"], _table_names(node, store), store)


def _table_names(table: Document, store: Store) -> dict[str, Path]:
    path = store.path(table)
    suffixes = (".json", ".md", ".csv", ".tex", ".html", ".parquet")
    return {f"table{suffix}": path.with_suffix(suffix) for suffix in suffixes} | {
        "pairs.csv": path.with_suffix(".pairs.csv")
    }


def _link(experiment: str, targets: dict[str, Path], store: Store) -> None:
    for name, target in targets.items():
        link = store.root / "refs" / experiment / name
        link.parent.mkdir(parents=True, exist_ok=True)
        hidden = link.with_name(f".{link.name}.tmp")
        hidden.unlink(missing_ok=True)
        hidden.symlink_to(os.path.relpath(target, link.parent))
        hidden.replace(link)


STAGES: dict[str, Callable[[Document, Store, Path, Document], None]] = {
    "fetch": _fetch,
    "tokens": _tokens,
    "collect": _collect,
    "reduce": _reduce,
    "fit": _fit,
    "plan": _plan,
    "apply": _apply,
    "teacher": _teacher,
    "tune": _tune,
    "score": _score,
    "speed": _speed,
    "table": _table,
    "report": _report,
}
