"""Checkpoints that only scoring needs: which they are, and the one that a score job makes for itself in scratch."""

import contextlib
import fcntl
import shutil
import signal
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from espalier.artefacts.store import Node, Store, elsewhere
from espalier.errors import InterruptedWork, UserError

Document = dict[str, Any]

PREFIX, LOCK = "espalier-checkpoint-", "lock"
SHOWING = ("table", "report")  # stages that only show what others made


def only_scored(nodes: Iterable[Node]) -> list[str]:
    """Return the ids of the checkpoints among `nodes` that tasks are scored on and nothing else reads, sorted."""
    nodes = list(nodes)
    readers: dict[str, set[str]] = {}
    for node in nodes:
        for parent in node.parents:
            readers.setdefault(parent, set()).add(node.stage)
    return sorted(node.id for node in nodes if node.stage == "apply" and readers.get(node.id) == {"task"})


def made_by(job: Document, store: Store, temporary: Collection[str]) -> Document | None:
    """Return the `apply` node whose checkpoint the score `job` makes for itself; None where it reads one that is kept.

    `temporary`: ids of checkpoints that are not to be kept. One that is there already is read.
    """
    if job["stage"] != "score" or not temporary:
        return None
    model: Document = store.read_node(job["parents"][0])
    return model if model["id"] in temporary and not store.path(model).exists() else None


def inputs(job: Document, store: Store, temporary: Collection[str]) -> list[Path]:
    """Return the artefacts that `job` reads: its parents, of a checkpoint that it makes itself what that is made of.

    Tables and reports do without the plans and statistics of imported results, of which the records alone are here.
    """
    made = made_by(job, store, temporary)
    ids = job["parents"] if made is None else [*made["parents"], *(id for id in job["parents"] if id != made["id"])]
    if job["stage"] in SHOWING:
        ids = [id for id in ids if not _dispensable(store.read_node(id), store)]
    return list(dict.fromkeys(map(store.path, ids)))


def _dispensable(node: Document, store: Store) -> bool:
    return node["stage"] in ("plan", "probe") and elsewhere(store.path(node))


@contextlib.contextmanager
def checkpoint(id: str, scratch: Path | None, make: Callable[[Path], None]) -> Iterator[Path]:
    """Let `make` write a checkpoint to a folder of its own below `scratch` and yield it; it goes with the context.

    It goes when SIGTERM ends the job, too (InterruptedWork), and what a job left behind that was killed goes when the
    next one on that disk starts. `scratch`: default the system's temporary directory. UserError where it names an
    environment variable that is not set, or cannot be written.
    """
    base = scratch or Path(tempfile.gettempdir())
    if "$" in str(base):
        raise UserError(
            f"runtime.scratch={base}: not set where this job runs. Name a folder, or a variable that is set."
        )
    try:
        base.mkdir(parents=True, exist_ok=True)
        remove_abandoned(base)
        folder = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=base))
    except OSError as error:
        raise UserError(f"runtime.scratch={base}: {error.strerror}. Name a folder that jobs may write to.") from error
    with (folder / LOCK).open("w") as lock, _terminated(id):
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = folder.rename(base / folder.name[1:])  # seen by other jobs from here on, locked
        try:
            make(folder / id)
            yield folder / id
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(base: Path) -> None:
    """Remove the checkpoints below `base` whose jobs are gone: nobody holds their locks."""
    for folder in base.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError), (folder / LOCK).open("r") as lock:  # another user's, or gone meanwhile
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _terminated(id: str) -> Iterator[None]:
    """Raise InterruptedWork at a SIGTERM inside, so that what is to be removed is removed."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise InterruptedWork(f"checkpoint {id}: terminated; its temporary files are removed.", number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
