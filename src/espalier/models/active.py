"""Measure the parameters that a token uses, over whatever a model is run on."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from espalier.checkpoints.checkpoint import Checkpoint
from espalier.checkpoints.decoder_shape import part_prefix
from espalier.families import names as family_names
from espalier.models import runtime
from espalier.models.depth_count import DepthCount, count_depth
from espalier.models.ffn_count import count_neurons

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
    `depth` is, by layer that tokens may skip, the share that enters; what is skipped counts for nobody that skips it.
    `tokens` is left to the caller.
    """
    active: Document = {"tokens": 0, "experts_per_token": {}}
    inner = _experts if is_moe(checkpoint) else _neurons
    with count_depth(model) as depth, inner(model, checkpoint, active, depth):
        yield active
    if depth.tokens:
        active["depth"] = {str(layer): share for layer, share in sorted(depth.shares().items())}


def _means(sums: Mapping[int, int], tokens: Mapping[int, int], depth: DepthCount) -> dict[int, float]:
    """Return means over all tokens, those that skip a layer among them."""
    return {layer: total / depth.tokens.get(layer, tokens[layer]) for layer, total in sums.items() if tokens[layer]}


@contextlib.contextmanager
def _experts(model: Any, checkpoint: Checkpoint, active: Document, depth: DepthCount) -> Iterator[None]:
    with runtime.count_active(model, checkpoint.family) as counter:
        yield
    means = _means(counter.runs, counter.tokens, depth)
    one_expert = checkpoint.shape().expert_parameters
    active["experts_per_token"] = {str(layer): value for layer, value in sorted(means.items())}
    active["parameters"] = checkpoint.always_active_parameters + math.fsum(means.values()) * one_expert
    counted = {
        layer: sum(checkpoint.entries[name].size for name in checkpoint.routed_tensors(layer))
        for layer in checkpoint.expert_counts
    }
    active["parameters"] -= _skipped(checkpoint, depth, counted)


@contextlib.contextmanager
def _neurons(model: Any, checkpoint: Checkpoint, active: Document, depth: DepthCount) -> Iterator[None]:
    active["parameters"] = float(checkpoint.parameters)
    if not checkpoint.is_dense:
        yield
        return
    shape = checkpoint.dense_shape()
    settings_of = checkpoint.config.get("espalier", {}).get("layers", {})
    with count_neurons(model, checkpoint.dense_family) as counter:
        yield
    means = _means(counter.neurons, counter.tokens, depth)
    if settings_of:
        active["neurons_per_token"] = {str(layer): value for layer, value in sorted(means.items())}
    stored = dict.fromkeys(shape.layers, shape.width)
    stored |= {int(layer): sum(settings["segments"]) for layer, settings in settings_of.items()}
    for layer, settings in settings_of.items():
        router = settings["router"]
        if router["kind"] == "oracle":  # what it would run if it knew
            widths = [sum(settings["segments"][s] for s in unit) for unit in settings["units"]]
            always = sum(settings["segments"][: settings["shared"]])
            means[int(layer)] = always + router["k"] * (1 if router["level"] == "neurons" else np.mean(widths))
    idle = math.fsum(stored[layer] - value for layer, value in means.items())
    counted = {layer: stored[layer] * shape.neuron_parameters for layer in means}
    active["parameters"] -= idle * shape.neuron_parameters + _skipped(checkpoint, depth, counted)
    gone = math.fsum(shape.width - width for width in stored.values())
    missed = math.fsum(
        (1 - share) * stored[layer]
        for layer, share in depth.shares().items()
        if layer not in means and _granularity(checkpoint, layer)[0] != "attention"
    )
    active["neurons"] = float(shape.width * len(shape.layers)) - gone - idle - missed


def _granularity(checkpoint: Checkpoint, layer: int) -> tuple[str, str]:
    """Return what of a routed layer tokens skip, and whose keys there are."""
    own = checkpoint.config["espalier"]["depth"]["layers"][str(layer)]
    return own["granularity"], own["cache"]


def _skipped(checkpoint: Checkpoint, depth: DepthCount, counted: Mapping[int, int]) -> float:
    """Return the parameters that a token skips on average; `counted` ones of a layer's FFN are counted apart."""
    decoder = checkpoint.any_shape().decoder
    assert decoder is not None
    total = 0.0
    for layer, share in depth.shares().items():
        granularity, cache = _granularity(checkpoint, layer)
        skipped = "ffn" if cache == "all" else granularity
        part = decoder.part(layer, skipped) - (0 if granularity == "attention" else counted.get(layer, 0))
        prefix = f"{part_prefix(checkpoint, layer, skipped)}depth_router."
        part -= sum(entry.size for name, entry in checkpoint.entries.items() if name.startswith(prefix))
        total += (1 - share) * part
    return total
