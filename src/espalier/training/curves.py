"""The curves that trainings left: those of `tune` in tuning.json, those of `fit` in the header of what was learnt."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from espalier.artefacts.store import read_json

Document = Mapping[str, Any]
TUNED = "tuning.json"


@dataclass(frozen=True)
class Curve:
    """What one training said of its steps.

    `kind` is the name of the tuning or of the fit. `places` are tokens, or steps where tokens are not known (`unit`);
    `terms` the terms of the loss and what was measured, a value a step. `layer` is None where all are trained together.
    """

    label: str
    kind: str
    unit: str
    places: tuple[float, ...]
    terms: Mapping[str, tuple[float, ...]]
    layer: int | None = None


def of_tuning(directory: Path, label: str) -> list[Curve]:
    """Return the curves of a tuned checkpoint, one a layer where layers were tuned one by one; none if it is gone."""
    path = directory / TUNED
    if not path.exists():
        return []
    document = read_json(path, "espalier.tuning/1")
    by_layer: dict[int | None, list[Document]] = {}
    for row in document["curve"]:
        by_layer.setdefault(row.get("layer"), []).append(row)
    kind = str(document["tuning"]["name"])
    return [_curve(label, kind, layer, rows) for layer, rows in by_layer.items()]


def _curve(label: str, kind: str, layer: int | None, rows: Sequence[Document]) -> Curve:
    told = [row["terms"] | row.get("measured", {}) for row in rows]
    if layer is not None:
        told = [{"loss": row["loss"]} for row in rows]
    return Curve(label, kind, "tokens", tuple(row["tokens"] for row in rows), _columns(told), layer)


def of_fit(path: Path, label: str) -> Curve | None:
    """Return the curve of a fit, or None if its file is gone."""
    if not path.exists():
        return None
    with safe_open(path, framework="numpy") as file:
        header = file.metadata()
    terms = json.loads(header["curve"])
    name = str(json.loads(header["fit"])["name"])
    return Curve(label, name, "steps", tuple(range(1, len(terms) + 1)), _columns(terms)) if terms else None


def _columns(rows: Sequence[Document]) -> dict[str, tuple[float, ...]]:
    """Return the values of each name that all rows have."""
    names = [name for name in rows[0] if all(name in row for row in rows)] if rows else []
    return {name: tuple(float(row[name]) for row in rows) for name in names}
