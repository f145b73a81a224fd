"""Plans for the tiny models: one of each kind of operation."""

from dataclasses import replace

import numpy as np

from espalier.plans.operations import NO_ATTENTION_WEIGHTS, Constant, Keep, Merge, Narrow, Operation, Skip
from espalier.plans.plan import Plan
from espalier.plans.plan_tensors import PlanTensor
from tiny import DENSE_LAYERS, FAMILIES, ONE_EXPERT

EXPERTS, WIDTH, HIDDEN = 8, 24, 32  # of every tiny model

# Survivors and first members lie evenly in two router groups of four.
GROUPS = ((0, 3, 6), (1, 2), (4, 7), (5,))
WEIGHTS = ((0.2, 0.5, 0.3), (0.6, 0.4), (0.25, 0.75), (1.0,))

KINDS: dict[str, tuple[Operation, ...]] = {
    "keep": (Keep((0, 2, 5, 7)),),
    "remap": (Merge(GROUPS, WEIGHTS, "remap"),),
    "slice": (Merge(GROUPS, WEIGHTS, "slice"),),
    "slice_rows": (Merge(GROUPS, WEIGHTS, "slice", rows=(3, 1, 7, 5)),),
    "tie": (Merge(GROUPS, WEIGHTS, "tie"),),
    "skip": (Skip(0.6),),
    "keep_skip": (Keep((1, 2, 4, 6)), Skip(0.5)),
    "remap_skip": (Merge(GROUPS, WEIGHTS, "remap"), Skip(0.3, "tail")),
    "neurons": (Merge(GROUPS, WEIGHTS, "remap", neurons="{layer}.neurons"),),
    "refit": (Merge(GROUPS, WEIGHTS, "tie", down="{layer}.down"),),
    "keep_neurons": (
        Keep((0, 2, 5, 7)),
        Merge(((0, 2), (1, 3)), ((0.3, 0.7), (0.5, 0.5)), "remap", neurons="{layer}.neurons"),
    ),
    "skip_tail": (Skip(0.3, "tail"),),
    "skip_top_p": (Skip(rule="top_p", p=0.45),),
    "skip_fixed_k": (Skip(rule="fixed_k", k=1),),
    "skip_factor": (Skip(0.6, factor="{layer}.factor"),),
    "skip_protect": (Skip(0.7, protect=0.3),),
    "keep_skip_factor": (Keep((1, 2, 4, 6)), Skip(0.6, factor="{layer}.factor")),
    "keep_skip_protect": (Keep((1, 2, 4, 6)), Skip(0.7, protect=0.3)),
    "remap_skip_top_p": (Merge(GROUPS, WEIGHTS, "remap"), Skip(rule="top_p", p=0.45)),
    "remap_skip_factor": (Merge(GROUPS, WEIGHTS, "remap"), Skip(0.6, factor="{layer}.factor")),
    "remap_skip_protect": (Merge(GROUPS, WEIGHTS, "remap"), Skip(0.7, protect=0.3)),
    "constant": (Constant((1, 4), "{layer}.vectors"),),
    "constant_skip": (Constant((1, 4, 6), "{layer}.vectors"), Skip(0.5)),
    "narrow": (Narrow("{layer}.kept", 16, 8 * 16),),
    "keep_narrow": (Keep((0, 2, 5, 7)), Narrow("{layer}.kept", 10, 4 * 10 - 6)),
    "few": (Merge(((0, 1, 2, 3, 4, 5, 6, 7),), ((0.125,) * 8,), "remap"),),  # fewer experts than the router picks
}
SHIPPED = ("remap", "few", "neurons", "keep_neurons", "constant")  # and all that skip
NO_SOFTMAX = ("deepseek_v3", "glm4_moe", "minimax_m2", "phimoe")  # routers without a sum over all experts
WIDTH_SHARED = ("deepseek_v2", "deepseek_v3", "ernie4_5_moe", "glm4_moe", "jamba", "llama4_text")


