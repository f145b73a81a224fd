"""Sweeps of an experiment become composed configurations, one a point, with Hydra; imports no torch."""

import contextlib
import copy
import functools
import itertools
import operator
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from espalier import conf
from espalier.artefacts.store import canonical
from espalier.errors import UserError, nearest
from espalier.workflow import scale

Config = dict[str, Any]
Point = dict[str, Any]  # override key -> value
# Keys of a point that are no overrides: what its row is called, and what the sweep calls some of its values.
LABEL, NAMES = "label", "names"
PAPER = "paper."  # begins keys of a point that say where a paper prints its row, no overrides either
AS, ZIP, CASES = "as", "zip", "cases"  # keys of a block that are no overrides
Choice = tuple[str, ...]  # of a file of a group: the overrides that make it
WIDEST = 24  # characters of a list or mapping in a row's name


def is_seed(key: str) -> bool:
    """Whether a key of a sweep is a seed: rows that differ only in seeds are one line of the table."""
    return key.rpartition(".")[2] == "seed"


def is_shown(key: str) -> bool:
    """Whether a varied key of a sweep stands in the names of its rows."""
    return not is_seed(key) and not key.startswith(PAPER) and key != "model"


def overrides_of(point: Point) -> Point:
    """Return the keys and values that a point sets, without what only names it."""
    return {key: value for key, value in point.items() if key not in (LABEL, NAMES) and not key.startswith(PAPER)}


def shown(point: Point, key: str) -> str:
    """Return a value of a point as it stands in a row's name: what the sweep calls it, else the value, shortened."""
    if key in point.get(NAMES, {}):
        return str(point[NAMES][key])
    value, text = point[key], str(point[key])
    if len(text) <= WIDEST or not isinstance(value, list | dict):
        return text
    left, right = ("[", "]") if isinstance(value, list) else ("{", "}")
    items = [str(item) for item in value]
    return f"{left}{items[0]}, ...{len(items)}{right}" if len(items) > 1 else f"{text[: WIDEST - 4]}...{right}"


def points(sweep: Sequence[Config]) -> Iterator[Point]:
    """Yield the points of a sweep: blocks one after another, keys crossed, `zip` keys walked together, `cases` in turn.

    A key has a value, a list of values, or a mapping of names to values; the names stand in rows' names in place of
    the values. A case of `cases` is itself a block, whose points are crossed with the other keys of the block.
    A block's `as` names its rows: `label` of a point is that name with the keys that have several values, but seeds
    and models; the name itself is what a paper calls the method, unless `paper.method` says otherwise.
    UserError when the lists of a `zip` differ in length, a key has no value or two, or a block is not a mapping.
    """
    for block in sweep:
        for part in _block(block, "sweep"):
            point = dict(part.values)
            if part.names:
                point[NAMES] = part.names
            if part.titles:
                own = [f"{key.removeprefix('method.')}={shown(point, key)}" for key in part.varied]
                point[LABEL] = " ".join([*part.titles, *own])
                point.setdefault(f"{PAPER}method", " ".join(part.titles))
            yield point


@dataclass(frozen=True)
class _Part:
    """Some keys of a point with their values, the names of these, and what `as` makes of them."""

    values: Point
    names: dict[str, str] = field(default_factory=dict)
    titles: tuple[str, ...] = ()
    varied: tuple[str, ...] = ()  # keys that a title is followed by

    def __or__(self, other: "_Part") -> "_Part":
        for key in self.values.keys() & other.values.keys():
            raise UserError(f"sweep: {key!r} is given twice in one block. Give it in the block or in its cases.")
        values, names = self.values | other.values, self.names | other.names
        return _Part(values, names, self.titles + other.titles, self.varied + other.varied)


def _block(block: Any, where: str) -> Iterator[_Part]:
    """Yield the combinations of a block, the values of its last key in turn first."""
    if not isinstance(block, dict):
        raise UserError(f"{where}: {block!r} is not a mapping of keys to values.")
    special = {ZIP: _zip, CASES: _cases}
    axes = [
        special[key](values) if key in special else _axis(key, values) for key, values in block.items() if key != AS
    ]
    title = _Part({}, titles=(str(block[AS]),) if block.get(AS) is not None else ())
    for combination in itertools.product(*axes):
        yield functools.reduce(operator.or_, combination, title)


