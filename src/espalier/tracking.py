"""Show results in Weights & Biases: a view of the files, never read from; the only module that imports wandb."""

import contextlib
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from espalier.errors import UserError, nearest

MODES = ("off", "offline", "online")


class Tracker(Protocol):
    """What a stage may tell a tracking service."""

    def log(self, values: Mapping[str, float]) -> None:
        """Record named numbers."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Record a table."""


class Silent:
    """Records nothing."""

    def log(self, values: Mapping[str, float]) -> None:
        return

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        return


class Wandb:
    """Records into a wandb run."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, values: Mapping[str, float]) -> None:
        self._run.log(dict(values))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        import wandb

        self._run.log({name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])})


@contextlib.contextmanager
def track(config: Mapping[str, Any], run_id: str, name: str) -> Iterator[Tracker]:
    """Yield a tracker for the run `run_id`, shown as `name`; the id is a node's, so a job done again appends.

    config: `mode` off, offline or online, and for the latter two `project`, `entity`, `directory`. Offline
    looks up no host and needs no account. UserError for an unknown mode, or when wandb is not installed.
    """
    mode = config.get("mode", "off")
    if mode is False:  # what YAML makes of an unquoted off
        mode = "off"
    if mode not in MODES:
        raise UserError(f"conf/tracking: mode={mode!r}; {nearest(str(mode), list(MODES))}.")
    if mode == "off":
        yield Silent()
        return
    if importlib.util.find_spec("wandb") is None:
        raise UserError(f"tracking={mode}: wandb is not installed. `pip install espalier[wandb]`, or tracking=off.")
    directory = Path(config.get("directory") or "results")
    directory.mkdir(parents=True, exist_ok=True)
    with _environment(mode):
        import wandb

        settings = wandb.Settings(silent=True, console="off", disable_git=mode == "offline")
        run = wandb.init(
            project=config.get("project") or "espalier",
            entity=config.get("entity"),
            id=run_id,
            name=name,
            dir=str(directory),
            mode=mode,
            resume="allow" if mode == "online" else None,  # offline, `wandb sync` joins runs of one id
            settings=settings,
        )
        try:
            yield Wandb(run)
        except BaseException:
            run.finish(exit_code=1)
            raise
        run.finish()


@contextlib.contextmanager
def _environment(mode: str) -> Iterator[None]:
    """Switch wandb's own error reports off, which look up a host even in offline mode."""
    changes = {"WANDB_ERROR_REPORTING": "false"} if mode == "offline" else {}
    before = {key: os.environ.get(key) for key in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
