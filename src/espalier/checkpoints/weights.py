"""Which tensors of a checkpoint's files make each tensor of the live model, by transformers' own conversion mapping.

Files hold one tensor an expert where the live model stacks them ([E, 2F, D]); some families rename or split
tensors besides. transformers says how (`conversion_mapping.py`); this module reads that mapping and fills the
tensors of a part of a model, straight from the files and without a second copy of stacked experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from espalier.checkpoints.checkpoint import Checkpoint
from espalier.errors import UserError


@dataclass
class Recipe:
    """How tensors in the files become tensors of the model.

    `parts` names the files' tensors by the pattern of `converter` that matched them, experts in numerical order;
    without a converter there is one tensor, which is copied.
    """

    targets: tuple[str, ...]
    converter: WeightConverter | None = None
    parts: dict[str, list[str]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [name for names in self.parts.values() for name in names]

    @property
    def stacks(self) -> bool:
        """Whether the target is the files' tensors one behind the other, [E, rows, columns]."""
        kinds = [(type(op), getattr(op, "dim", None)) for op in getattr(self.converter, "operations", ())]
        return kinds in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])


class WeightMap:
    """The recipes of all tensors of `model` (which may be on the meta device) from the files of `checkpoint`.

    `missing` are tensors of the model that the files do not give, `unexpected` tensors of the files that the model
    has no use for, as `from_pretrained` would report them.
    """

    def __init__(self, model: Any, checkpoint: Checkpoint) -> None:
        self.model = model
        self.checkpoint = checkpoint
        expected = model.state_dict()
        transforms = get_model_conversion_mapping(model)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        prefix = model.base_model_prefix
        self.recipes: dict[str, Recipe] = {}  # by each target
        unexpected = []
        for name in sorted(checkpoint.entries, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, expected)
            if target not in expected and name in expected:
                target, pattern = name, None
            if target not in expected:
                unexpected.append(name)
            elif pattern is None:
                self.recipes[target] = Recipe((target,), None, {"": [name]})
            else:
                converter = by_pattern[pattern]
                if target not in self.recipes:
                    first = converter.target_patterns[0]
                    targets = tuple(target.replace(first, other) for other in converter.target_patterns)
                    self.recipes |= dict.fromkeys(targets, Recipe(targets, converter))
                self.recipes[target].parts.setdefault(pattern, []).append(name)
        for target, source in model.all_tied_weights_keys.items():
            if target not in self.recipes and source in self.recipes:
                self.recipes[target] = self.recipes[source]
        self.missing = _without(expected.keys() - self.recipes.keys(), model._keys_to_ignore_on_load_missing)
        ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"]
        self.unexpected = _without(unexpected, ignored)

    def check(self) -> None:
        """Raise UserError when the model would be left with tensors that nothing fills."""
        if self.missing:
            raise UserError(
                f"{self.checkpoint.directory}: {len(self.missing)} tensors of the model are missing in its shards, "
                f"first {self.missing[0]}. Download the model again."
            )

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Read the files into `tensors`, allocated ones by their name in the model, converting the dtype.

        UserError when a shape is not what config.json says, or numbers are NaN or infinite.
        """
        done: set[str] = set()
        for target, tensor in tensors.items():
            if target in done:
                continue
            recipe = self.recipes[target]
            if recipe.converter is None:
                self._read(recipe.names[0], tensor)
            elif recipe.stacks:
                self._stack(recipe, tensor)
            else:
                made = self._convert(recipe)
                for name in recipe.targets:
                    if name in tensors:
                        _same_shape(self.checkpoint, recipe.names[0], made[name].shape, tensors[name])
                        tensors[name].copy_(made[name])
                        done.add(name)
            done.add(target)

    def _read(self, name: str, tensor: Tensor) -> None:
        _same_shape(self.checkpoint, name, self.checkpoint.entries[name].shape, tensor)
        self.checkpoint.read_into(name, tensor)

    def _stack(self, recipe: Recipe, tensor: Tensor) -> None:
        """Fill [E, rows, ...] from E tensors of each pattern; the patterns' rows follow one another."""
        assert recipe.converter is not None
        first = 0
        entries = self.checkpoint.entries
        for pattern in recipe.converter.source_patterns:
            names = recipe.parts.get(pattern, [])
            if len(names) != len(tensor):
                raise UserError(
                    f"{self.checkpoint.directory}: {len(names)} tensors match {pattern}, but config.json says "
                    f"{len(tensor)} experts ({recipe.targets[0]})."
                )
            rows = entries[names[0]].shape[0]
            for expert, name in enumerate(names):
                self._read(name, tensor[expert, first : first + rows] if tensor.dim() > 1 else tensor[expert])
            first += rows

    def _convert(self, recipe: Recipe) -> dict[str, Tensor]:
        """Let transformers convert tensors that are more than stacked."""
        converter = deepcopy(recipe.converter)
        assert converter is not None
        for pattern, names in recipe.parts.items():
            for name in names:
                converter.add_tensor(recipe.targets[0], name, pattern, self.checkpoint.tensor(name))  # type: ignore[arg-type]
        made = converter.convert(recipe.targets[0], model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _same_shape(checkpoint: Checkpoint, name: str, shape: Iterable[int], tensor: Tensor) -> None:
    if tuple(shape) != tuple(tensor.shape):
        raise UserError(
            f"{checkpoint.directory}: tensor {name} makes {list(shape)} where config.json means {list(tensor.shape)}."
        )


def _without(names: Iterable[str], patterns: Iterable[str] | None) -> list[str]:
    return sorted(name for name in names if not any(re.search(pattern, name) for pattern in patterns or ()))
