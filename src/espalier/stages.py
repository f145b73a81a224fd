"""What each node's job does: read the node, call the stage's function, write the artefact and its run record."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from espalier import conf
from espalier.errors import UserError
from espalier.running import Running
from espalier.store import Store, read_json, run_record, write_json

Document = dict[str, Any]


def run(node_id: str, store: Store) -> Path:
    """Make the artefact of one node and return its path; UserError for an unknown node or stage."""
    node = store.read_node(node_id)
    if node["made_by"]:
        raise UserError(f"node {node_id} ({node['stage']}) is made by node {node['made_by']}: run that one.")
    artefact = store.path(node)
    with run_record(artefact, node, runtime=runtime(store)["runtime"]) as record:
        STAGES[node["stage"]](node, store, artefact, record)
    return artefact


def runtime(store: Store) -> Document:
    """Return the run's settings: those that ESPALIER_RUNTIME names, else the defaults of conf/."""
    id = os.environ.get("ESPALIER_RUNTIME")
    if id:
        return read_json(store.run_path(id), "espalier.runtime/1")
    return {"runtime": conf.load("runtime", "default"), "tracking": conf.load("tracking", "off")}


def weights(node: Document, store: Store) -> Path:
    """Return the model directory that a node's `fetch` or `apply` parent stands for."""
    parent = store.parent(node, "fetch", "apply")
    if parent["stage"] == "apply":
        return store.path(parent)
    return Path(read_json(store.path(parent), "espalier.model/1")["path"])


def _fetch(node: Document, store: Store, artefact: Path, record: Document) -> None:
    from espalier import sources

    config = node["config"]
    directory = sources.resolve(config["id"], config["revision"], store.root).resolve()
    write_json(artefact, {"format": "espalier.model/1", "path": str(directory), **config})


def _tokens(node: Document, store: Store, artefact: Path, record: Document) -> None:
    from espalier import tokens

    ids, mask, facts = tokens.make_tokens(node["config"], weights(node, store))
    tokens.save_tokens(artefact, ids, mask, facts)
    record["tokens"] = facts


def _collect(node: Document, store: Store, artefact: Path, record: Document) -> None:
    from espalier import tokens
    from espalier.checkpoint import Checkpoint
    from espalier.collect import collect_checkpoint

    directory, config = weights(node, store), node["config"]
    ids, mask, _ = tokens.load_tokens(
        store.path(store.parent(node, "tokens")), Checkpoint(directory).config["vocab_size"]
    )
    state = artefact.with_name(f".{artefact.stem}.partial")
    running = Running.of(runtime(store)["runtime"])
    shard = tuple(config.get("shard", (0, 1)))
    stats = collect_checkpoint(
        directory, config["dtype"], running, ids, mask, config["probes"], state=state, shard=shard
    )
    stats.save(artefact, node=node["id"])
    shutil.rmtree(state, ignore_errors=True)


def _reduce(node: Document, store: Store, artefact: Path, record: Document) -> None:
    from espalier.reduce import reduce
    from espalier.stats import Stats

    reduce([Stats.load(store.path(parent)) for parent in node["parents"]]).save(artefact, node=node["id"])


def _plan(node: Document, store: Store, artefact: Path, record: Document) -> None:
    from espalier.checkpoint import Checkpoint
    from espalier.methods import build
    from espalier.stats import Stats

    directory = weights(node, store)
    checkpoint = Checkpoint(directory)
    shape = checkpoint.shape()
    method = build(node["config"])
    paths = [store.path(id) for id in node["parents"] if store.read_node(id)["stage"] == "probe"]
    stats = Stats.load(*paths, probes=method.probes) if paths else Stats.empty(shape)
    plan = method.plan(stats, shape).check(shape)
    identified = plan.identified(_model(node, store) | {"family": shape.family}, shape)
    identified.save(artefact)


