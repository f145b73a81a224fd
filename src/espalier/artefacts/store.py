"""Content-addressed artefacts: ids, paths, atomic writes and run records; imports no torch."""

import contextlib
import errno
import glob
import hashlib
import json
import os
import shutil
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from espalier.errors import UserError

# Raise a stage's number when the meaning of its artefact changes (tests/golden catches a forgotten raise).
# A plan hangs on the probes that it reads, whichever collection made them: raise `probe` with `collect`.
VERSION: dict[str, int] = {
    "fetch": 1,
    "tokens": 1,
    "probe": 2,
    "collect": 2,
    "reduce": 1,
    "fit": 1,
    "plan": 1,
    "apply": 1,
    "teacher": 1,
    "tune": 1,
    "task": 1,
    "score": 1,
    "speed": 2,
    "table": 2,
    "report": 1,
}

# Stages whose artefact is a model: the one that a pipeline starts from, and those that rewrite it.
MODELS = ("fetch", "apply", "tune")

# Where each stage's artefact lies under the results folder.
PATHS: dict[str, str] = {
    "fetch": "models/{id}.json",
    "tokens": "tokens/{id}.safetensors",
    "collect": "stats/{id}.safetensors",
    "reduce": "reduced/{id}.safetensors",
    "fit": "fits/{id}.safetensors",
    "plan": "plans/{id}.json",
    "apply": "checkpoints/{id}",
    "teacher": "teachers/{id}.safetensors",
    "tune": "tuned/{id}",
    "score": "scores/{id}.json",
    "speed": "speed/{id}.json",
    "table": "tables/{id}.json",
    "report": "reports/{id}.html",
}


def canonical(value: Any) -> str:
    """Return the one JSON text of `value`: sorted keys, no spaces, floats by repr, NaN refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """Return the first 12 hex digits of sha256 over the canonical JSON of `value`."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:12]


def identity(config: Any) -> Any:
    """Return `config` without keys that start with `_`, at every depth."""
    if isinstance(config, dict):
        return {key: identity(value) for key, value in config.items() if not key.startswith("_")}
    if isinstance(config, list | tuple):
        return [identity(value) for value in config]
    return config


@dataclass(frozen=True)
class Node:
    """One artefact to be made.

    `config` and `parents` (with the stage and its version) determine `id`; `label` and `made_by` do not.
    `made_by` names the node whose job makes this one as part of a larger pass: a probe is made by a
    `collect` node (one forward pass for many probes), a task by a `score` node (one process for many tasks).
    """

    stage: str
    config: dict[str, Any]
    parents: tuple[str, ...] = ()
    label: str = ""
    made_by: str = ""

    @cached_property
    def id(self) -> str:
        return digest([self.stage, VERSION[self.stage], identity(self.config), list(self.parents)])

    def document(self) -> dict[str, Any]:
        """Return the JSON document of `results/nodes/{id}.json`."""
        return {
            "format": "espalier.node/1",
            "id": self.id,
            "stage": self.stage,
            "version": VERSION[self.stage],
            "config": self.config,
            "parents": list(self.parents),
            "label": self.label,
            "made_by": self.made_by,
        }


class Store:
    """The results folder: nodes and the artefacts they stand for.

    With `dry`, new nodes stay in memory: a dry run leaves the folder as it was. A node is read once: its file never
    changes.
    """

    def __init__(self, root: Path | str = "results", dry: bool = False) -> None:
        self.root = Path(root)
        self.dry = dry
        self._memory: dict[str, dict[str, Any]] = {}  # that are in no file
        self._read: dict[str, dict[str, Any]] = {}

    def node_path(self, id: str) -> Path:
        return self.root / "nodes" / f"{id}.json"

    def run_path(self, id: str) -> Path:
        """Where the runtime settings `id` of a run lie; not part of any identity."""
        return self.root / "nodes" / f"runtime-{id}.json"

    def has_node(self, id: str) -> bool:
        return id in self._memory or self.node_path(id).exists()

    def read_node(self, id: str) -> dict[str, Any]:
        """Return the node document `id`; UserError when it is missing or of an unknown format."""
        if id in self._memory:
            return self._memory[id]
        if id not in self._read:
            path = self.node_path(id)
            if not path.exists():
                raise UserError(f"{path}: no such node. Run `espalier run EXPERIMENT -n` to write the nodes again.")
            self._read[id] = read_json(path, "espalier.node/1")
        return self._read[id]

    def write_node(self, node: Node) -> dict[str, Any]:
        """Write `node` unless it is there already; return the document on disk, which never changes.

        The first writer decides `label` and `made_by`: a job that is under way keeps what it read.
        """
        path = self.node_path(node.id)
        if self.dry and not path.exists():
            return self._memory.setdefault(node.id, node.document())
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = _temporary(path)
            temporary.write_text(json.dumps(node.document(), indent=1, sort_keys=True) + "\n")
            with contextlib.suppress(FileExistsError):
                os.link(temporary, path)  # unlike rename, never replaces what another process wrote first
            temporary.unlink()
        return self.read_node(node.id)

    def path(self, node: dict[str, Any] | str) -> Path:
        """Return where the artefact of a node (document or id) lies."""
        document = self.read_node(node) if isinstance(node, str) else node
        if document["made_by"]:
            return self.path(document["made_by"])
        return self.root / PATHS[document["stage"]].format(id=document["id"])

    def parent(self, node: dict[str, Any], *stages: str) -> dict[str, Any]:
        """Return the document of the first parent of `node` whose stage is in `stages`.

        Only a plan may have two models: the first is the one that it is for, the other its method's base.
        """
        found = self.parents(node, *stages)
        if not found:
            raise UserError(f"node {node['id']}: no parent of stage {'/'.join(stages)}.")
        return found[0]

    def parents(self, node: dict[str, Any], *stages: str) -> list[dict[str, Any]]:
        """Return the documents of the parents of `node` whose stage is in `stages`, in their order."""
        return [p for p in map(self.read_node, node["parents"]) if p["stage"] in stages]

    def origin(self, node: dict[str, Any]) -> dict[str, Any]:
        """Return the `fetch` node of the model that a node of a model stage, or one made of a model, started from."""
        while node["stage"] != "fetch":
            node = self.parent(node, *MODELS)
        return node


