"""Show progress: bars on a terminal, plain lines in a log."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

# Called with what is under way, how much of it is done and how much there is; (what, 0, 0) announces a line of text.
Progress = Callable[[str, int, int], None]


@contextlib.contextmanager
def show() -> Iterator[Progress]:
    """Yield a function that shows progress on stderr until the context ends."""
    if not sys.stderr.isatty():
        yield _lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:<10}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bars:

        def update(what: str, done: int, total: int) -> None:
            if total == 0:
                bars.console.print(what, highlight=False)
                return
            if what not in tasks or bars.tasks[tasks[what]].total != total:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done)

        yield update


def _lines() -> Progress:
    """One line when something starts to move and one when it is done, with the seconds between."""
    started: dict[str, float] = {}

    def update(what: str, done: int, total: int) -> None:
        if total == 0:
            print(what, file=sys.stderr, flush=True)
        elif done >= total:
            now = time.monotonic()
            print(f"{what}: done in {now - started.pop(what, now):.1f} s", file=sys.stderr, flush=True)
        elif what not in started:
            started[what] = time.monotonic()
            print(f"{what} ...", file=sys.stderr, flush=True)

    return update