def _axis(key: str, values: Any) -> list[_Part]:
    """Return the values of one key, in their order."""
    found = values if isinstance(values, list | dict) else [values]
    if not found:
        raise UserError(f"sweep: {key!r} has no value. Give one, or leave the key out.")
    varied = (key,) if len(found) > 1 and is_shown(key) else ()
    if isinstance(found, dict):
        return [_Part({key: value}, {key: str(name)}, varied=varied) for name, value in found.items()]
    return [_Part({key: value}, varied=varied) for value in found]


def _zip(columns: Any) -> list[_Part]:
    """Return the combinations of keys that are walked together."""
    if not isinstance(columns, dict) or not columns:
        raise UserError(f"sweep.zip: {columns!r} is not a mapping of keys to lists of values.")
    axes = {key: _axis(key, values) for key, values in columns.items()}
    lengths = {key: len(axis) for key, axis in axes.items()}
    if len(set(lengths.values())) > 1:
        raise UserError(f"sweep.zip: lists of different lengths {lengths}. Give each key as many values.")
    varied = tuple(filter(is_shown, axes))
    rows = (functools.reduce(operator.or_, row) for row in zip(*axes.values(), strict=True))
    return [replace(row, varied=varied) for row in rows]


def _cases(cases: Any) -> list[_Part]:
    """Return the points of all cases; a case without a name of its own is told from the others by all its keys."""
    if not isinstance(cases, list) or not cases:
        raise UserError(f"sweep.cases: {cases!r} is not a list of blocks.")
    found = []
    for case in cases:
        for part in _block(case, "sweep.cases"):
            told = bool(part.titles) or len(cases) == 1
            found.append(part if told else replace(part, varied=tuple(filter(is_shown, part.values))))
    return found


class Composer:
    """Compose points with Hydra: once per choice of a group, values are set on a copy.

    A thousand points over ten methods and five calibrations are fifteen compositions and a thousand cheap updates.
    """

    def __init__(self, experiment: str, overrides: Sequence[str]) -> None:
        self.experiment = experiment
        self.overrides = [f"+experiment={experiment}", *_file_overrides(overrides)]
        self._said = {override.lstrip("+~").partition("=")[0]: override for override in overrides}
        self._composed: dict[tuple[Choice, ...], Config] = {}
        self._entangled: set[Choice] = set()
        self._groups = {path.name for path in conf.directory().iterdir() if path.is_dir()}
        if not (conf.directory() / "experiment" / f"{experiment}.yaml").exists():
            known = nearest(experiment, conf.names("experiment"))
            raise UserError(f"experiment={experiment}: no conf/experiment/{experiment}.yaml; {known}.")

    def sweep(self) -> list[Config]:
        """Return the experiment's `sweep`, a list of blocks, with `${seeds}` and the like filled in.

        UserError for an interpolation of a key that there is not, or a sweep without blocks.
        """
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        composed = copy.deepcopy(self._chosen(()))
        where = f"conf/experiment/{self.experiment}.yaml: sweep"
        if not isinstance(composed["sweep"], list) or not composed["sweep"]:
            raise UserError(f"{where}={composed['sweep']!r}, expected a list of blocks, such as [{{method: reap}}].")
        scale.resize(composed, self._said)
        try:
            filled = OmegaConf.to_container(OmegaConf.select(OmegaConf.create(composed), "sweep"), resolve=True)
        except OmegaConfBaseException as error:
            first = str(error).strip().splitlines()[0]
            raise UserError(f"{where}: {first}") from None
        return filled  # type: ignore[return-value]

    def compose(self, point: Point) -> Config:
        """Return the configuration of one point at the experiment's `scale`, with what stands for its model and data.

        UserError as for `written`.
        """
        config = self.written(point)
        if config["scale"]["name"] == scale.FULL:
            return config
        config = copy.deepcopy(self.written(point | scale.stand_ins(config)))  # compositions are shared
        scale.resize(config, self._said)
        return config

    def written(self, point: Point) -> Config:
        """Return the configuration of one point as plain dictionaries, interpolations resolved, without `sweep`.

        UserError for a group's unknown choice or a key that does not exist.
        """
        from omegaconf import OmegaConf

        values = overrides_of(point)
        chosen = {key: value for key, value in values.items() if key.split("@")[0] in self._groups}
        composed = self._chosen(tuple(_file_overrides([f"{key}={value}"]) for key, value in chosen.items()))
        config = {key: value for key, value in composed.items() if key != "sweep"}
        for key, value in values.items():
            if key not in chosen:
                self._set(config, key, value)
        if "${" in canonical(config):
            config = OmegaConf.to_container(OmegaConf.create(config), resolve=True)  # type: ignore[assignment]
        return config

    def _set(self, config: Config, key: str, value: Any) -> None:
        """Set a value in `config`; what holds it is copied, since compositions share it."""
        *path, last = key.split(".")
        holder: Any = config
        for name in path:
            inner = holder.get(name) if isinstance(holder, dict) else None
            if not isinstance(inner, dict):
                raise UserError(_unknown_key(self.experiment, key, config))
            holder[name] = dict(inner)
            holder = holder[name]
        if last not in holder:
            raise UserError(_unknown_key(self.experiment, key, config))
        holder[last] = value

    def _chosen(self, choices: tuple[Choice, ...]) -> Config:
        """Return the composition with some choices of groups; it is not to be changed.

        Choices that change different parts of the configuration are composed apart and put together, so that crossed
        groups cost a composition a choice; otherwise all are composed at once.
        """
        if choices not in self._composed:
            alone = [self._alone(choice) for choice in choices] if len(choices) > 1 else [None]
            apart = None if None in alone else _joined(self._chosen(()), [one for one in alone if one is not None])
            self._composed[choices] = apart or self._hydra([override for choice in choices for override in choice])
        return self._composed[choices]

    def _alone(self, choice: Choice) -> Config | None:
        """Return the composition with one choice, None where it needs another one (calibration@tuning.calibration)."""
        if choice not in self._entangled:
            try:
                return self._chosen((choice,))
            except UserError:
                self._entangled.add(choice)
        return None

    def _hydra(self, choices: Sequence[str]) -> Config:
        from hydra import compose, initialize_config_dir
        from hydra.errors import HydraException
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException
        from yaml import YAMLError

        try:
            with initialize_config_dir(str(conf.directory()), version_base="1.3"):
                # Group choices of the point come after the user's, so that a sweep wins over a default.
                composed = compose("config", [*self.overrides, *choices])
                config: Config = OmegaConf.to_container(composed, resolve=False)  # type: ignore[assignment]
        except YAMLError as error:
            raise UserError(_yaml_error(error)) from None
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(self._explained(error, [*self.overrides[1:], *choices])) from None
        if "experiment" in config:  # Hydra put the file there, where nobody looks
            where = f"conf/experiment/{self.experiment}.yaml"
            raise UserError(f"{where}: its first line is not `# @package _global_`, so that it would say nothing.")
        return config

    def _explained(self, error: Exception, overrides: Sequence[str]) -> str:
        """Say what is wrong with overrides; of a key that does not exist, which there are beside it."""
        missing = re.match(r"Could not override '([^']+)'", str(error))
        wrong = [override for override in overrides if missing and override.partition("=")[0] == missing[1]]
        if missing and wrong:
            rest = Composer(self.experiment, [override for override in overrides if override not in wrong])
            with contextlib.suppress(UserError):  # of the others one is wrong, too
                return f"{wrong[0]}: {_missing(missing[1], rest._chosen(()))}"
        return _compose_error(error, overrides)


