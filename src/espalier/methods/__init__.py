"""Compression methods: one file each, a frozen dataclass whose `plan` maps statistics to a plan."""

from dataclasses import MISSING, fields
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from espalier.checkpoints.checkpoint import Checkpoint
from espalier.checkpoints.shape import DenseShape, ModelShape
from espalier.collecting.stats import Stats
from espalier.errors import UserError, nearest
from espalier.methods.budget import survivors
from espalier.plans.plan import Plan
from espalier.training.fit_settings import Fitting

if TYPE_CHECKING:
    from espalier.models.experts import ExpertWeights
    from espalier.models.ffn_weights import FFNWeights


class Method(Protocol):
    """The contract of a method; its fields are the keys of its YAML in conf/method.

    `probes` names the statistics it needs (`espalier.probes`). `plan` is pure and deterministic: equal
    evidence gives an equal plan, ties go to the lower expert id, and permuting experts permutes the plan.
    A method that needs something learnt has a property `fit`, a `Fitting`, and finds it among the statistics under the
    fitting's name. A method that also looks at weights is a `WeightMethod`. A method may have `check(shape, tokens)`,
    which raises the UserErrors that can be known before anything is collected, from the model's shape and the number
    of tokens (0: not known). One that groups experts may have `apart(layer, stats, shape)`, the distances [E, E] that
    it does so by, for the report to show.
    """

    @property
    def probes(self) -> tuple[str, ...]: ...

    def plan(self, stats: Stats, shape: ModelShape) -> Plan: ...


class WeightMethod(Protocol):
    """A method whose plan also depends on the model's weights, which it reads a layer at a time."""

    reads_weights: ClassVar[bool]  # True

    @property
    def probes(self) -> tuple[str, ...]: ...

    def plan(self, stats: Stats, shape: ModelShape, experts: "ExpertWeights") -> Plan: ...


class ComparingMethod(Protocol):
    """A method that also looks at the weights of a second model, which its key `base` names."""

    reads_weights: ClassVar[bool]  # True
    base: str | None

    @property
    def probes(self) -> tuple[str, ...]: ...

    def plan(self, stats: Stats, shape: ModelShape, experts: "ExpertWeights", base: "ExpertWeights") -> Plan: ...


class DenseMethod(Protocol):
    """A method for dense models, whose FFNs it splits."""

    dense: ClassVar[bool]  # True

    @property
    def probes(self) -> tuple[str, ...]: ...

    def plan(self, stats: Stats, shape: DenseShape, ffns: "FFNWeights") -> Plan: ...


class DepthMethod(Protocol):
    """A method for either kind of model, by which tokens skip layers.

    With `reads_checkpoint` its `plan` gets the checkpoint too, of which it may look at config.json.
    """

    depth: ClassVar[bool]  # True

    @property
    def probes(self) -> tuple[str, ...]: ...

    def plan(self, stats: Stats, shape: "Shape") -> Plan: ...


AnyMethod = Method | WeightMethod | ComparingMethod | DenseMethod | DepthMethod
Shape = ModelShape | DenseShape


def base_of(method: AnyMethod) -> str | None:
    """Return what names the second model of a method, or None if it needs none; UserError when it is not named."""
    if "base" not in {f.name for f in fields(cast(Any, method))}:
        return None
    base: str | None = cast(ComparingMethod, method).base
    if not base:
        where = type(method).__module__.rpartition(".")[2]
        raise UserError(
            f"conf/method/{where}.yaml: base is not given. Name the model that this one was fine-tuned from: "
            "base=DIRECTORY or base=ORG/NAME@COMMIT."
        )
    return base


