"""Look at results: what a node is, what it came from, and which report of an experiment is the newest."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from espalier.artefacts.store import Store, read_json, run_record_path
from espalier.errors import UserError

Document = dict[str, Any]


def find(store: Store, prefix: str) -> Document:
    """Return the node whose id starts with `prefix`; UserError when there is none or more than one."""
    found = sorted(
        p.stem for p in (store.root / "nodes").glob("*.json") if p.stem.startswith(prefix) and "-" not in p.stem
    )
    if len(found) == 1 or prefix in found:
        return store.read_node(prefix if prefix in found else found[0])
    if not found:
        raise UserError(
            f"{prefix}: no node in {store.root / 'nodes'} starts with this. `espalier run NAME -n` lists ids."
        )
    raise UserError(f"{prefix}: {len(found)} nodes start with this: {', '.join(found[:5])}. Give more digits.")


def show(store: Store, prefix: str) -> str:
    """Return what is known of a node as text: configuration, parents, artefact and how it was made."""
    node = find(store, prefix)
    path = store.path(node)
    lines = [f"{node['stage']} {node['id']}  {node['label']}".rstrip(), f"  artefact  {path}{_state(path)}"]
    if node["made_by"]:
        lines.append(f"  made by   {title(store.read_node(node['made_by']))}")
    lines += [f"  parent    {title(store.read_node(parent))}" for parent in node["parents"]]
    lines += [f"  {key} = {short(value)}" for key, value in flat(node["config"])]
    run = record(path)
    for key in ("start", "seconds", "peak_rss_bytes", "peak_gpu_bytes", "host", "device", "commit", "dirty"):
        if run.get(key) is not None:
            lines.append(f"  run.{key} = {short(run[key])}")
    return "\n".join(lines)


def newest_reports(store: Store) -> dict[str, str]:
    """Return the id of each experiment's report that was asked for last."""
    newest: dict[str, tuple[float, str]] = {}
    for path in (store.root / "nodes").glob("*.json"):
        if "-" in path.stem:
            continue
        node = store.read_node(path.stem)
        if node["stage"] == "report":
            name = str(node["config"]["experiment"])
            newest[name] = max(newest.get(name, (0.0, "")), (path.stat().st_mtime, node["id"]))
    return {name: id for name, (_, id) in newest.items()}


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested dictionaries and lists of dictionaries as dotted keys."""
    if isinstance(value, dict) and (value or not prefix):
        for key, item in value.items():
            yield from flat(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for n, item in enumerate(value):
            yield from flat(item, f"{prefix}[{n}]")
    else:
        yield prefix, value


def short(value: Any) -> str:
    """Return a value as text of at most 100 characters."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def title(node: Document) -> str:
    """Return a node's stage, id and label."""
    return f"{node['stage']} {node['id']}  {node['label']}".rstrip()


def _state(path: Path) -> str:
    if not path.exists():
        return "  (not made yet)"
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return f"  {sum(p.stat().st_size for p in files) / 1e6:.2f} MB"


def record(path: Path) -> Document:
    """Return the run record of an artefact, empty where there is none."""
    where = run_record_path(path)
    return read_json(where, "espalier.run/1") if where.exists() else {}
