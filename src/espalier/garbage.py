"""Find and delete artefacts that no experiment's table needs any more."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from espalier.launch import run_lock
from espalier.store import PATHS, Store

UNFINISHED = (".tmp", ".partial", ".work")
FOLDERS = sorted({Path(path).parent.name for path in PATHS.values()})


@dataclass(frozen=True)
class Garbage:
    """A file or folder under the results folder, its size in bytes, and what it was."""

    path: Path
    size: int
    what: str


def find(store: Store) -> list[Garbage]:
    """Return what is not needed by the newest table of any experiment, nor by one that results/refs names.

    Everything that such a table was made from stays, models included; so do results/refs and files that
    Espalier did not name. Of what killed runs left, *.tmp files are among the garbage, and so is a *.partial or *.work
    folder unless its artefact is needed and missing: the next run goes on with it.
    """
    kept = _reachable(store, _roots(store))
    models = {_model_directory(store.root / "models" / f"{id}.json") for id in kept}
    found = []
    for path in _candidates(store):
        id = path.name.removeprefix(".").split(".")[0]
        if path.name.endswith(UNFINISHED):
            if id in kept and not path.name.endswith(".tmp") and not store.path(id).exists():
                continue
            found.append(Garbage(path, _size(path), "unfinished file of a killed run"))
        elif len(id) == 12 and all(c in "0123456789abcdef" for c in id):
            if id not in kept:
                found.append(Garbage(path, _size(path), _what(store, id)))
        elif path.parent.name == "models" and "@" in path.name and path.resolve() not in models:
            found.append(Garbage(path, _size(path), "downloaded model"))
    return found


def delete(store: Store) -> list[Garbage]:
    """Delete what `find` names and return it; UserError while a run is at work in the folder."""
    with run_lock(store.root, "gc"):
        found = find(store)
        for item in found:
            if item.path.is_dir():
                # Renamed first, so that a half-deleted checkpoint never has a finished one's name.
                doomed = item.path.with_name(f".{item.path.name}.{os.getpid()}.tmp")
                item.path.replace(doomed)
                shutil.rmtree(doomed)
            else:
                item.path.unlink(missing_ok=True)
    return found


def _roots(store: Store) -> set[str]:
    """Ids of the reports to keep: each experiment's newest, and those whose names are in results/refs."""
    roots = set()
    newest: dict[str, tuple[float, str]] = {}
    for path in (store.root / "nodes").glob("*.json"):
        if "-" in path.stem:
            continue
        node = store.read_node(path.stem)
        if node["stage"] == "report":
            name = str(node["config"]["experiment"])
            newest[name] = max(newest.get(name, (0.0, "")), (path.stat().st_mtime, node["id"]))
    roots |= {id for _, id in newest.values()}
    for link in (store.root / "refs").rglob("*"):
        if link.is_symlink():
            id = link.readlink().name.split(".")[0]
            if store.has_node(id):
                roots.add(id)
    return roots


def _reachable(store: Store, roots: set[str]) -> set[str]:
    kept: set[str] = set()
    waiting = list(roots)
    while waiting:
        id = waiting.pop()
        if id in kept or not store.has_node(id):
            continue
        kept.add(id)
        node = store.read_node(id)
        waiting += [*node["parents"], *([node["made_by"]] if node["made_by"] else [])]
    return kept


def _candidates(store: Store) -> Iterator[Path]:
    for folder in (*FOLDERS, "nodes", "logs"):
        base = store.root / folder
        paths = sorted(base.iterdir()) if base.is_dir() else []
        if folder == "logs":
            paths = [log for stage in paths if stage.is_dir() for log in sorted(stage.iterdir())]
        yield from (path for path in paths if not path.name.startswith("runtime-"))


def _model_directory(artefact: Path) -> Path | None:
    if not artefact.exists():
        return None
    return Path(json.loads(artefact.read_text())["path"]).resolve()


def _what(store: Store, id: str) -> str:
    if not store.has_node(id):
        return "of a node that is gone"
    node = store.read_node(id)
    return f"{node['stage']} {node['label']}".strip()


def _size(path: Path) -> int:
    files = [path] if not path.is_dir() else [p for p in path.rglob("*") if p.is_file()]
    return sum(file.lstat().st_size for file in files)