def _joined(base: Config, alone: Sequence[Config]) -> Config | None:
    """Put together what each of several compositions changes of `base`; None where two change the same part."""
    changed = [{key for key in base | one if base.get(key) != one.get(key)} for one in alone]
    if sum(map(len, changed)) > len(set().union(*changed)):
        return None
    joined = dict(base)
    for one, keys in zip(alone, changed, strict=True):
        joined = {key: value for key, value in joined.items() if key not in keys}
        joined |= {key: one[key] for key in keys if key in one}
    return joined


def _file_overrides(overrides: Sequence[str]) -> Choice:
    """Let a path stand where a calibration is named: `calibration=PATH` becomes the `file` calibration of PATH.

    `calibration@tuning.calibration=PATH` likewise.
    """
    result: list[str] = []
    for override in overrides:
        key, _, value = override.partition("=")
        group, _, package = key.partition("@")
        if group == "calibration" and value not in conf.names("calibration") and Path(value).is_file():
            result += [f"{key}=file", f"{package or group}.path='{Path(value).resolve()}'"]
        else:
            result.append(override)
    return tuple(result)


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
    return f"conf/experiment/{experiment}.yaml: sweep key {_missing(key, config)}"


def _missing(key: str, config: Config) -> str:
    """Say that a key is in no file of a composed configuration, and what is there."""
    group, _, name = key.partition(".")
    within = config.get(group) if name else None
    file, keys = "conf/config.yaml", list(config)
    if isinstance(within, dict):
        file, keys = f"conf/{group}/{within.get('name', '?')}.yaml", [k for k in within if k != "_target_"]
    return f"{key!r} is not in {file}; {nearest(name or key, keys)}."
