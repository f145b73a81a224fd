"""The package's own lm-eval tasks and those of conf/task, with data files that are found from any working directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from espalier import conf
from espalier.errors import UserError, nearest
from espalier.inputs import sources
from espalier.inputs.assets import task_directory
from espalier.inputs.documents import Row


def task_names() -> list[str]:
    """Names of all tasks of the package, sorted."""
    return sorted(path.stem for path in task_directory().glob("*.yaml"))


def is_own(name: str) -> bool:
    """Whether a task is one of conf/task."""
    return name in conf.names("task")


def task_configs(names: Sequence[str]) -> list[Row]:
    """lm-eval task dictionaries of the named tasks, for `TaskManager.load` or `simple_evaluate(tasks=...)`.

    The YAML files name their data relative to themselves; here the paths become absolute.
    Raises UserError for an unknown name, or where a file of conf/task is missing.
    """
    configs = []
    for name in names:
        if is_own(name):
            path = sources.own_task(name)[0]
        elif name in task_names():
            path = task_directory() / f"{name}.yaml"
        else:
            raise UserError(f"task {name!r} is not embedded; {nearest(name, task_names())}")
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        kwargs = config.get("dataset_kwargs") or {}
        if "data_files" in kwargs:
            files = {split: _absolute(path.parent, files) for split, files in kwargs["data_files"].items()}
            config["dataset_kwargs"] = {**kwargs, "data_files": files}
        configs.append(config)
    return configs


def _absolute(folder: Path, files: str | list[str]) -> str | list[str]:
    if isinstance(files, str):
        return str((folder / files).resolve())
    return [str((folder / file).resolve()) for file in files]