def make_plan(method: AnyMethod, stats: Stats, shape: Shape, directory: Path, base: Path | None = None) -> Plan:
    """Return the method's plan for the checkpoint in `directory`, checked against `shape`.

    `base` is the directory of the second model, for a method that has one.
    """
    _check_kind(method, shape)
    if is_for_depth(method):
        if getattr(method, "reads_checkpoint", False):
            return cast(Any, method).plan(stats, shape, Checkpoint(directory)).check(shape)  # type: ignore[no-any-return]
        return cast(DepthMethod, method).plan(stats, shape).check(shape)
    if isinstance(shape, DenseShape):
        from espalier.models.ffn_weights import FFNWeights

        return cast(DenseMethod, method).plan(stats, shape, FFNWeights(directory)).check(shape)
    if getattr(method, "reads_weights", False):
        from espalier.models.experts import ExpertWeights

        experts = ExpertWeights(directory)
        if base is not None:
            return cast(ComparingMethod, method).plan(stats, shape, experts, ExpertWeights(base)).check(shape)
        return cast(WeightMethod, method).plan(stats, shape, experts).check(shape)
    return cast(Method, method).plan(stats, shape).check(shape)


def is_for_dense(method: AnyMethod) -> bool:
    """Whether a method splits the FFNs of dense models; the others change experts."""
    return getattr(method, "dense", False) is True


def is_for_depth(method: AnyMethod) -> bool:
    """Whether a method lets tokens skip layers, of either kind of model."""
    return getattr(method, "depth", False) is True


def check(method: AnyMethod, shape: Shape, tokens: int | None) -> None:
    """Raise the UserErrors of a method that need no statistics, for `tokens` calibration tokens (None: not known).

    A method without a `check` of its own has its `ratio` checked, if it has one.
    """
    _check_kind(method, shape)
    own = getattr(method, "check", None)
    if own is not None:
        own(shape, tokens or 0)
    elif hasattr(method, "ratio") and isinstance(shape, ModelShape):
        survivors(method.ratio, shape, f"conf/method/{type(method).__module__.rpartition('.')[2]}.yaml")


def _check_kind(method: AnyMethod, shape: Shape) -> None:
    """Raise UserError for a method for dense models and a model with experts, or the other way round."""
    if is_for_depth(method) or is_for_dense(method) == isinstance(shape, DenseShape):
        return
    where = f"conf/method/{type(method).__module__.rpartition('.')[2]}.yaml"
    if isinstance(shape, DenseShape):
        raise UserError(
            f"{where}: changes the experts of a Mixture-of-Experts model, and {shape.family} is a dense model without "
            "experts. Use a method for dense models, such as dsmoe, moefication or static."
        )
    raise UserError(
        f"{where}: splits the feed-forward networks of a dense model, and {shape.family} has experts already. Use a "
        "method for experts, such as reap or hc_smoe."
    )


def is_sequential(method: AnyMethod) -> bool:
    """Whether a method decides layer by layer while the model runs (`collecting.sequential`), without statistics."""
    return getattr(method, "sequential", False) is True


def fit_of(method: AnyMethod) -> Fitting | None:
    """Return the settings of what a method needs to be learnt, or None if it needs nothing (`training.fit`)."""
    fit: Fitting | None = getattr(method, "fit", None)
    return fit


def evidence_of(method: AnyMethod) -> tuple[str, ...]:
    """Return the names under which a method finds arrays in its statistics: its probes, then what is learnt."""
    fit = fit_of(method)
    return (*method.probes, *(() if fit is None else (fit.name,)))


def distances_of(method: AnyMethod, stats: Stats, shape: ModelShape) -> dict[int, NDArray[np.float64]]:
    """Return by layer the distances [E, E] by which a method grouped the experts of a model, from its statistics.

    Empty for a method that groups none, and for one that reads them from the weights.
    """
    apart = getattr(method, "apart", None)
    if apart is None or getattr(method, "similarity", None) == "weight":
        return {}
    return {layer: apart(layer, stats, shape) for layer in shape.layers}


def build(config: dict[str, Any]) -> AnyMethod:
    """Instantiate the class that `_target_` names with the other keys but `name`.

    UserError on an unknown or missing key, naming the YAML and the keys that exist, and for a ratio that is no number.
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
    ratio = given.get("ratio", 0.5)
    if isinstance(ratio, bool) or not isinstance(ratio, int | float):
        raise UserError(f"{where}: ratio={ratio} is not a fraction in (0, 1).")
    method: AnyMethod = cls(**given)
    return method