def _model(node: Document, store: Store) -> Document:
    """Identify the model that a chain of nodes started from: the id and revision of its `fetch` node."""
    parent = store.parent(node, "fetch", "apply")
    while parent["stage"] == "apply":
        parent = store.parent(parent, "fetch", "apply")
    return {"id": parent["config"]["id"], "revision": parent["config"]["revision"]}


def _apply(node: Document, store: Store, artefact: Path, record: Document) -> None:
    from espalier.apply import apply
    from espalier.plan import Plan

    plan_node = store.parent(node, "plan")
    plan = Plan.load(store.path(plan_node))
    card = {"node": node["id"], "calibration": _calibration(plan_node, store)}
    workers = Running.of(runtime(store)["runtime"]).apply_workers
    record["apply"] = apply(weights(node, store), plan, artefact, replace=True, card=card, workers=workers)


def _calibration(plan_node: Document, store: Store) -> str | None:
    """Describe the calibration that a plan's evidence was collected on, or None when it needed none."""
    for parent in map(store.read_node, plan_node["parents"]):
        if parent["stage"] == "probe":
            config = store.parent(parent, "tokens")["config"]
            return f"{config['name']} ({config.get('content') or config.get('revision')})"
    return None


def _score(node: Document, store: Store, artefact: Path, record: Document) -> None:
    from espalier import tracking
    from espalier.score import save_scores, score

    settings = runtime(store)
    running = Running.of(settings["runtime"])
    document, samples = score(weights(node, store), node["config"]["tasks"], running, dtype=node["config"]["dtype"])
    save_scores(artefact, document | {"node": node["id"]}, samples)
    folder = {"directory": settings["tracking"].get("directory") or str(store.root)}
    with tracking.track(settings["tracking"] | folder, node["id"], node["label"]) as tracker:
        tracker.log({name: result["value"] for name, result in document["tasks"].items()})


def _table(node: Document, store: Store, artefact: Path, record: Document) -> None:
    from espalier.tables import make_table

    make_table(node["config"], store).write(artefact.with_suffix(""))


def _report(node: Document, store: Store, artefact: Path, record: Document) -> None:
    from espalier.report import make_report
    from espalier.stats import Stats

    parents = [store.read_node(id) for id in node["parents"]]
    table = store.path(next(parent for parent in parents if parent["stage"] == "table"))
    plans = {parent["id"]: store.path(parent) for parent in parents if parent["stage"] == "plan"}
    usage = [Stats.load(store.path(p), probes=("usage",)) for p in parents if p["stage"] == "probe"]
    make_report(table, plans, usage, artefact)
    link_names(node, store)


def link_names(node: Document, store: Store) -> None:
    """Link results/refs/EXPERIMENT/ to the report, the table and each checkpoint, by readable names."""
    table = store.parent(node, "table")
    refs = store.root / "refs" / node["config"]["experiment"]
    targets = {"report.html": store.path(node)}
    for suffix in (".json", ".md", ".csv", ".tex", ".parquet"):
        targets[f"table{suffix}"] = store.path(table).with_suffix(suffix)
    for row in table["config"]["rows"]:
        if row["plan"]:
            seed = "" if row["seed"] is None else f" seed {row['seed']}"
            name = (row["label"] + seed).replace(" %", "%").replace(" + ", "+").replace(" ", "-").replace("/", "_")
            targets[f"checkpoints/{name}"] = store.path(row["weights"])
    for name, target in targets.items():
        link = refs / name
        link.parent.mkdir(parents=True, exist_ok=True)
        temporary = link.with_name(f".{link.name}.tmp")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(os.path.relpath(target, link.parent))
        temporary.replace(link)


STAGES: dict[str, Callable[[Document, Store, Path, Document], None]] = {
    "fetch": _fetch,
    "tokens": _tokens,
    "collect": _collect,
    "reduce": _reduce,
    "plan": _plan,
    "apply": _apply,
    "score": _score,
    "table": _table,
    "report": _report,
}
