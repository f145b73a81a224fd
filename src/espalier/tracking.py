"""Show results in Weights & Biases: a view of the files, never read from; the only module that imports wandb."""

import contextlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from espalier.errors import UserError, nearest

MODES = ("off", "offline", "online")
BEGIN_SECONDS, END_SECONDS = 30.0, 120.0  # that a job waits for the server before it works, and after


class Tracker(Protocol):
    """What a stage may tell a tracking service."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record named numbers of a step; steps rise, and one that was told before is not told again."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Record a table."""


class Silent:
    """Records nothing."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        return

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        return


class Wandb:
    """Records into a wandb run until that fails, which is told once and stops nothing."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, values: Mapping[str, float], step: int) -> None:
        with self._guarded() as run:
            run.log(dict(values), step=step, commit=True)  # or it is held back until the next step

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        import wandb

        with self._guarded() as run:
            run.log({name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])})

    def finish(self, failed: bool) -> None:
        """Close the run."""
        with self._guarded() as run:
            run.finish(exit_code=int(failed))

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[Any]:
        try:
            yield self._run
        except Exception as error:
            if not isinstance(self._run, _Gone):
                _warn("stopped", error)
            self._run = _Gone()


class _Gone:
    """Stands for a run that failed."""

    def log(self, values: Mapping[str, Any], step: int | None = None, commit: bool | None = None) -> None:
        return

    def finish(self, exit_code: int) -> None:
        return


def check(config: Mapping[str, Any]) -> None:
    """Raise UserError for settings of conf/tracking that no job could follow; asks no server.

    An unknown mode, wandb not installed, or, online, no key on this machine.
    """
    mode = _mode(config)
    if mode == "online":
        # A process of its own without a terminal: here wandb would ask for a key on the user's.
        command = [sys.executable, "-c", "import wandb; wandb.login()"]
        login = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if login.returncode:
            raise UserError(
                f"tracking=online: {_last_line(login.stderr)} Run `wandb login` once on this machine, set "
                "WANDB_API_KEY, or use tracking=offline."
            )


@contextlib.contextmanager
def track(
    config: Mapping[str, Any], run_id: str, name: str, stage: str = "", facts: Mapping[str, Any] | None = None
) -> Iterator[Tracker]:
    """Yield a tracker for the run `run_id`, shown as `name`; the id is a node's, so a job done again appends.

    config: `mode` off, offline or online, and for the latter two `project`, `entity`, `directory`. Offline looks up no
    host and needs no account. `facts` are the run's configuration. What goes wrong at wandb, or on the way there, is
    one line on standard error and stops nothing. UserError for an unknown mode, or when wandb is not installed.
    """
    mode = _mode(config)
    if mode == "off":
        yield Silent()
        return
    with _environment(mode):
        try:
            tracker = Wandb(
                _begin(mode, config, id=run_id, name=name, job_type=stage or None, config=dict(facts or {}))
            )
        except Exception as error:
            _warn("is not recorded", error)
            yield Silent()
            return
        try:
            yield tracker
        except BaseException:
            tracker.finish(failed=True)
            raise
        tracker.finish(failed=False)


def _mode(config: Mapping[str, Any]) -> str:
    mode = config.get("mode", "off")
    if mode is False:  # what YAML makes of an unquoted off
        mode = "off"
    if mode not in MODES:
        raise UserError(f"conf/tracking: mode={mode!r}; {nearest(str(mode), list(MODES))}.")
    if mode != "off" and importlib.util.find_spec("wandb") is None:
        raise UserError(f"tracking={mode}: wandb is not installed. `pip install espalier[wandb]`, or tracking=off.")
    return str(mode)


def _begin(mode: Any, where: Mapping[str, Any], **named: Any) -> Any:
    """Return the wandb run."""
    import wandb

    directory = Path(where.get("directory") or "results")
    directory.mkdir(parents=True, exist_ok=True)
    settings = wandb.Settings(
        silent=True,
        console="off",
        disable_git=mode == "offline",
        init_timeout=BEGIN_SECONDS,
        finish_timeout=END_SECONDS,  # what was not sent until then stays in the folder
        x_transaction_log_flush_interval=1.0,  # seconds; what is in no file yet is lost with a process that is killed
    )
    return wandb.init(
        project=where.get("project") or "espalier",
        entity=where.get("entity"),
        dir=str(directory),
        mode=mode,
        resume="allow" if mode == "online" else None,  # offline, `wandb sync` joins runs of one id
        settings=settings,
        **named,
    )


def _warn(what: str, error: Exception) -> None:
    line = f"espalier: tracking {what}: {_last_line(str(error)) or type(error).__name__} The stage goes on without it."
    print(line, file=sys.stderr)


def _last_line(text: str) -> str:
    """Return the last line of an error as a sentence, without the names in front of it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return ""
    line = lines[-1].removeprefix("wandb: ERROR ").removeprefix("wandb.errors.errors.UsageError: ")
    return line if line.endswith(".") else f"{line}."


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
