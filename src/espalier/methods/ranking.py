"""Rank the experts of each MoE block by a score and keep the best."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.checkpoints.shape import ModelShape
from espalier.methods.budget import global_survivors, survivors
from espalier.plans.operations import Keep
from espalier.plans.plan import Plan

BUDGETS = ("uniform", "global")


def keep_best(
    method: dict[str, Any],
    scores: Iterable[tuple[int, NDArray[Any]]],
    shape: ModelShape,
    evidence: bool = True,
    budget: str = "uniform",
) -> Plan:
    """Return the plan that keeps the experts of highest score in every layer.

    `method` holds name, ratio and further settings; `scores` yields (layer, [E] scores). Of equal scores the
    lower expert id is kept; with router groups, each group keeps the same number. `budget="global"` ranks the experts
    of all layers together, so that layers keep different numbers (at least what their router needs), in all as many
    as a uniform budget would. Evidence: the scores. UserError when the ratio does not fit the model.
    """
    count = survivors(method["ratio"], shape, f"conf/method/{method['name']}.yaml")
    by_layer = {layer: np.asarray(values) for layer, values in scores}
    counts = dict.fromkeys(by_layer, count)
    if budget == "global":
        counts = global_survivors(by_layer, shape, count * len(by_layer))
    layers, found = {}, {}
    for layer, values in by_layer.items():
        by_group = values.reshape(shape.groups, -1)  # [groups, E / groups]
        best = np.argsort(-by_group, axis=1, kind="stable")[:, : counts[layer] // shape.groups]
        ids = best + by_group.shape[1] * np.arange(shape.groups)[:, None]
        layers[layer] = (Keep(tuple(sorted(ids.ravel().tolist()))),)
        if evidence:
            found[layer] = {"scores": by_group.ravel().tolist()}
    return Plan(method, layers, found)


def mean(total: NDArray[Any], counts: NDArray[Any]) -> NDArray[np.float64]:
    """Return total / counts, [E] float64, and 0 for an expert that no token was routed to."""
    result = np.zeros(len(counts))
    np.divide(total, counts, out=result, where=counts > 0)
    return result
