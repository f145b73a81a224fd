"""Sweeps of an experiment become composed configurations, one a point, with Hydra; imports no torch."""

import copy
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from espalier import conf
from espalier.errors import UserError, nearest
from espalier.store import canonical

Config = dict[str, Any]
Point = dict[str, Any]  # override key -> value
LABEL = "label"  # of a point: what its row is called, not an override


def is_seed(key: str) -> bool:
    """Whether a key of a sweep is a seed: rows that differ only in seeds are one line of the table."""
    return key.rpartition(".")[2] == "seed"


def points(sweep: Sequence[Config]) -> Iterator[Point]:
    """Yield the points of a sweep: blocks one after another, keys crossed, `zip` keys walked together.

    A block's `as` names its rows: `label` of a point is that name with the keys that have lists of values, but seeds.
    UserError when the lists of a `zip` differ in length or a block is not a mapping.
    """
    for block in sweep:
        if not isinstance(block, dict):
            raise UserError(f"sweep: {block!r} is not a mapping of keys to values.")
        axes: list[list[Point]] = []
        name = block.get("as")
        varied = [key for key, values in block.items() if isinstance(values, list) and not is_seed(key)]
        varied += [key for key in block.get("zip", {}) if not is_seed(key)]
        for key, values in block.items():
            if key == "as":
                continue
            if key == "zip":
                columns = {name: _values(column) for name, column in values.items()}
                lengths = {name: len(column) for name, column in columns.items()}
                if len(set(lengths.values())) > 1:
                    raise UserError(f"sweep.zip: lists of different lengths {lengths}. Give each key as many values.")
                rows = zip(*columns.values(), strict=True)
                axes.append([dict(zip(columns, row, strict=True)) for row in rows])
            else:
                axes.append([{key: value} for value in _values(values)])
        for combination in itertools.product(*axes):
            point = {key: value for part in combination for key, value in part.items()}
            if name is not None:
                own = [f"{key.removeprefix('method.')}={point[key]}" for key in varied]
                point[LABEL] = " ".join([str(name), *own])
            yield point


def _values(values: Any) -> list[Any]:
    return list(values) if isinstance(values, list) else [values]


class Composer:
    """Compose points with Hydra: once per choice of groups, values are set on a copy.

    A thousand points over four methods are four compositions and a thousand cheap updates.
    """

    def __init__(self, experiment: str, overrides: Sequence[str]) -> None:
        self.experiment = experiment
        self.overrides = [f"+experiment={experiment}", *_file_overrides(overrides)]
        self._composed: dict[tuple[str, ...], Config] = {}
        if not (conf.directory() / "experiment" / f"{experiment}.yaml").exists():
            known = nearest(experiment, conf.names("experiment"))
            raise UserError(f"experiment={experiment}: no conf/experiment/{experiment}.yaml; {known}.")

    def sweep(self) -> list[Config]:
        """Return the experiment's `sweep`, a list of blocks, with `${seeds}` and the like filled in.

        UserError for an interpolation of a key that there is not.
        """
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        composed = self._group(())
        try:
            filled = OmegaConf.to_container(OmegaConf.select(OmegaConf.create(composed), "sweep"), resolve=True)
        except OmegaConfBaseException as error:
            first = str(error).strip().splitlines()[0]
            raise UserError(f"conf/experiment/{self.experiment}.yaml: sweep: {first}") from None
        return filled  # type: ignore[return-value]

    def compose(self, point: Point) -> Config:
        """Return the configuration of one point as plain dictionaries, interpolations resolved, without `sweep`.

        UserError for a group's unknown choice or a key that does not exist.
        """
        from omegaconf import OmegaConf

        point = {key: value for key, value in point.items() if key != LABEL}
        groups = tuple(o for key, value in point.items() if _is_group(key) for o in _file_overrides([f"{key}={value}"]))
        composed = self._group(groups)
        config = copy.deepcopy({key: value for key, value in composed.items() if key != "sweep"})
        for key, value in point.items():
            if not _is_group(key):
                self._set(config, key, value)
        if "${" in canonical(config):
            config = OmegaConf.to_container(OmegaConf.create(config), resolve=True)  # type: ignore[assignment]
        return config

    def _set(self, config: Config, key: str, value: Any) -> None:
        *path, last = key.split(".")
        holder: Any = config
        for name in path:
            holder = holder.get(name) if isinstance(holder, dict) else None
        if not isinstance(holder, dict) or last not in holder:
            raise UserError(_unknown_key(self.experiment, key, config))
        holder[last] = value

    def _group(self, groups: tuple[str, ...]) -> Config:
        from hydra import compose, initialize_config_dir
        from hydra.errors import HydraException
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException
        from yaml import YAMLError

        if groups not in self._composed:
            try:
                with initialize_config_dir(str(conf.directory()), version_base="1.3"):
                    # Group choices of the point come after the user's, so that a sweep wins over a default.
                    composed = compose("config", [*self.overrides, *groups])
                    self._composed[groups] = OmegaConf.to_container(composed, resolve=False)  # type: ignore[assignment]
            except YAMLError as error:
                raise UserError(_yaml_error(error)) from None
            except (HydraException, OmegaConfBaseException) as error:
                raise UserError(_compose_error(error, [*self.overrides[1:], *groups])) from None
            if "experiment" in self._composed[groups]:  # Hydra put the file there, where nobody looks
                where = f"conf/experiment/{self.experiment}.yaml"
                raise UserError(f"{where}: its first line is not `# @package _global_`, so that it would say nothing.")
        return self._composed[groups]


def _is_group(key: str) -> bool:
    return (conf.directory() / key.split("@")[0]).is_dir()


def _file_overrides(overrides: Sequence[str]) -> list[str]:
    """Let a path stand where a calibration is named: `calibration=PATH` becomes the `file` calibration of PATH.

    `calibration@tuning.calibration=PATH` likewise.
    """
    result = []
    for override in overrides:
        key, _, value = override.partition("=")
        group, _, package = key.partition("@")
        if group == "calibration" and value not in conf.names("calibration") and Path(value).is_file():
            result += [f"{key}=file", f"{package or group}.path='{Path(value).resolve()}'"]
        else:
            result.append(override)
    return result


def _yaml_error(error: Any) -> str:
    """Return what is wrong with a file, in one line, and where."""
    mark = error.problem_mark
    return f"{mark.name}, line {mark.line + 1}: {error.problem}. Put quotes around values with braces or colons."


def _compose_error(error: Exception, overrides: Sequence[str]) -> str:
    for override in overrides:
        key, _, value = override.partition("=")
        group = key.lstrip("+~").split("@")[0]
        if (conf.directory() / group).is_dir() and value not in conf.names(group):
            return f"{override}: no conf/{group}/{value}.yaml; {nearest(value, conf.names(group))}."
    first = str(error).strip().splitlines()[0]
    return f"overrides {' '.join(overrides)}: {first}"


def _unknown_key(experiment: str, key: str, config: Config) -> str:
    group, _, name = key.partition(".")
    within = config.get(group) if name else None
    file, keys = "conf/config.yaml", list(config)
    if isinstance(within, dict):
        file, keys = f"conf/{group}/{within.get('name', '?')}.yaml", [k for k in within if k != "_target_"]
    known = nearest(name or key, keys)
    return f"conf/experiment/{experiment}.yaml: sweep key {key!r} is not in {file}; {known}."
