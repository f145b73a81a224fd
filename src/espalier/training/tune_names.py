"""Which tensors of a checkpoint a tuning trains: their names in the live model, and on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from espalier.checkpoints.checkpoint import Checkpoint
from espalier.checkpoints.weights import WeightMap
from espalier.errors import UserError
from espalier.models.depth_count import depth_routers
from espalier.models.runtime import decoder, moe_blocks, skeleton
from espalier.training.tune_adapters import linear_weights
from espalier.training.tune_settings import Tuning


def tuned_names(source: Path, dtype: str, tuning: Tuning) -> dict[str, str]:
    """Return the tensors that are tuned: names in the live model, and on disk.

    UserError when there is nothing to tune, or one of them is not a tensor of the files.
    """
    model, checkpoint = skeleton(source, dtype), Checkpoint(source)
    weights = WeightMap(model, checkpoint)
    names = {module: name for name, module in model.named_modules()}
    depth = list(depth_routers(model).values())
    if checkpoint.is_dense and tuning.train != "depth":
        parts = [*_dense_parts(model, checkpoint, tuning), *depth]
    elif tuning.train in ("depth", "lora"):
        parts = depth
    else:
        parts = [*_routers(model, checkpoint, tuning), *depth]
    if not any(True for part in parts for _ in part.parameters()) and tuning.train != "lora":
        raise UserError(
            f"{source}: has no router to tune. Split the model first (method=dsmoe, say) or route its depth "
            "(method=modification), or use train=ffn, lora or all."
        )
    if tuning.norms and tuning.train != "all":
        parts += [module for module in model.modules() if type(module).__name__.endswith("Norm")]
    found: dict[str, str] = {}
    for part in parts:
        for name, parameter in part.named_parameters():
            full = f"{names[part]}.{name}" if names[part] else name
            if not parameter.requires_grad or full in found:
                continue
            recipe = weights.recipes.get(full)
            if recipe is None or recipe.converter is not None:
                raise UserError(f"{source}: {full} is no tensor of the files, so that it cannot be tuned.")
            found[full] = recipe.names[0]
    for name in linear_weights(model) if tuning.train == "lora" else ():
        recipe = weights.recipes.get(name)
        if recipe is not None and recipe.converter is None:
            found[name] = recipe.names[0]
    return found


def _routers(model: Any, checkpoint: Checkpoint, tuning: Tuning) -> Iterator[Any]:
    if tuning.train != "routers":
        raise UserError(
            f"conf/tuning/{tuning.name}.yaml: train={tuning.train} is for dense models; "
            f"{checkpoint.family.model_type} has experts. Use train=routers, depth or lora."
        )
    for block in moe_blocks(model, checkpoint.family).values():
        yield getattr(block, checkpoint.family.router_module)


def _dense_parts(model: Any, checkpoint: Checkpoint, tuning: Tuning) -> Iterator[Any]:
    """Yield modules: all, FFNs with their routers, or the routers whose output a loss can see."""
    family = checkpoint.dense_family
    if tuning.train == "all":
        yield model
        return
    for layer in decoder(model).layers:
        ffn = getattr(layer, family.module)
        router = getattr(ffn, "router", None)
        if router is not None and router.learns:
            yield router
        if tuning.train == "ffn":
            for name in (family.gate, family.up, family.down):
                if name is not None:
                    yield getattr(ffn, name)
