"""The package's own lm-eval tasks, with data files that are found from any working directory."""

from __future__ import annotations

from collections.abc import Sequence

import yaml

from espalier.embedded.assets import task_directory
from espalier.embedded.documents import Row
from espalier.errors import UserError, nearest


def task_names() -> list[str]:
    """Names of all embedded tasks, sorted."""
    return sorted(path.stem for path in task_directory().glob("*.yaml"))


def task_configs(names: Sequence[str]) -> list[Row]:
    """lm-eval task dictionaries of the named tasks, for `TaskManager.load` or `simple_evaluate(tasks=...)`.

    The YAML files name their JSON-lines file relative to themselves; here the path becomes absolute.
    Raises UserError for an unknown name.
    """
    configs = []
    for name in names:
        path = task_directory() / f"{name}.yaml"
        if name not in task_names():
            raise UserError(f"task {name!r} is not embedded; {nearest(name, task_names())}")
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        files = config["dataset_kwargs"]["data_files"]
        config["dataset_kwargs"] = {
            **config["dataset_kwargs"],
            "data_files": {split: str(path.parent / file) for split, file in files.items()},
        }
        configs.append(config)
    return configs
