"""Find a misspelt task of lm-eval before anything is computed, without the ten seconds that its index takes."""

import functools
import importlib.util
import re
from collections.abc import Collection
from pathlib import Path

from espalier import conf
from espalier.errors import UserError, nearest
from espalier.inputs.assets import task_directory

# A name as most task files write it; those that it misses (lists, names with blanks) are looked up in lm-eval's index.
NAME = re.compile(rb"^['\"]?(?:task|group|tag)['\"]?:[ \t]*['\"]?([^'\"\s#\[\]]+)", re.MULTILINE)


def check_task(name: str) -> None:
    """Raise UserError, with the nearest name, for a task that lm-eval has not.

    Needs lm-eval; 0.3 s for the first name, ten more for one that is not written at the head of a line of its files.
    """
    if name not in _written():
        from lm_eval.tasks import TaskManager

        check_indexed(name, TaskManager(include_defaults=True).all_tasks)


def check_indexed(name: str, library: Collection[str]) -> None:
    """Raise UserError, with the nearest name, for a task that is not in the `library`, lm-eval's index."""
    if name in library:
        return
    known = [*(path.stem for path in task_directory().glob("*.yaml")), *conf.names("task"), *library]
    hint = nearest(name, known).split("known:")[0].strip() or "`lm_eval ls tasks` prints the names."
    raise UserError(f"evaluation: task {name!r} is neither embedded nor lm-eval's nor in conf/task; {hint}")


@functools.cache
def _written() -> frozenset[str]:
    """Return the names that stand in lm-eval's task files."""
    package = importlib.util.find_spec("lm_eval")
    found: set[str] = set()
    for folder in (package.submodule_search_locations or []) if package else []:
        for path in (Path(folder) / "tasks").rglob("*.yaml"):
            found.update(name.decode(errors="replace") for name in NAME.findall(path.read_bytes()))
    return frozenset(found)
