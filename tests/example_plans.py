"""Plans for the tiny models: one of each kind of operation."""

from espalier.plan import Keep, Merge, Operation, Plan, Skip
from tiny import DENSE_LAYERS

# Survivors and first members lie evenly in two router groups of four.
GROUPS = ((0, 3, 6), (1, 2), (4, 7), (5,))
WEIGHTS = ((0.2, 0.5, 0.3), (0.6, 0.4), (0.25, 0.75), (1.0,))

KINDS: dict[str, tuple[Operation, ...]] = {
    "keep": (Keep((0, 2, 5, 7)),),
    "remap": (Merge(GROUPS, WEIGHTS, "remap"),),
    "slice": (Merge(GROUPS, WEIGHTS, "slice"),),
    "tie": (Merge(GROUPS, WEIGHTS, "tie"),),
    "skip": (Skip(0.6),),
    "keep_skip": (Keep((1, 2, 4, 6)), Skip(0.5)),
    "remap_skip": (Merge(GROUPS, WEIGHTS, "remap"), Skip(0.3, "tail")),
    "few": (Merge(((0, 1, 2, 3, 4, 5, 6, 7),), ((0.125,) * 8,), "remap"),),  # fewer experts than the router picks
}
SHIPPED = ("remap", "skip", "keep_skip", "remap_skip", "few")


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
    return Plan({"name": "example", "ratio": 0.5}, layers)
