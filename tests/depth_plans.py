"""Plans that let tokens skip layers of tiny models, in every way there is, and running a model token by token."""

from typing import Any

import numpy as np
import torch

from espalier.checkpoints.shape import DenseShape, ModelShape
from espalier.plans.depth import Depth
from espalier.plans.plan import Plan
from espalier.plans.plan_tensors import PlanTensor

GATE = {"weight": "{layer}.depth.weight", "bias": "{layer}.depth.bias"}
PREDICTOR = GATE | {"first": "{layer}.depth.first", "second": "{layer}.depth.second", "offset": "{layer}.depth.offset"}
THRESHOLD: dict[str, Any] = {"rule": "threshold", "threshold": 0.5, "tensors_of": GATE}
GUESSED: dict[str, Any] = {"capacity": 0.6, "tensors_of": PREDICTOR, "hidden_units": 5}

KINDS: dict[str, Depth] = {
    "threshold": Depth(**THRESHOLD),
    "threshold_attention": Depth(**THRESHOLD, granularity="attention"),
    "threshold_ffn": Depth(**THRESHOLD, granularity="ffn"),
    "mask": Depth(**THRESHOLD, weights="mask"),
    "mask_attention": Depth(**THRESHOLD, weights="mask", granularity="attention"),
    "all_keys": Depth(**THRESHOLD, cache="all"),
    "nothing_kept": Depth(**(THRESHOLD | {"threshold": 1.0})),
    "nothing_kept_attention": Depth(**(THRESHOLD | {"threshold": 1.0}), granularity="attention"),
    "nothing_kept_ffn": Depth(**(THRESHOLD | {"threshold": 1.0}), granularity="ffn"),
    "all_kept": Depth(**(THRESHOLD | {"threshold": 0.0})),
    "top_k": Depth(rule="top_k", **GUESSED),
    "top_k_attention": Depth(rule="top_k", **GUESSED, granularity="attention"),
    "predictor": Depth(rule="predictor", **GUESSED),
    "predictor_ffn": Depth(rule="predictor", **GUESSED, granularity="ffn"),
    "random": Depth(rule="random", capacity=0.5, seed=3),
    "random_attention": Depth(rule="random", capacity=0.5, seed=3, granularity="attention"),
    "drop": Depth(rule="drop"),
    "drop_attention": Depth(rule="drop", granularity="attention"),
    "drop_ffn": Depth(rule="drop", granularity="ffn"),
}


def depth_plan(
    kind: str | Depth, shape: DenseShape | ModelShape, layers: list[int] | None = None, seed: int = 0
) -> Plan:
    """Return the plan that routes `layers`, by default all that can be (dropping: the first), with random routers."""
    operation = KINDS[kind] if isinstance(kind, str) else kind
    assert shape.decoder is not None
    if layers is None:
        layers = list(range(shape.decoder.layers)) if operation.granularity == "ffn" else list(shape.decoder.attends)
        layers = layers[:1] if operation.rule == "drop" else layers
    found, tensors = {}, {}
    for layer in layers:
        rng = np.random.default_rng(seed + layer)
        named = {role: name.format(layer=layer) for role, name in operation.tensors_of.items()}
        own = Depth(**(vars(operation) | {"tensors_of": named}))
        for role, size in own.router_shapes(shape.hidden).items():
            tensors[named[role]] = PlanTensor.of(rng.normal(0, 0.3, size))
        found[layer] = (own,)
    return Plan({"name": "example"}, found, tensors=tensors)


@torch.inference_mode()
def token_by_token(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, first: int = 1) -> torch.Tensor:
    """Return the logits [B, L, V] of cached decoding: `first` tokens at once, then one at a time."""
    cache, found = None, []
    start = 0
    for stop in range(first, ids.shape[1] + 1):
        given: dict[str, Any] = {}
        if mask is not None:
            positions = (mask[:, :stop].cumsum(1) - 1).clamp(min=0)
            given = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:]}
        output = model(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True, **given)
        cache, start = output.past_key_values, stop
        found.append(output.logits)
    return torch.cat(found, dim=1)
