"""Which tensors of a checkpoint a tuning trains: their names in the live model, and on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from espalier.checkpoint import Checkpoint
from espalier.errors import UserError
from espalier.runtime import decoder, moe_blocks, skeleton
from espalier.tune_settings import Tuning
from espalier.weights import WeightMap


def tuned_names(source: Path, dtype: str, tuning: Tuning) -> dict[str, str]:
    """Return the tensors that are tuned: names in the live model, and on disk.

    UserError when there is nothing to tune, or one of them is not a tensor of the files.
    """
    model, checkpoint = skeleton(source, dtype), Checkpoint(source)
    weights = WeightMap(model, checkpoint)
    names = {module: name for name, module in model.named_modules()}
    parts = list(
        _dense_parts(model, checkpoint, tuning) if checkpoint.is_dense else _routers(model, checkpoint, tuning)
    )
    if not parts:
        raise UserError(
            f"{source}: has no router to tune. Split the model first (method=dsmoe, say), or use train=ffn."
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
    return found


def _routers(model: Any, checkpoint: Checkpoint, tuning: Tuning) -> Iterator[Any]:
    if tuning.train != "routers":
        raise UserError(
            f"conf/tuning/{tuning.name}.yaml: train={tuning.train} is for dense models whose FFNs were split; "
            f"{checkpoint.family.model_type} has experts. Use train=routers."
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
