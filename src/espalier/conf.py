"""Where the Hydra configuration lies: the working directory's `conf/`, else the one shipped with the package."""

from pathlib import Path
from typing import Any

from espalier.errors import UserError, nearest


def directory() -> Path:
    """Return the absolute path of the configuration folder."""
    package = Path(__file__).resolve().parent
    for candidate in (Path.cwd() / "conf", package.parents[1] / "conf", package / "_conf"):
        if (candidate / "config.yaml").exists():
            return candidate.resolve()
    raise UserError("conf/config.yaml: not found here, nor in the installed package. Run from the project's folder.")


def names(group: str) -> list[str]:
    """Names of the files of a group, such as `method`."""
    return sorted(path.stem for path in (directory() / group).glob("*.yaml"))


def load(group: str, name: str) -> dict[str, Any]:
    """Return `conf/{group}/{name}.yaml` as a dictionary, without Hydra; UserError when there is none."""
    import yaml

    path = directory() / group / f"{name}.yaml"
    if not path.exists():
        raise UserError(f"{group}={name}: no conf/{group}/{name}.yaml; {nearest(name, names(group))}.")
    loaded: dict[str, Any] = yaml.safe_load(path.read_text())
    return loaded
