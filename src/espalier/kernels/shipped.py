"""What ships compiled for whom: every kernel with the tiles of a target and the layouts of transformers' families."""

from collections.abc import Iterator
from typing import Any

from espalier.kernels import (
    compact,
    ragged_gate_up,
    ragged_matmul,
    ragged_outer,
    route_plan,
    route_plan_kernel,
    segment_combine,
)
from espalier.kernels.aot import Case
from espalier.kernels.targets import Target
from espalier.kernels.tile import GATE_UP, MATMUL

VALUES = ("x", "gate", "up", "gate_bias", "up_bias", "h", "weight", "bias", "y", "base", "out", "a", "b", "g")
POINTERS = dict.fromkeys(VALUES, "*bf16")
POINTERS |= dict.fromkeys(("row_weight", "row_scale", "scores", "correction"), "*fp32")
FLOATS = ("alpha", "limit", "shift", "scale", "value", "total")


def case(
    kernel: str, variant: str, function: Any, constants: dict[str, Any], options: dict[str, int], **own: str
) -> Case:
    """Return a case whose arguments have the types that launches give them, all pointers and sizes aligned."""
    signature: dict[str, str] = {}
    for name in function.arg_names:
        if name in constants:
            continue
        kind = "fp32" if name in FLOATS else "i32"
        integers = name.startswith(("row_", "tile_", "offsets", "neuron", "slot_row", "expert_map", "indices"))
        signature[name] = own.get(name) or POINTERS.get(name) or ("*i32" if integers else kind)
    unit = [name for name in own if own[name] == "constexpr"]
    for name in unit:
        del signature[name]
        constants = constants | {name: 1}
    aligned = tuple(
        name
        for name, kind in signature.items()
        if kind.startswith("*") or name in ("D", "F", "K", "M", "N", "share", *(n for n in signature if "stride" in n))
    )
    return Case(kernel, variant, function, signature, constants, options, aligned)


def cases(target: Target) -> Iterator[Case]:
    """Yield what ships on a target, with the layouts of transformers' families: bf16, aligned sizes."""
    plain = {
        "GATED": True, "INTERLEAVED": False, "BIASED": False, "LIMITED": False, "KIND": 0, "LISTED": False,
        "EVEN": True, "PRECISION": "tf32",
    }  # fmt: skip
    last = {"stride_input": "constexpr"}  # inputs lie together
    biased = {"BIASED": True, "LIMITED": True, "KIND": ragged_gate_up.KINDS["swish"]}
    for config in GATE_UP[target.name]:
        constants = plain | config.constants()
        run = ragged_gate_up.ragged_gate_up
        yield case("ragged_gate_up", "gate and up", run, constants, config.options(), **last)
        if config.block_m in (16, 64):
            swapped = {"stride_neuron": "constexpr"}
            oss = constants | biased | {"INTERLEAVED": True}
            yield case("ragged_gate_up", "interleaved, transposed, biased", run, oss, config.options(), **swapped)
            yield case("ragged_gate_up", "transposed", run, constants, config.options(), **swapped)
            yield case("ragged_gate_up", "neuron lists", run, constants | {"LISTED": True}, config.options(), **last)
    common = {"GATHERED": False, "SCALED": False, "BIASED": False, "LISTED": False, "EVEN": True, "PRECISION": "tf32"}
    for config in MATMUL[target.name]:
        constants = common | {"SPLIT": config.split} | config.constants()
        run = ragged_matmul.ragged_matmul
        parts = {"y": "*fp32"} if config.split > 1 else {}
        yield case("ragged_matmul", "down", run, constants, config.options(), stride_inner="constexpr", **parts)
        if config.block_m in (16, 64):
            turned = constants | {"GATHERED": True}
            yield case(
                "ragged_matmul",
                "gathered, transposed",
                run,
                turned,
                config.options(),
                stride_column="constexpr",
                **parts,
            )
            listed = constants | {"LISTED": True, "EVEN": False}
            yield case(
                "ragged_matmul", "neuron lists", run, listed, config.options(), stride_column="constexpr", **parts
            )
    block = {"BR": ragged_outer.ROWS, "BM": ragged_outer.COLUMNS, "BN": ragged_outer.COLUMNS, "PRECISION": "tf32"}
    options = {"num_warps": 4, "num_stages": 3}
    for gathered in (False, True):
        variant = "gathered" if gathered else "rows"
        run = ragged_outer.ragged_outer
        yield case("ragged_outer", variant, run, block | {"GATHERED": gathered}, options, stride_n="constexpr")
    yield _listed_case(1, 1, "the tokens of a layer", indices="*u8", weights="*fp32")  # depth_ffn
    yield _listed_case(8, 8, "8 blocks of neurons", indices="*i64", weights="*fp32")  # neuron_ffn
    yield _listed_case(9, 9, "8 blocks and the shared", indices="*i64", weights="*fp32")
    for experts, k in ((8, 2), (64, 8), (128, 8)):
        yield _plan_case(experts, k, scored=False)
        yield _plan_case(experts, k, scored=True)
    for split in (1, 4):
        constants = {"SPLIT": split, "WEIGHTED": True, "BASED": False, "BD": segment_combine.COLUMNS}
        own = {"y": "*fp32" if split > 1 else "*bf16"}
        yield case(
            "segment_combine", f"{split} splits", segment_combine.segment_combine, constants, {"num_warps": 4}, **own
        )

    for name, run, signature, constants, options in compact.aot_cases():
        aligned = tuple(name for name, kind in signature.items() if kind.startswith("*") or "stride" in name)
        yield Case("compact", name, run, signature, constants, options, aligned)


def _plan_case(experts: int, k: int, *, scored: bool) -> Case:
    sizes = route_plan.place_settings(k, experts, experts)
    if scored:
        sizes["COUNTED"] = route_plan.counted_from_scores(sizes)
    constants = sizes | {
        "BM": 16, "SCORED": scored, "SIGMOID": False, "CORRECTED": False, "NORMED": scored, "MAPPED": True,
        "JOINED": True, "RULE": 1, "RESCALE": True,
    }  # fmt: skip
    variant = f"{experts} experts, top {k}" + (", from scores" if scored else "")
    own = {"weights": "*bf16", "indices": "*i64"}
    return case("route_plan", variant, route_plan_kernel.place, constants, {"num_warps": 8, "num_stages": 1}, **own)


def _listed_case(experts: int, k: int, variant: str, **own: str) -> Case:
    """A plan of picks that differ, as they are: no map, no rule."""
    constants = route_plan.place_settings(k, experts, experts, paired=False) | {
        "BM": 16, "SCORED": False, "SIGMOID": False, "CORRECTED": False, "NORMED": False, "MAPPED": False,
        "JOINED": False, "RULE": 0, "RESCALE": False,
    }  # fmt: skip
    return case("route_plan", variant, route_plan_kernel.place, constants, {"num_warps": 8, "num_stages": 1}, **own)
