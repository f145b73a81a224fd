"""The Hugging Face hub: commits of names, and downloads of pinned commits; the only file that asks it."""

import contextlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from espalier.errors import UserError

COMMIT = re.compile(r"[0-9a-f]{40}")
PATTERNS = ("*.json", "*.safetensors", "*.py", "*.model", "*.txt", "*.jinja", "tokenizer*", "LICENSE*", "*.md")
# The same weights once more, in another layout: gpt-oss keeps them in original/, Mistral in consolidated files.
REPEATED = ("*/*.safetensors", "consolidated*.safetensors")
Progress = Callable[[str], None]


def download(id: str, commit: str, directory: Path, progress: Progress | None = None) -> Path:
    """Bring the files of `id` at `commit` into `directory` and return it.

    Files that are complete there are not fetched again, so an interrupted download goes on with the file it
    stopped in. UserError in one line when the hub cannot be reached, does not have the commit, asks for an
    agreement (gated), or when the disk is too small for what is missing.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    done = directory / ".complete"
    if done.exists():
        return directory
    with _one_line(id, commit):
        sizes = _sizes(id, commit)
        missing = sum(size for name, size in sizes.items() if _size(directory / name) != size)
        _check_space(id, directory, missing)
        if progress is not None:
            progress(f"{id}: {missing / 1e9:.2f} GB of {sum(sizes.values()) / 1e9:.2f} GB to download to {directory}")
        directory.mkdir(parents=True, exist_ok=True)
        if not sys.stderr.isatty():
            disable_progress_bars()
        snapshot_download(
            id,
            revision=commit,
            local_dir=directory,
            allow_patterns=[*PATTERNS],
            ignore_patterns=[*REPEATED],
            endpoint=_endpoint(),
        )
    for name, size in sizes.items():
        if _size(directory / name) != size:
            raise UserError(
                f"{directory / name}: {_size(directory / name)} bytes, the hub says {size}. Delete it and run again."
            )
    done.touch()
    return directory


def data_file(id: str, commit: str, file: str) -> Path:
    """Return where one file of a data set at `commit` lies, downloaded into the hub's own cache if it is not there.

    UserError in one line, as for `download`.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with _one_line(id, commit):
        try:
            return Path(hf_hub_download(id, file, repo_type="dataset", revision=commit, endpoint=_endpoint()))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            raise UserError(f"{id}@{commit[:12]}: the data set has no file {file}. Correct `file`.") from None


def commit_of(id: str, kind: str) -> str:
    """Return the commit that the default branch of `id` (`kind` is model or dataset) is at now."""
    from huggingface_hub import HfApi

    with _one_line(id, None):
        info = HfApi(_endpoint()).repo_info(id, repo_type=kind)
    if info.sha is None:
        raise UserError(f"{id}: the hub gave no commit for this {kind}.")
    return str(info.sha)


def known_commit(id: str, branch: str) -> str | None:
    """Return the commit of a branch that the hub's own cache on this machine remembers, without asking anyone."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    reference = cache / f"models--{id.replace('/', '--')}" / "refs" / branch
    return reference.read_text().strip() if reference.is_file() else None


def _endpoint() -> str | None:
    """The hub's address, looked up when it is asked: the library reads the variable only once, when imported."""
    return os.environ.get("HF_ENDPOINT") or None


def _sizes(id: str, commit: str) -> dict[str, int]:
    """Sizes in bytes of the files of a commit that `PATTERNS` choose and `REPEATED` leaves."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile
    from huggingface_hub.utils._paths import filter_repo_objects

    entries = [
        e for e in HfApi(_endpoint()).list_repo_tree(id, recursive=True, revision=commit) if isinstance(e, RepoFile)
    ]
    sizes: dict[str, int] = {entry.path: entry.size for entry in entries}
    chosen = set(filter_repo_objects(sizes, allow_patterns=[*PATTERNS], ignore_patterns=[*REPEATED]))
    if not any(name.endswith(".safetensors") for name in chosen):
        raise UserError(f"{id}: no .safetensors file at commit {commit}; Espalier reads safetensors only.")
    return {name: sizes[name] for name in sorted(chosen)}


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _check_space(id: str, directory: Path, needed: int) -> None:
    existing = next(parent for parent in (directory, *directory.resolve().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"{id}: {needed / 1e9:.2f} GB are to be downloaded, but {existing} has {free / 1e9:.2f} GB free. "
            "Free some space, or use a results folder on another disk."
        )


@contextlib.contextmanager
def _one_line(id: str, commit: str | None) -> Iterator[None]:
    """Turn the hub library's exceptions into one line with a remedy."""
    from huggingface_hub import errors

    where = f"{id}@{commit[:12]}" if commit else id
    page = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}/{id}"
    try:
        yield
    except errors.GatedRepoError:
        raise UserError(
            f"{where}: the model is gated. Accept its terms at {page}, then run `hf auth login` or set HF_TOKEN."
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{where}: the hub has no such commit. Run `espalier pin` for the current one.") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{where}: the hub has no such repository, or it is private. Check the id, or set HF_TOKEN."
        ) from None
    except errors.OfflineModeIsEnabled:
        raise UserError(
            f"{where}: HF_HUB_OFFLINE is set and the files are not here. Unset it, or give a local directory as id."
        ) from None
    except errors.HFValidationError as error:
        raise UserError(f"{id}: not an id of the hub ({_first_line(error)}). Write organisation/name.") from None
    except _network_errors() as error:
        raise UserError(
            f"{where}: the hub could not be reached ({_first_line(error)}). Run again to go on where it stopped, "
            "or download the directory elsewhere and give its path as id."
        ) from None


def _network_errors() -> tuple[type[Exception], ...]:
    """The hub library's exceptions for a hub that does not answer, and those of the HTTP library below it."""
    from huggingface_hub import errors

    # Every release's HfHubHTTPError derives from the HTTP library's own error (httpx2's, httpx's in older ones).
    http = next(base for base in errors.HfHubHTTPError.__mro__ if base.__module__.startswith("httpx"))
    return (http, errors.HfHubHTTPError, errors.LocalEntryNotFoundError)


def _first_line(error: Exception) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