def read_json(path: Path, *formats: str) -> dict[str, Any]:
    """Return the JSON object in `path`; UserError unless its `format` is one of `formats`."""
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not JSON ({error}). Delete it and run again.") from None
    found = document.get("format") if isinstance(document, dict) else None
    if found not in formats:
        raise UserError(f"{path}: format is {found!r}, expected {' or '.join(formats)}.")
    return dict(document)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")


def _remove_abandoned(path: Path) -> None:
    """Remove what processes of this machine that were killed while they wrote `path` left beside it."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.{glob.escape(socket.gethostname())}.*.tmp"):
        writer = left.name.removesuffix(".tmp").rpartition(".")[2]
        if not writer.isdigit():
            continue
        try:
            os.kill(int(writer), 0)
        except ProcessLookupError:
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)
        except OSError:  # it runs, as somebody else's
            pass


def _umask() -> int:
    mask = os.umask(0o077)  # there is no other way to read it
    os.umask(mask)
    return mask


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a path of that name in a temporary folder beside `path`; move it there on success, remove it on failure.

    A folder, since libraries (safetensors) write to temporary names of their own beside the one that they are given.
    What a process that was killed here left behind goes too. Raises UserError when the disk is full; whatever `path`
    held before stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = _temporary(path)
    temporary = folder / path.name
    try:
        folder.mkdir(exist_ok=True)
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # safetensors writes files that nobody else may read
        temporary.replace(path)
        _remove_abandoned(path)
    except OSError as error:
        raise _disk_error(error, path) from error
    except Exception as error:
        # safetensors reports a full disk as its own exception type, with the system's text inside.
        if "No space left" in str(error):
            raise _disk_error(OSError(errno.ENOSPC, str(error)), path) from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def stable_header(path: Path) -> None:
    """Put a safetensors file's metadata in alphabetical order, in place.

    The library writes it in an order that changes from process to process, and equal artefacts should have equal
    bytes. The tensors keep theirs.
    """
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        ordered = {"__metadata__": dict(sorted(metadata.items()))} | header
        raw = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
        if len(raw) > length:
            raise ValueError(f"{path}: the ordered header takes {len(raw)} bytes, the library's {length}")
        file.seek(8)
        file.write(raw.ljust(length))


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; put it in its place on success, remove it on failure.

    Raises UserError when the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            shutil.rmtree(path)
        temporary.replace(path)
    except OSError as error:
        raise _disk_error(error, path) from error
    except Exception as error:
        if "No space left" in str(error):
            raise _disk_error(OSError(errno.ENOSPC, str(error)), path) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _disk_error(error: OSError, path: Path) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(path.parent).free / 1e9
        return UserError(
            f"{path}: no space left on the disk ({free:.2f} GB free). Nothing was kept of the unfinished file; "
            "free some space or write elsewhere, then run again."
        )
    return error


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write `document` to `path` atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n")


def content_hash(path: Path) -> str:
    """Return the sha256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_revision(directory: Path, cache: Path | None = None) -> str:
    """Return `sha256:` plus the hash over the names and contents of a model directory's own files.

    Hashing reads every byte once; `cache` (a JSON file) remembers each file's hash by its path, size and
    modification time, so that a 90 GB directory is read only once.
    """
    known: dict[str, str] = {}
    if cache is not None and cache.exists():
        known = read_json(cache, "espalier.hashes/1")["files"]
    files, fresh = [], False
    for path in sorted(directory.iterdir()):
        if not path.is_file() or path.name.startswith(".") or path.suffix in (".md", ".tmp"):
            continue
        stat = path.stat()
        key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
        if key not in known:
            known[key] = content_hash(path)
            fresh = True
        files.append([path.name, known[key]])
    if cache is not None and fresh:
        write_json(cache, {"format": "espalier.hashes/1", "files": known})
    return "sha256:" + hashlib.sha256(canonical(files).encode()).hexdigest()[:40]


def run_record_path(artefact: Path) -> Path:
    """Return where the run record of `artefact` lies: beside it, `plan.json` -> `plan.run.json`."""
    stem = artefact.name.removesuffix(artefact.suffix) if artefact.suffix else artefact.name
    return artefact.with_name(f"{stem}.run.json")


def elsewhere(artefact: Path) -> bool:
    """Whether `artefact` is not here, but the record of how it was made: it came with imported results."""
    return not artefact.exists() and run_record_path(artefact).exists()
