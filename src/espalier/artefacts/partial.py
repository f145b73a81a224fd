"""What is written beside its final place, locked against a second run and kept when interrupted."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from espalier.artefacts.store import digest
from espalier.errors import UserError, mendable

SHARDS = "*.safetensors"
WEIGHTS = "model*.safetensors"
ALL = "*"
LOCK, IDENTITY, FILES, OLD = "lock", "identity", "files", "old"
FULL = (errno.ENOSPC, errno.EDQUOT)
DENIED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def resumable_directory(path: Path, identity: Any, replace: bool = False) -> Iterator[Path]:
    """Yield the folder to fill; it is `path` once the context ends without an error.

    `identity` is any JSON value that determines every byte of the shards. The folder given holds the shards that an
    interrupted run of the same identity left, and nothing else. They stay for the next run after a kill and after an
    error that can be mended (`errors.mendable`); any other error removes all.

    UserError when `path` exists and is not empty (unless `replace`), when another run is writing it, or when the
    disk is full or not to be written to.
    """
    folder, final, filling = partial_folder(path), _absolute(path), False
    try:
        if not folder.exists() and not replace:
            refuse_existing(path)
        lock = _lock(folder, path)
    except OSError as error:
        raise write_error(error, path) from error
    try:
        if not replace:
            refuse_existing(path)  # another run may have finished it meanwhile
        files = _prepare(folder, digest(identity), SHARDS)
        filling = True
        yield files
        if os.path.lexists(final):
            final.replace(folder / OLD)
        files.replace(final)
    except BaseException as error:
        useless = filling and not mendable(error)
        shards = [] if useless else sorted((folder / FILES).glob(SHARDS))
        if shards:
            os.close(lock)
        else:
            _remove(folder, lock)
        if isinstance(error, OSError):
            raise write_error(error, path, _kept(shards, path)) from error
        raise
    _remove(folder, lock)


@contextlib.contextmanager
def resumable_work(path: Path, identity: Any, replace: bool = False) -> Iterator[Path]:
    """Yield the folder for what is made on the way to `path`; it goes away when the context ends without an error.

    The folder given holds what an interrupted run of the same `identity` (any JSON value) left. It stays for the
    next run after a kill and after an error that can be mended (`errors.mendable`); any other error removes it, and
    the parents of `path` that were made for it.

    UserError when `path` exists and is not empty (unless `replace`), or when another run is at work for it.
    """
    folder = work_folder(path)
    made = [parent for parent in folder.parents if not parent.exists()]
    try:
        if not folder.exists() and not replace:
            refuse_existing(path)
        lock = _lock(folder, path)
    except OSError as error:
        raise write_error(error, path) from error
    begun = False
    try:
        if not replace:
            refuse_existing(path)  # a run that was killed after its end left the folder
        files = _prepare(folder, digest(identity), ALL)
        begun = True
        yield files
    except BaseException as error:
        if begun and mendable(error) and any(files.iterdir()):
            os.close(lock)
        else:
            _remove(folder, lock)
            for parent in made:
                with contextlib.suppress(OSError):
                    parent.rmdir()
        if isinstance(error, OSError):
            raise write_error(error, path) from error
        raise
    _remove(folder, lock)


def work_folder(path: Path) -> Path:
    """Return the hidden folder beside `path` for what is made on the way to it."""
    final = _absolute(path)
    return final.parent / f".{final.name}.work"


def partial_folder(path: Path) -> Path:
    """Return the hidden folder beside `path` in which it is written."""
    final = _absolute(path)
    return final.parent / f".{final.name}.partial"


def check_disk(path: Path, needed: float, work: bool = False) -> None:
    """Raise UserError unless `needed` bytes fit beside `path`; what an interrupted run left of them counts as free.

    With `work` the checkpoints on the way to `path` (`resumable_work`) are among the bytes needed.
    """
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    folders = [partial_folder(path), *([work_folder(path)] if work else [])]
    kept = [file for folder in folders for file in folder.rglob(WEIGHTS)]
    left = sum(file.lstat().st_size for file in kept)
    free = shutil.disk_usage(parent).free
    if free + left < needed * 1.01 + 1e5:  # headers, config, card
        raise UserError(
            f"{path}: needs {needed / 1e9:.3f} GB, but {parent} has {(free + left) / 1e9:.3f} GB free. "
            "Free some space or write elsewhere."
        ) from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # what is there already stays for the next run


def code_version() -> str:
    """Return a hash of what decides the bytes that are written: this package's source and torch's version."""
    hashed = hashlib.sha256(metadata.version("torch").encode())
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        hashed.update(file.read_bytes())
    return hashed.hexdigest()


def _absolute(path: Path) -> Path:
    """Return an absolute path without following `path` itself where it is a link."""
    return path.resolve() if path.name in ("", "..") else path.parent.resolve() / path.name


def refuse_existing(path: Path) -> None:
    """Raise UserError when `path` exists and is not an empty directory, or is one that no rename can replace."""
    if os.path.lexists(path) and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: exists already. Choose another output directory or remove it.")
    if path.is_mount():
        raise UserError(f"{path}: is a mount point, which cannot be replaced. Write to a directory in it.")


def _lock(folder: Path, path: Path) -> int:
    """Make `folder` and return the descriptor of its locked lock file; UserError when another run holds it."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # the run that made the folder has just removed it
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Not the file of a run that removed it between the two calls.
            if os.path.samestat(os.fstat(lock), (folder / LOCK).stat()):
                return lock
        except BlockingIOError:
            os.close(lock)
            raise UserError(
                f"{path}: another run is writing it ({folder} is locked). Wait for it or choose another output "
                "directory."
            ) from None
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno in NO_LOCKS:  # some cluster file systems: go on unprotected
                return lock
            os.close(lock)
            raise
        os.close(lock)


