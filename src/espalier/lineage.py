"""Look at results: what a node is and came from, and in what two nodes differ."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from espalier.errors import UserError
from espalier.store import Store, identity, run_record_path

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
        lines.append(f"  made by   {_name(store.read_node(node['made_by']))}")
    lines += [f"  parent    {_name(store.read_node(parent))}" for parent in node["parents"]]
    lines += [f"  {key} = {_short(value)}" for key, value in _flat(node["config"])]
    record = _record(path)
    for key in ("start", "seconds", "peak_rss_bytes", "peak_gpu_bytes", "host", "device", "commit", "dirty"):
        if record.get(key) is not None:
            lines.append(f"  run.{key} = {_short(record[key])}")
    return "\n".join(lines)


def diff(store: Store, a: str, b: str) -> str:
    """Return in what two nodes' configurations differ, their parents' included, and how their runs differed.

    Lines read `stage key: value in A -> value in B`. UserError for unknown ids or nodes of two stages.
    """
    first, second = find(store, a), find(store, b)
    if first["stage"] != second["stage"]:
        raise UserError(f"{a} is of stage {first['stage']}, {b} of stage {second['stage']}: compare two of one stage.")
    lines = [f"{_name(first)}", f"{_name(second)}"]
    config = list(dict.fromkeys(_differences(store, first, second, "")))
    lines += config or ["  same configuration"]
    runs = [_run_facts(store, node) for node in (first, second)]
    for key in sorted(runs[0].keys() & runs[1].keys()):
        if runs[0][key] != runs[1][key]:
            lines.append(f"  run {key}: {_short(runs[0][key])} -> {_short(runs[1][key])}")
    return "\n".join(lines)


def _differences(store: Store, a: Document, b: Document, where: str) -> Iterator[str]:
    if a["id"] == b["id"]:
        return
    here = f"{where}{a['stage']}"
    left, right = dict(_flat(identity(a["config"]))), dict(_flat(identity(b["config"])))
    for key in [*left, *(key for key in right if key not in left)]:
        if left.get(key) != right.get(key):
            yield f"  {here} {key}: {_value(left, key)} -> {_value(right, key)}"
    if a["version"] != b["version"]:
        yield f"  {here} version: {a['version']} -> {b['version']}"
    parents = [_by_name(store, node) for node in (a, b)]
    for name in [*parents[0], *(name for name in parents[1] if name not in parents[0])]:
        one, other = parents[0].get(name), parents[1].get(name)
        if one and other:
            yield from _differences(store, one, other, f"{here} < ")
        else:
            yield f"  {here} parent {name}: {'yes' if one else 'no'} -> {'yes' if other else 'no'}"


def _by_name(store: Store, node: Document) -> dict[str, Document]:
    """Parents by stage and what tells two of one stage apart: the probe, the task, else the label."""
    found: dict[str, Document] = {}
    for parent in map(store.read_node, node["parents"]):
        own = parent["config"].get("probe") or parent["config"].get("task")
        name = f"{parent['stage']} {own}" if own else parent["stage"]
        if name in found or parent["stage"] == "task":
            name = f"{name} of {parent['label']}"
        found[name] = parent
    return found


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested dictionaries and lists of dictionaries as dotted keys."""
    if isinstance(value, dict) and (value or not prefix):
        for key, item in value.items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for n, item in enumerate(value):
            yield from _flat(item, f"{prefix}[{n}]")
    else:
        yield prefix, value


def _value(flat: dict[str, Any], key: str) -> str:
    return _short(flat[key]) if key in flat else "(none)"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _name(node: Document) -> str:
    return f"{node['stage']} {node['id']}  {node['label']}".rstrip()


def _state(path: Path) -> str:
    if not path.exists():
        return "  (not made yet)"
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return f"  {sum(p.stat().st_size for p in files) / 1e6:.2f} MB"


def _record(path: Path) -> Document:
    where = run_record_path(path)
    record: Document = json.loads(where.read_text()) if where.exists() else {}
    return record


def _run_facts(store: Store, node: Document) -> dict[str, Any]:
    """What could change a result without being part of its identity."""
    record = _record(store.path(node))
    keys = ("commit", "dirty", "versions", "runtime", "device", "host")
    return dict(_flat({key: record[key] for key in keys if key in record}))
