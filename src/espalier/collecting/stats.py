"""Calibration statistics: named arrays by probe and layer in one safetensors file; imports no torch."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from espalier.artefacts.store import atomic_file, stable_header
from espalier.checkpoints.shape import DenseShape, ModelShape, shape_from_document
from espalier.errors import UserError

FORMAT = "espalier.stats/1"
Array = NDArray[Any]


@dataclass(frozen=True)
class Stats:
    """What `collect` observed of a model on its calibration tokens.

    `arrays[(probe, layer)]` maps a name to an array; each probe's docstring says shapes and dtypes.
    `sequence_tokens` holds the number of unmasked tokens of each calibration sequence, in order: arrays
    with one row a token keep that order.
    """

    shape: ModelShape | DenseShape
    sequence_tokens: tuple[int, ...]
    arrays: Mapping[tuple[str, int], dict[str, Array]] = field(repr=False)

    @property
    def tokens(self) -> int:
        return sum(self.sequence_tokens)

    @property
    def probes(self) -> set[str]:
        return {probe for probe, _ in self.arrays}

    def layers(self, probe: str) -> Iterator[tuple[int, dict[str, Array]]]:
        """Yield `(layer, arrays)` of `probe` in ascending layers; UserError when it was not observed."""
        for layer in self.shape.layers:
            yield layer, self.layer(probe, layer)

    def layer(self, probe: str, layer: int) -> dict[str, Array]:
        if (probe, layer) not in self.arrays:
            raise UserError(
                f"statistics: probe {probe!r} was not collected for layer {layer}; have {sorted(self.probes)}."
            )
        return self.arrays[probe, layer]

    def save(self, path: Path, **metadata: Any) -> None:
        """Write the file; keys are `{probe}.{layer}.{name}`."""
        flat = {
            f"{probe}.{layer}.{name}": np.ascontiguousarray(array)
            for (probe, layer), named in self.arrays.items()
            for name, array in named.items()
        }
        header = {
            "format": FORMAT,
            "shape": json.dumps(self.shape.document()),
            "sequence_tokens": json.dumps(list(self.sequence_tokens)),
            **{key: json.dumps(value) for key, value in metadata.items()},
        }
        with atomic_file(path) as temporary:
            save_file(flat, temporary, header)
            stable_header(temporary)

    @classmethod
    def empty(cls, shape: ModelShape | DenseShape) -> "Stats":
        """Return the statistics of no token at all, for methods that need none."""
        return cls(shape, (), {})

    @classmethod
    def load(cls, *paths: Path, probes: tuple[str, ...] | None = None) -> "Stats":
        """Read and join files of one model and calibration, all probes or those named.

        UserError on an unreadable file, an unknown format or files of different calibrations.
        """
        arrays: dict[tuple[str, int], dict[str, Array]] = {}
        shape: ModelShape | DenseShape | None = None
        sequence_tokens: tuple[int, ...] = ()
        for path in dict.fromkeys(paths):
            try:
                with safe_open(path, framework="numpy") as file:
                    header = file.metadata() or {}
                    if header.get("format") != FORMAT:
                        raise UserError(f"{path}: format is {header.get('format')!r}, expected {FORMAT}.")
                    found = shape_from_document(json.loads(header["shape"]))
                    counts = tuple(json.loads(header["sequence_tokens"]))
                    if shape is not None and (found, counts) != (shape, sequence_tokens):
                        raise UserError(f"{path}: statistics of another model or calibration than {paths[0]}.")
                    shape, sequence_tokens = found, counts
                    for key in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                        probe, layer, name = key.split(".", 2)
                        if probes is None or probe in probes:
                            arrays.setdefault((probe, int(layer)), {})[name] = file.get_tensor(key)
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: cannot read the statistics ({error}). Delete it and run again.") from None
        if shape is None:
            raise UserError("statistics: no file given.")
        return cls(shape, sequence_tokens, arrays)