def _prepare(folder: Path, identity: str, finished: str) -> Path:
    """Leave in `folder` the `finished` files of the same identity and nothing else; return where they lie."""
    files, mark = folder / FILES, folder / IDENTITY
    shutil.rmtree(folder / OLD, ignore_errors=True)
    if not mark.exists() or mark.read_text() != identity:
        if files.exists():
            shutil.rmtree(files)  # an error here must not be passed over: what stayed would be trusted
        mark.write_text(identity)
    files.mkdir(exist_ok=True)
    for file in set(files.iterdir()) - set(files.glob(finished)):
        _delete(file)
    return files


def _remove(folder: Path, lock: int) -> None:
    """Remove `folder`, the lock last, so that a run that waits for it finds either everything or nothing."""
    with contextlib.suppress(OSError):
        for child in folder.iterdir():
            if child.name != LOCK:
                _delete(child)
        (folder / LOCK).unlink(missing_ok=True)
    os.close(lock)
    with contextlib.suppress(OSError):  # not empty: another run has locked it since
        folder.rmdir()


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _kept(shards: list[Path], path: Path) -> str:
    return f"{len(shards)} finished shards stay in {partial_folder(path)}" if shards else "Nothing was kept"


def write_error(error: OSError, path: Path, kept: str = "Nothing was kept") -> UserError:
    """Return the one-line error for `path`, which the system could not write; `kept` says what the next run finds."""
    if error.errno in FULL:
        parent = next(folder for folder in path.absolute().parents if folder.exists())
        free = shutil.disk_usage(parent).free / 1e9
        return UserError(
            f"{path}: no space left on the disk ({free:.2f} GB free). {kept}; free some space or write elsewhere, "
            "then run again."
        )
    what = f"{error.filename or path}: {error.strerror or error}."
    if error.errno in DENIED:
        return UserError(f"{path}: cannot be written, {what} Choose another output directory.")
    return UserError(f"{path}: failed, {what} {kept}; run again.")
