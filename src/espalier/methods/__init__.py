"""Compression methods: one file each, a frozen dataclass whose `plan` maps statistics to a plan."""

from dataclasses import MISSING, fields
from importlib import import_module
from typing import Any, ClassVar, Protocol

from espalier.errors import UserError, nearest
from espalier.plan import Plan
from espalier.shape import ModelShape
from espalier.stats import Stats


class Method(Protocol):
    """The contract of a method; its fields are the keys of its YAML in conf/method.

    `probes` names the statistics it needs (`espalier.probes`). `plan` is pure and deterministic: equal
    evidence gives an equal plan, ties go to the lower expert id, and permuting experts permutes the plan.
    """

    probes: ClassVar[tuple[str, ...]]

    def plan(self, stats: Stats, shape: ModelShape) -> Plan: ...


def build(config: dict[str, Any]) -> Method:
    """Instantiate the class that `_target_` names with the other keys but `name`.

    UserError on an unknown or missing key, naming the YAML and the keys that exist.
    """
    name = config.get("name", "?")
    where = f"conf/method/{name}.yaml"
    module, _, attribute = str(config.get("_target_", "")).rpartition(".")
    try:
        cls = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError):
        raise UserError(f"{where}: _target_={config.get('_target_')!r} cannot be imported. Name a class.") from None
    known = {f.name: f for f in fields(cls)}
    given = {key: value for key, value in config.items() if key not in ("_target_", "name")}
    for key in given:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}; {nearest(key, list(known))}.")
    for key, f in known.items():
        if key not in given and f.default is MISSING and f.default_factory is MISSING:
            raise UserError(f"{where}: key {key!r} has no value. Give {key}=... .")
    method: Method = cls(**given)
    return method
