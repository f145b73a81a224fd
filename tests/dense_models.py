"""Tiny random dense models of each family, and plans that split their FFNs in every way there is."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from espalier.models.live_split import change_layer
from espalier.plans.plan import Plan
from espalier.plans.plan_tensors import PlanTensor
from espalier.plans.split import Split
from tiny import COMMON, save_tokenizer

WIDTH, HIDDEN, LAYERS = 48, 32, 2
OWN: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 8},
    "mistral": {"head_dim": 8, "sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "phi": {"num_key_value_heads": 4},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16},
}
FAMILIES = tuple(OWN)

# Blocks of 12 neurons, and six segments of which units share some.
EVEN: dict[str, Any] = {"segments": (12, 12, 12, 12), "units": ((0,), (1,), (2,), (3,))}
SHARED: dict[str, Any] = {"segments": (10, 14, 12, 12), "units": ((1,), (2,), (3,)), "shared": 1}
OVERLAP: dict[str, Any] = {
    "segments": (9, 4, 6, 11, 3, 7),
    "units": ((0, 1, 4), (1, 2, 5), (0, 2, 3, 4), (1, 3, 5)),
    "neurons": "{layer}.neurons",
}
LINEAR = {"weight": "{layer}.weight"}
BIASED = LINEAR | {"bias": "{layer}.bias"}
ANALYTIC = {"gate": "{layer}.gate", "up": "{layer}.up", "scale": "{layer}.scale", "bias": "{layer}.bias"}
OFFSET = {"gate": "{layer}.gate", "offset": "{layer}.offset"}

KINDS: dict[str, Split] = {
    "dsmoe": Split(**EVEN, router="linear", choose="threshold", threshold=0.5, weights="gate", tensors_of=LINEAR),
    "dsmoe_none_fires": Split(
        **EVEN, router="linear", choose="threshold", threshold=0.9999, weights="gate", tensors_of=BIASED
    ),
    "threshold_one": Split(
        **SHARED, router="linear", choose="threshold", threshold=0.6, scale=1.5, tensors_of=BIASED
    ),
    "tomoe": Split(**OVERLAP, router="linear", k=1, tensors_of=LINEAR),
    "two_overlapping": Split(**OVERLAP, router="linear", k=2, tensors_of=LINEAR),
    "similarity": Split(**EVEN, router="linear", k=2, normalise=True, tensors_of=BIASED),
    "mlp": Split(**EVEN, router="mlp", k=2, normalise=True, hidden_units=5,
                 tensors_of={"first": "{layer}.first", "second": "{layer}.second"}),
    "llama_moe": Split(**EVEN, router="linear", k=2, weights="softmax", scale=2.0, tensors_of=LINEAR),
    "cmoe": Split(**SHARED, router="analytic", k=2, weights="score", tensors_of=ANALYTIC),
    "analytic": Split(**SHARED, router="analytic", k=1, tensors_of=OFFSET),
    "oracle": Split(**SHARED, router="oracle", k=2),
    "oracle_neurons": Split((10, 38), shared=1, router="oracle", k=14, level="neurons"),
    "narrower": Split((20,), neurons="{layer}.neurons"),
}  # fmt: skip
STOCK = ("narrower",)


def save_dense(family: str, directory: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Write a tiny random model with its tokenizer into `directory` and return it; equal arguments, equal bytes."""
    config = COMMON | {"intermediate_size": WIDTH, "num_hidden_layers": LAYERS} | OWN[family] | changes
    config.pop("num_experts_per_tok")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **config), dtype=dtype)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return Path(directory)


def made_once(factory: Any) -> Any:
    """Return a function that gives the directory of a family's tiny model, made at its first use."""
    return cache(lambda family: save_dense(family, factory.mktemp(family)))


def split_plan(split: Split, layers: int = LAYERS, seed: int = 0) -> Plan:
    """Return the plan that does `split` in every layer, with random tensors."""
    operations, tensors = {}, {}
    for layer in range(layers):
        rng = np.random.default_rng(seed + layer)
        named = {role: name.format(layer=layer) for role, name in split.tensors_of.items()}
        neurons = None if split.neurons is None else split.neurons.format(layer=layer)
        own = Split(**(vars(split) | {"tensors_of": named, "neurons": neurons}))
        for role, shape in own.router_shapes(HIDDEN).items():
            tensors[named[role]] = PlanTensor.of(rng.normal(0, 1.0, shape))
        if neurons is not None:
            tensors[neurons] = PlanTensor.of(rng.permutation(WIDTH)[: own.width])
        operations[layer] = (own,)
    return Plan({"name": "example"}, operations, tensors=tensors)


def live_split(model: Any, plan: Plan, family: Any) -> None:
    """Change a loaded dense model in memory to do what `plan` says."""
    for layer, operations in plan.layers.items():
        change_layer(model.model.layers[layer], operations, family, plan.tensors, model.config)
