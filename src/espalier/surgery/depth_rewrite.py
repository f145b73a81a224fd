"""What becomes of a checkpoint's files where tokens may skip layers: routers, config.json, code, dropped parts."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from espalier.checkpoints.checkpoint import Checkpoint
from espalier.checkpoints.decoder_shape import ffn_module, layer_parts, part_prefix
from espalier.checkpoints.shards import OutputTensor
from espalier.errors import UserError
from espalier.plans.depth import Depth, DepthRule
from espalier.plans.plan import Plan
from espalier.surgery.rewrite import CLASS, Rewrite, auto_map, own_text

if TYPE_CHECKING:
    import torch

CODE = ("modeling_espalier_depth.py", "routed_depth.py", "ragged_cache.py")
LAYER = re.compile(r"model\.layers\.(\d+)\.")
BASE = "from transformers import LlamaForCausalLM as BaseForCausalLM"
Layers = Mapping[int, Depth | DepthRule]


def without_depth(plan: Plan) -> tuple[Plan, Layers]:
    """Return the plan without what it does to depth, and that by layer; UserError for two such operations."""
    layers, depth = {}, {}
    for layer, operations in plan.layers.items():
        own = [operation for operation in operations if isinstance(operation, Depth | DepthRule)]
        if len(own) > 1:
            raise UserError(f"plan, layer {layer}: depth is routed twice.")
        if own:
            depth[layer] = own[0]
        others = tuple(operation for operation in operations if operation not in own)
        if others:
            layers[layer] = others
    return replace(plan, layers=layers), depth


def rewrite_depth(checkpoint: Checkpoint, base: Rewrite, layers: Layers, plan: Plan) -> Rewrite:
    """Return `base`, what the rest of the plan makes of the checkpoint, with `layers` routed; UserError if unfit."""
    before = checkpoint.config.get("espalier", {}).get("depth")
    if before is None and not layers:
        return base
    changed = {layer: operation for layer, operation in layers.items() if isinstance(operation, DepthRule)}
    routed = {layer: operation for layer, operation in layers.items() if isinstance(operation, Depth)}
    if before is not None and routed:
        raise UserError(
            f"{checkpoint.directory}: layers were routed already; only another threshold or rule can follow. Make one "
            "plan for the base model instead."
        )
    if before is None and changed:
        raise UserError(f"{checkpoint.directory}: has no routed layers, whose rule could be another.")
    if not base.code and checkpoint.is_dense and all(_gone(operation) for operation in routed.values()) and routed:
        return _fewer_layers(checkpoint, base, sorted(routed))
    settings = _section(checkpoint, routed) if before is None else _with_rules(checkpoint, before, changed)
    shards, dropped = _outputs(checkpoint, base, routed, plan)
    written = sum(map(len, shards))
    fates = base.fates | {"copied": base.fates["copied"] - dropped, "dropped": base.fates["dropped"] + dropped}
    config = base.config | {"architectures": [CLASS], "auto_map": auto_map(CODE[0])}
    config["espalier"] = base.config.get("espalier", {"format": "espalier.depth/1"}) | {"depth": settings}
    return Rewrite(shards, fates | {"written": written}, config, base.code | _code(checkpoint, base))


def _gone(operation: Depth) -> bool:
    return operation.rule == "drop" and operation.granularity == "block"


def _section(checkpoint: Checkpoint, routed: Mapping[int, Depth]) -> dict[str, Any]:
    parts, ffn = layer_parts(checkpoint), ffn_module(checkpoint)
    return {
        "modules": {"attention": parts.attention, "ffn": ffn},
        "outputs": {"attention": parts.outputs[0] or parts.attention, "ffn": parts.outputs[1] or ffn},
        "ffn_pair": parts.ffn_pair,
        "layers": {str(layer): operation.settings() for layer, operation in sorted(routed.items())},
    }


def _with_rules(checkpoint: Checkpoint, before: dict[str, Any], changed: Mapping[int, DepthRule]) -> dict[str, Any]:
    layers = dict(before["layers"])
    for layer, operation in changed.items():
        own = layers.get(str(layer))
        known = ("threshold",) if operation.rule is None else ("top_k", "predictor")
        if own is None or own["rule"] not in known:
            raise UserError(
                f"{checkpoint.directory}: layer {layer} is not routed by {' or '.join(known)}, so that this cannot be "
                "changed."
            )
        new = {"rule": operation.rule} if operation.rule is not None else {"threshold": operation.threshold}
        layers[str(layer)] = own | new
    return before | {"layers": layers}


def _outputs(
    checkpoint: Checkpoint, base: Rewrite, routed: Mapping[int, Depth], plan: Plan
) -> tuple[list[list[OutputTensor]], int]:
    """Return the tensors to write, by shard, and how many of the base's are dropped."""
    gone = tuple(
        part_prefix(checkpoint, layer, operation.granularity)
        for layer, operation in routed.items()
        if operation.rule == "drop"
    )
    pending = {f"model.layers.{layer}.": (layer, operation) for layer, operation in routed.items()}
    shards, dropped = [], 0
    for own in base.shards:
        shard: list[OutputTensor] = []
        for output in own:
            if gone and output.name.startswith(gone):
                dropped += 1
                continue
            shard.append(output)
            match = LAYER.match(output.name)
            found = pending.pop(match[0], None) if match else None
            if found is not None:
                shard += _router(checkpoint, *found, plan)
        shards.append(shard)
    return shards, dropped


