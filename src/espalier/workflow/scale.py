"""Experiments in small: what stands for a model, a text or a task (conf/scale), as data in YAML; imports no torch."""

from collections.abc import Mapping
from typing import Any

from espalier.errors import UserError

Config = dict[str, Any]
FULL = "full"
# Where a group's choice lies in a composed configuration, by the key that chooses it.
PLACES = {
    "model": "model",
    "calibration": "calibration",
    "evaluation": "evaluation",
    "speed": "speed",
    "calibration@tuning.calibration": "tuning.calibration",
}


def stand_ins(config: Config) -> dict[str, str]:
    """Return the choices of groups that take the place of a configuration's own at its `scale`.

    A group's file names its stand-in in the key `_{scale}`, such as `_small: embedded_moe`.
    """
    key = f"_{config['scale']['name']}"
    found = {group: (_at(config, place) or {}).get(key) for group, place in PLACES.items()}
    return {group: str(choice) for group, choice in found.items() if choice is not None}


def resize(config: Config, said: Mapping[str, Any]) -> None:
    """Set the values of the configuration's `scale`, then those of its own block of that name, in place.

    `said`: keys that the command line gives, which stay. Of `set` and `divide` those that the configuration has.
    Divided numbers stay whole, and at least 1. UserError for a `divide` of what is no number.
    """
    scale = config["scale"]
    values = dict(scale.get("set", {})) | dict(config.get(scale["name"]) or {})
    for key, value in values.items():
        _put(config, key, value, said)
    for key, divisor in scale.get("divide", {}).items():
        value = _at(config, key)
        if value is None or key in values:
            continue
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise UserError(f"conf/scale/{scale['name']}.yaml: divide: {key}={value!r} is no number.")
        _put(config, key, max(1, round(value / divisor)), said)


def _put(config: Config, key: str, value: Any, said: Mapping[str, Any]) -> None:
    holder = _holder(config, key)
    if holder is not None and key not in said:
        holder[key.rpartition(".")[2]] = value


def _at(config: Config, key: str) -> Any:
    holder = _holder(config, key)
    return None if holder is None else holder[key.rpartition(".")[2]]


def _holder(config: Config, key: str) -> Config | None:
    """Return the dictionary in which the last part of a dotted key lies, None where there is no such key."""
    *path, last = key.split(".")
    holder: Any = config
    for name in path:
        holder = holder.get(name) if isinstance(holder, dict) else None
    return holder if isinstance(holder, dict) and last in holder else None
