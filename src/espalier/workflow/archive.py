"""Results in one small file: what an experiment's table is made from, to be kept, moved and joined with other results.

A tar of the scores by item, the times, the run records and the nodes of all that led there; no model, no checkpoint, no
statistics. Ids are hashes of what determines a result, so that those of several machines fit together in one folder.
"""

import hashlib
import io
import json
import lzma
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from espalier.artefacts.store import VERSION, Store, atomic_file, digest, identity, run_record_path
from espalier.errors import UserError
from espalier.workflow.finished import Row, split
from espalier.workflow.graph import Experiment
from espalier.workflow.launch import run_lock

FORMAT = "espalier.archive/1"
MANIFEST = "manifest.json"
NODE = re.compile(r"nodes/[0-9a-f]{12}\.json")
OTHER = re.compile(r"(scores|speed)/[0-9a-f]{12}\.(json|parquet)|[a-z]+/[0-9a-f]{12}\.run\.json")
LARGEST = 2**30  # bytes of a file in an archive; samples of a hundred thousand items are a few million


@dataclass(frozen=True)
class Archived:
    """What was put into an archive: the rows, those that are not scored and were left out, and its files."""

    rows: list[Row]
    waiting: list[Row]
    files: int


@dataclass(frozen=True)
class Restored:
    """What came out of an archive: its experiment, the files that are new here, and how many were there already."""

    experiment: str
    new: int
    known: int


def export(experiment: Experiment, store: Store, out: Path) -> Archived:
    """Write what the table of an experiment is made from, as far as it is there, to the archive `out`.

    The experiment's nodes must be known to `store` (`graph.save`). UserError when no row is scored or `out` exists.
    """
    if out.exists():
        raise UserError(f"{out}: exists already. Delete it, or name another file.")
    rows, waiting = split(experiment, store)
    if not rows:
        raise UserError(f"{experiment.name}: none of {len(waiting)} rows is scored in {store.root}.")
    contents = dict(_contents(experiment.target.id, store))
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    manifest = {"format": FORMAT, "experiment": experiment.name, "files": hashes}
    with atomic_file(out) as temporary, tarfile.open(temporary, "w:xz") as tar:
        for name, data in {MANIFEST: _text(manifest), **dict(sorted(contents.items()))}.items():
            member = tarfile.TarInfo(name)  # no times and no owners: equal results give equal archives
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return Archived(rows, waiting, len(contents))


def _contents(report: str, store: Store) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the bytes of each file that the table of a report is made from; and all nodes, for `gc`."""
    for id in sorted(_ancestors(report, store)):
        node = store.read_node(id)
        yield f"nodes/{id}.json", _text(node)
        if node["made_by"]:
            continue
        artefact = store.path(node)
        if node["stage"] in ("score", "speed") and artefact.exists():
            for path in (artefact, artefact.with_suffix(".parquet")):
                if path.exists():
                    yield str(path.relative_to(store.root)), path.read_bytes()
        record = run_record_path(artefact)
        if record.exists():
            yield str(record.relative_to(store.root)), record.read_bytes()


def _ancestors(id: str, store: Store) -> set[str]:
    found: set[str] = set()
    waiting = [id]
    while waiting:
        id = waiting.pop()
        if id not in found:
            found.add(id)
            node = store.read_node(id)
            waiting += [*node["parents"], *filter(None, [node["made_by"]])]
    return found


def restore(archive: Path, store: Store) -> Restored:
    """Put the results in `archive` into a results folder; what is there already stays as it is.

    UserError when the file is no archive or damaged, or its results were made by a version of Espalier whose stages
    mean something else; nothing is written then. UserError while a run is at work in the folder.
    """
    manifest, contents = _read(archive)
    nodes = {Path(name).stem: json.loads(data) for name, data in contents.items() if NODE.fullmatch(name)}
    for id, node in nodes.items():
        _check(archive, id, node)
    with run_lock(store.root, "import"):
        # Nodes last: one that names its maker stands for what is there; of scores the document, which says that they
        # are complete, after the samples.
        artefacts = sorted(
            set(contents) - {f"nodes/{id}.json" for id in nodes}, key=lambda name: name.endswith(".json")
        )
        new = [name for name in artefacts if _write(store.root / name, contents[name])]
        for id, node in nodes.items():
            name = f"nodes/{id}.json"
            if _is_made_otherwise(store, id, node):
                store.node_path(id).unlink()
            if _write(store.root / name, contents[name]):
                new.append(name)
    return Restored(manifest["experiment"], len(new), len(contents) - len(new))


def _read(archive: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    try:
        with tarfile.open(archive, "r:xz") as tar:
            found = {member.name: _member(archive, tar, member) for member in tar if member.isreg()}
        manifest = json.loads(found.pop(MANIFEST))
        if manifest["format"] != FORMAT:
            raise UserError(f"{archive}: format is {manifest['format']!r}, expected {FORMAT}.")
        hashes = dict(manifest["files"])
    except FileNotFoundError:
        raise UserError(f"{archive}: no such file.") from None
    except (OSError, EOFError, lzma.LZMAError, tarfile.TarError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{archive}: no archive of results, or damaged ({error}). Export it again.") from None
    for name in sorted(set(found) | set(hashes)):
        if not _is_result(name):
            raise UserError(f"{archive}: holds {name!r}, which is no result. Export it again.")
        if name not in found or hashlib.sha256(found[name]).hexdigest() != hashes.get(name):
            raise UserError(f"{archive}: {name} is damaged or missing. Export it again.")
    return manifest, found


def _is_result(name: str) -> bool:
    return bool(NODE.fullmatch(name) or OTHER.fullmatch(name))


def _member(archive: Path, tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Return the bytes of a file; UserError for what is no result or larger than any, before it is in memory."""
    if member.name != MANIFEST and not _is_result(member.name):
        raise UserError(f"{archive}: holds {member.name!r}, which is no result. Export it again.")
    if member.size > LARGEST:
        raise UserError(f"{archive}: {member.name} has {member.size:,} bytes, more than any result. Export it again.")
    file = tar.extractfile(member)
    return b"" if file is None else file.read()


def _check(archive: Path, id: str, node: dict[str, Any]) -> None:
    stage, version = node.get("stage"), node.get("version")
    if VERSION.get(str(stage)) != version:
        raise UserError(
            f"{archive}: stage {stage!r} of version {version}, here it is {VERSION.get(str(stage))}: results of the "
            "two are not comparable. Run the experiment again."
        )
    if digest([stage, version, identity(node["config"]), node["parents"]]) != id:
        raise UserError(f"{archive}: nodes/{id}.json is not what its name says. Export it again.")


def _is_made_otherwise(store: Store, id: str, node: dict[str, Any]) -> bool:
    """Whether a node is to be made by another job here, which has not run: the archive's has, and stands for it."""
    if not store.node_path(id).exists() or not node["made_by"]:
        return False
    here = Store(store.root).read_node(id)
    return bool(here["made_by"] != node["made_by"] and not store.path(here).exists())


def _write(path: Path, data: bytes) -> bool:
    """Write a file that is not there yet; return whether it was not."""
    if path.exists():
        return False
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)
    return True


def _text(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=1, sort_keys=True) + "\n").encode()