def _router(checkpoint: Checkpoint, layer: int, operation: Depth, plan: Plan) -> list[OutputTensor]:
    """Return a router's tensors, which are float32 whatever the model is."""

    def make(name: str) -> "list[torch.Tensor]":
        import torch

        return [torch.from_numpy(plan.tensors[name].read())]

    prefix = f"{part_prefix(checkpoint, layer, operation.granularity)}depth_router."
    return [
        OutputTensor(f"{prefix}{role}", "F32", plan.tensors[name].shape, lambda name=name: make(name))  # type: ignore[misc]
        for role, name in sorted(operation.tensors_of.items())
    ]


def _fewer_layers(checkpoint: Checkpoint, base: Rewrite, dropped: list[int]) -> Rewrite:
    """Return the stock model that has the other layers, numbered anew."""
    count = int(checkpoint.config["num_hidden_layers"])
    kept = [layer for layer in range(count) if layer not in dropped]
    if not kept:
        raise UserError(f"plan: drops all {count} layers. Leave one.")
    number = {layer: new for new, layer in enumerate(kept)}
    shards, gone = [], 0
    for own in base.shards:
        shard = []
        for output in own:
            match = LAYER.match(output.name)
            if match is not None and int(match[1]) not in number:
                gone += 1
                continue
            name = output.name
            if match is not None:
                name = f"model.layers.{number[int(match[1])]}.{name[match.end() :]}"
            shard.append(replace(output, name=name))
        shards.append(shard)
    fates = base.fates | {"copied": base.fates["copied"] - gone, "dropped": gone, "written": sum(map(len, shards))}
    config = base.config | {"num_hidden_layers": len(kept)}
    kinds = _layer_types(checkpoint)
    if kinds is not None:
        config["layer_types"] = [kinds[layer] for layer in kept]
    return Rewrite(shards, fates, config, base.code)


def _layer_types(checkpoint: Checkpoint) -> list[str] | None:
    """Return what attention each layer has, where that differs by layer or config.json says it; None elsewhere.

    A config.json that is silent leaves it to the layers' numbers (Gemma 2: every second one slides), which change.
    """
    from transformers import CONFIG_MAPPING

    config = checkpoint.config
    kinds: list[str] | None = config.get("layer_types")
    if kinds is None:
        kinds = getattr(CONFIG_MAPPING[config["model_type"]].from_dict(config), "layer_types", None)
        return kinds if kinds and len(set(kinds)) > 1 else None
    return kinds


def _code(checkpoint: Checkpoint, base: Rewrite) -> dict[str, str]:
    """Return the files to ship, the model's class derived from the stock one or from the one that `base` ships."""
    texts = {name: own_text(name) for name in CODE}
    architecture = checkpoint.dense_family.architecture if checkpoint.is_dense else checkpoint.family.architecture
    derived = f"from transformers import {architecture} as BaseForCausalLM"
    if base.code:
        derived = f"from .{next(iter(base.code)).removesuffix('.py')} import {CLASS} as BaseForCausalLM"
    texts[CODE[0]] = texts[CODE[0]].replace(BASE, derived)
    return texts
