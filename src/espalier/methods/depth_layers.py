"""Choose the decoder layers that tokens may skip, and make the plan that routes them.

`interleave` takes every second layer (MoDification, MoD arXiv 2404.02258), `last` the last ones, `arank` those of
lowest ARank (gamma-MoD, Luo et al., ICLR 2025, arXiv 2410.13859): the mean rank of the attention maps, see
`espalier.probes.attention_rank`. A list of numbers is taken as it is.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from espalier.checkpoints.shape import DenseShape, ModelShape
from espalier.collecting.stats import Stats
from espalier.errors import UserError, nearest
from espalier.methods.options import one_of, whole_number
from espalier.plans.depth import GRANULARITIES, Depth
from espalier.plans.plan import Plan
from espalier.plans.plan_tensors import PlanTensor

Shape = ModelShape | DenseShape
Layers = str | tuple[int, ...]
CHOICES = ("interleave", "last", "arank")
PROBE = "attention_rank"


@dataclass(frozen=True)
class RoutedLayers:
    """The keys of a method by which tokens skip `layers`, `count` of them where they are ranked, or parts of them."""

    layers: Any = "interleave"
    count: int | None = None
    granularity: str = "block"
    depth: ClassVar[bool] = True
    name: ClassVar[str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", check_keys(self.name, self.layers, self.count, self.granularity))

    @property
    def probes(self) -> tuple[str, ...]:
        """The statistics that the choice looks at."""
        return (PROBE,) if self.layers == "arank" else ()

    def check(self, shape: Shape, tokens: int) -> None:
        """Raise UserError for layers that the model has not."""
        check_layers(self.name, self.layers, self.count, self.granularity, shape)

    def routed(
        self, shape: Shape, stats: Stats, make: Callable[[int], tuple[Depth, Mapping[str, NDArray[Any]]]]
    ) -> Plan:
        """Return the plan that does to each chosen layer what `make` says of it.

        `make` gives the operation, with roles for the names of its tensors, and these tensors by role.
        """
        layers = chosen_layers(self.name, self.layers, self.count, self.granularity, shape, stats)
        return route({"name": self.name} | asdict(self), layers, make, stats)


def check_keys(method: str, layers: Any, count: Any, granularity: Any) -> Layers:
    """Return `layers`, a list as a tuple; UserError for keys of a method that cannot be."""
    where = f"conf/method/{method}.yaml"
    one_of(method, "granularity", granularity, GRANULARITIES)
    if count is not None:
        whole_number(method, "count", count, 1)
    if isinstance(layers, str):
        if layers not in CHOICES:
            raise UserError(f"{where}: layers={layers!r}; {nearest(layers, list(CHOICES))}, or a list of layers.")
        if layers != "interleave" and count is None:
            raise UserError(f"{where}: layers={layers} needs count, the number of layers.")
        if layers == "interleave" and count is not None:
            raise UserError(f"{where}: layers=interleave takes every second layer; count={count} is of last and arank.")
        return layers
    try:
        found = tuple(layers)
    except TypeError:
        found = ()
    if not found or not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in found):
        raise UserError(f"{where}: layers={layers!r} is none of {', '.join(CHOICES)}, nor a list of layers.")
    if count is not None:
        raise UserError(f"{where}: count={count} is of layers=last and arank; layers lists {len(found)} itself.")
    return found


def check_layers(method: str, layers: Layers, count: int | None, granularity: str, shape: Shape) -> None:
    """Raise the UserErrors of a choice that need no statistics."""
    able = _able(method, granularity, shape)
    where = f"conf/method/{method}.yaml"
    if isinstance(layers, tuple):
        wrong = sorted(set(layers) - set(able))
        if wrong or len(set(layers)) < len(layers):
            what = f"{wrong[0]} is none" if wrong else "one is named twice"
            raise UserError(f"{where}: layers={list(layers)}: {what}; those that can be skipped are {able}.")
    elif count is not None and count > len(able):
        raise UserError(f"{where}: count={count}, of {len(able)} layers that can be skipped.")
    elif layers == "interleave" and len(able) < 2:
        raise UserError(f"{where}: layers=interleave needs two layers that can be skipped, of which there are {able}.")


def chosen_layers(
    method: str, layers: Layers, count: int | None, granularity: str, shape: Shape, stats: Stats
) -> list[int]:
    """Return the chosen layers, ascending."""
    check_layers(method, layers, count, granularity, shape)
    able = _able(method, granularity, shape)
    if isinstance(layers, tuple):
        return sorted(layers)
    if layers == "interleave":
        return able[1::2]
    assert count is not None
    if layers == "last":
        return able[-count:]
    ranked = [layer for layer in able if (PROBE, layer) in stats.arrays]
    if len(ranked) < count:
        raise UserError(f"conf/method/{method}.yaml: layers=arank, and {len(ranked)} layers have attention maps.")
    return sorted(sorted(ranked, key=lambda layer: (mean_rank(stats, layer), layer))[:count])


def mean_rank(stats: Stats, layer: int) -> float:
    """Return ARank, the mean over heads and sequences."""
    own = stats.arrays[PROBE, layer]
    return float(np.mean(own["rank_sum"]) / own["sequences"][0])


def route(
    named: Mapping[str, Any],
    layers: list[int],
    make: Callable[[int], tuple[Depth, Mapping[str, NDArray[Any]]]],
    stats: Stats,
) -> Plan:
    """Return the plan of a method, `named` by its name and keys, that does to each layer what `make` says of it."""
    found: dict[int, tuple[Depth, ...]] = {}
    tensors: dict[str, PlanTensor] = {}
    evidence: dict[int, dict[str, Any]] = {}
    for layer in layers:
        operation, own = make(layer)
        names = {role: f"{layer}.depth.{role}" for role in operation.tensors_of}
        tensors |= {names[role]: PlanTensor.of(own[role]) for role in names}
        found[layer] = (Depth(**(vars(operation) | {"tensors_of": names})),)
        if (PROBE, layer) in stats.arrays:
            evidence[layer] = {"arank": mean_rank(stats, layer)}
    return Plan(dict(named), found, evidence, tensors=tensors)


def _able(method: str, granularity: str, shape: Shape) -> list[int]:
    """Return the layers of which `granularity` can be skipped; UserError for a family of which nothing can be."""
    decoder = shape.decoder
    if decoder is None or decoder.refused:
        why = "" if decoder is None else f": {decoder.refused}"
        raise UserError(f"conf/method/{method}.yaml: layers of {shape.family} cannot be skipped token by token{why}.")
    return list(range(decoder.layers)) if granularity == "ffn" else list(decoder.attends)
