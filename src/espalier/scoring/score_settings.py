"""The settings of an evaluation (conf/evaluation), checked; imports no torch."""

from __future__ import annotations

from typing import Any

from espalier.errors import UserError, nearest

BY_TASK = {"fewshot": "num_fewshot", "metrics": "metric"}  # of an evaluation: settings of single tasks
LEAST = {"limit": 1, "documents": 1, "length": 2, "num_fewshot": 0}
KEYS = ("name", "tasks", *LEAST, "metric", *BY_TASK)


def check_evaluation(config: dict[str, Any]) -> None:
    """Raise UserError for an unknown key of a composed `evaluation`, tasks that are no list, or an impossible number.

    That a task exists is not known before lm-eval is asked.
    """
    where = f"conf/evaluation/{config.get('name')}.yaml"
    for key in config:
        if key not in KEYS and not key.startswith("_"):
            raise UserError(f"{where}: unknown key {key!r}; {nearest(key, list(KEYS))}.")
    tasks = config["tasks"]
    if not isinstance(tasks, list) or not tasks or not all(isinstance(task, str) for task in tasks):
        raise UserError(f"{where}: tasks={tasks!r}, expected a list of names, such as [cloze_wiki].")
    for key in BY_TASK:
        if not isinstance(config.get(key) or {}, dict):
            raise UserError(f"{where}: {key}={config[key]!r}, expected a mapping of tasks to values.")
    shots = [("fewshot", 0, value) for value in (config.get("fewshot") or {}).values()]
    for key, least, value in [*((key, least, config.get(key)) for key, least in LEAST.items()), *shots]:
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise UserError(f"{where}: {key}={value!r}, expected a whole number >= {least}, or null.")
