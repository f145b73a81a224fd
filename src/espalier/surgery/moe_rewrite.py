"""What becomes of the files of a Mixture-of-Experts model under a plan: tensors, config.json and shipped code."""

from typing import Any

from espalier.checkpoints.checkpoint import Checkpoint
from espalier.errors import UserError
from espalier.plans.layout import block_layout, source_layout
from espalier.plans.operations import Skip
from espalier.plans.plan import Plan
from espalier.surgery.rewrite import CLASS, Rewrite, auto_map, shipped_code
from espalier.surgery.tensors import Layouts, outputs

CODE = "modeling_espalier.py"


def rewrite_moe(checkpoint: Checkpoint, plan: Plan) -> Rewrite:
    """Return what `plan` makes of `checkpoint`; UserError where it does not fit."""
    layouts = _layouts(checkpoint, plan)
    config = _config(checkpoint, layouts)
    shards, fates = outputs(checkpoint, layouts, plan.tensors)
    files = shipped_code(checkpoint.family.architecture, CODE) if "layers" in config.get("espalier", {}) else {}
    return Rewrite(shards, fates, config, files)


def _layouts(checkpoint: Checkpoint, plan: Plan) -> Layouts:
    settings = checkpoint.config.get("espalier", {}).get("layers", {})
    if settings and not all(isinstance(o, Skip) for operations in plan.layers.values() for o in operations):
        raise UserError(
            f"{checkpoint.directory}: was merged with router=remap, skips experts or differs in experts by layer; only "
            "skip can be added. Make one plan for the base model instead."
        )
    return {
        layer: block_layout(layer, source_layout(experts, settings.get(str(layer))), plan.layers.get(layer, ()))
        for layer, experts in checkpoint.expert_counts.items()
    }


def _config(checkpoint: Checkpoint, layouts: Layouts) -> dict[str, Any]:
    """Return the new config.json; it has the key `espalier` when a stock model cannot stand for the result."""
    family = checkpoint.family
    experts = max(family.least_experts, *(len(block.slots) for block in layouts.values()))
    config = family.resize(checkpoint.config, experts)
    widths = {block.width for block in layouts.values()}
    code = any(block.needs_code(experts) for block in layouts.values())
    if widths != {None} and not code and not family.width_shared and len(widths) == 1:
        config[family.width_key] = widths.pop()
    elif widths != {None} or code:
        renormalise = family.renormalise(config)
        config["architectures"] = [CLASS]
        config["auto_map"] = auto_map(CODE)
        config["espalier"] = {
            "format": "espalier.blocks/1",
            "module": family.module,
            "router": family.router_module,
            "layers": {str(layer): block.settings(renormalise) for layer, block in layouts.items()},
        }
    return config