def needs_code(family_name: str, kind: str) -> bool:
    """Whether what KINDS[kind] leaves of a model loads through the shipped code only."""
    return kind in SHIPPED or "skip" in kind or ("narrow" in kind and family_name in WIDTH_SHARED)


def examples(*kinds: str) -> list[tuple[str, str]]:
    """Return each family with each of the `kinds` (default: all) that its router has a meaning for."""
    chosen = kinds or tuple(KINDS)
    return [
        (name, kind)
        for name in FAMILIES
        for kind in chosen
        if not (name in ONE_EXPERT and ("skip" in kind or "constant" in kind))
        and not (name in NO_SOFTMAX and "top_p" in kind)
        and not (name in NO_ATTENTION_WEIGHTS and "protect" in kind)
    ]


def moe_layers(family_name: str) -> list[int]:
    """Return the layers of a tiny model that hold a MoE block."""
    return [layer for layer in range(3) if layer not in DENSE_LAYERS.get(family_name, ())]


def example_plan(family_name: str, kind: str) -> Plan:
    """Return the plan that does KINDS[kind] in every MoE layer; `uneven_...` spares the last layer some experts."""
    layers = {layer: KINDS[kind.removeprefix("uneven_")] for layer in moe_layers(family_name)}
    if kind == "uneven_keep":
        layers[2] = (Keep((0, 1, 2, 4, 5, 7)),)
    elif kind == "uneven_remap":
        layers[2] = (
            Merge(((0, 1), (2,), (3,), (4, 6), (5,), (7,)), ((0.5, 0.5), (1.0,), (1.0,), (0.9, 0.1), (1.0,), (1.0,))),
        )
    named = {layer: tuple(_named(operation, layer) for operation in operations) for layer, operations in layers.items()}
    tensors: dict[str, PlanTensor] = {}
    for layer, operations in named.items():
        experts = EXPERTS
        for operation in operations:
            tensors |= _tensors(operation, experts, layer)
            experts = len(operation.experts) if isinstance(operation, Keep) else experts
            if isinstance(operation, Merge) and operation.router != "tie":
                experts = len(operation.groups)
    return Plan({"name": "example", "ratio": 0.5}, named, tensors=tensors)


def _named(operation: Operation, layer: int) -> Operation:
    """Give the operation's tensors the layer's names."""
    names = {
        name: value.format(layer=layer)
        for name, value in vars(operation).items()
        if isinstance(value, str) and "{layer}" in value
    }
    return replace(operation, **names)  # type: ignore[arg-type]


def _tensors(operation: Operation, experts: int, seed: int) -> dict[str, PlanTensor]:
    """Make what the operation names: random numbers of its shapes."""
    rng = np.random.default_rng(seed)
    made: dict[str, PlanTensor] = {}
    if isinstance(operation, Merge) and operation.neurons is not None:
        target = np.stack([rng.permutation(WIDTH) for _ in range(experts)])
        for group in operation.groups:  # many to one, but every neuron gets one: the first member's are all there
            target[list(group[1:])] = rng.integers(0, WIDTH, (len(group) - 1, WIDTH))
        made[operation.neurons] = PlanTensor.of(target)
    if isinstance(operation, Merge) and operation.down is not None:
        groups = sum(len(group) > 1 for group in operation.groups)
        made[operation.down] = PlanTensor.of(rng.normal(0, 0.2, (groups, WIDTH, HIDDEN)))
    if isinstance(operation, Constant):
        made[operation.vectors] = PlanTensor.of(rng.normal(0, 0.2, (len(operation.experts), HIDDEN)))
    if isinstance(operation, Skip) and operation.factor is not None:
        made[operation.factor] = PlanTensor.of(rng.uniform(0.2, 1.8, (experts, experts)))
    if isinstance(operation, Narrow):
        kept = np.full((experts, operation.width), -1)
        missing = operation.width * experts - operation.kept
        for expert, row in enumerate(kept):
            own = operation.width - (missing if expert == 1 else 0)
            row[:own] = np.sort(rng.choice(WIDTH, own, replace=False))
        made[operation.neurons] = PlanTensor.of(kept)
    return made
