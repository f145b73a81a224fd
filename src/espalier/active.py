"""Measure the parameters that a token uses, over whatever a model is run on."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from espalier import runtime
from espalier.checkpoint import Checkpoint
from espalier.families import names as family_names
from espalier.ffn_count import count_neurons

Document = dict[str, Any]


def is_moe(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is of a family with experts."""
    return checkpoint.config.get("model_type") in family_names()


@contextlib.contextmanager
def count_parameters(model: Any, checkpoint: Checkpoint) -> Iterator[Document]:
    """Count what tokens run in the forwards inside; the yielded document is filled when the context ends.

    `parameters` are those that a token uses on average: all but the routed experts, and the distinct experts
    that it runs in each layer (`experts_per_token`). Of a dense model all, but for the neurons of split FFNs that it
    does not run; `neurons` are those that it does run, of all layers (`neurons_per_token` of those that choose).
    `tokens` is left to the caller.
    """
    active: Document = {"tokens": 0, "experts_per_token": {}}
    if not is_moe(checkpoint):
        with _counted_neurons(model, checkpoint, active):
            yield active
        return
    with runtime.count_active(model, checkpoint.family) as counter:
        yield active
    means = counter.means()
    one_expert = checkpoint.shape().expert_parameters
    active["experts_per_token"] = {str(layer): value for layer, value in sorted(means.items())}
    active["parameters"] = checkpoint.always_active_parameters + math.fsum(means.values()) * one_expert


@contextlib.contextmanager
def _counted_neurons(model: Any, checkpoint: Checkpoint, active: Document) -> Iterator[None]:
    active["parameters"] = float(checkpoint.parameters)
    if not checkpoint.is_dense:
        yield
        return
    shape = checkpoint.dense_shape()
    active["neurons"] = float(shape.width * len(shape.layers))
    split = checkpoint.config.get("espalier", {}).get("layers")
    if split is None:
        yield
        return
    with count_neurons(model, checkpoint.dense_family) as counter:
        yield
    means = counter.means()
    active["neurons_per_token"] = {str(layer): value for layer, value in sorted(means.items())}
    stored = {int(layer): sum(settings["segments"]) for layer, settings in split.items()}
    for layer, settings in split.items():
        router = settings["router"]
        if router["kind"] == "oracle":  # what it would run if it knew
            widths = [sum(settings["segments"][s] for s in unit) for unit in settings["units"]]
            always = sum(settings["segments"][: settings["shared"]])
            means[int(layer)] = always + router["k"] * (1 if router["level"] == "neurons" else np.mean(widths))
    idle = math.fsum(stored[layer] - value for layer, value in means.items())
    active["parameters"] -= idle * shape.neuron_parameters
    active["neurons"] -= math.fsum(shape.width - width for width in stored.values()) + idle
