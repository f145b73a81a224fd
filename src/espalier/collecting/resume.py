"""What an interrupted streamed collection has done: statistics of finished layers, and the last one's activations."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from espalier.artefacts.partial import write_error
from espalier.artefacts.store import digest, write_json
from espalier.collecting.stats import Stats
from espalier.models.activations import Activations

FORMAT = "espalier.resume/1"


class CollectState:
    """A folder that holds the state of one collection, identified by `identity` (any JSON document).

    A folder of another identity is emptied. After each layer `save` first writes its statistics, then replaces
    the activations, which name their layer: killed at any moment, the folder holds one whole state.

    UserError when the folder cannot be made.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder
        key = digest(identity)
        record = {"format": FORMAT, "identity": key}
        mark = folder / "state.json"
        try:
            same = json.loads(mark.read_text()) == record
        except (OSError, ValueError):
            same = False
        if not same:
            try:
                if folder.exists():
                    shutil.rmtree(folder)
                folder.mkdir(parents=True)
                write_json(mark, record)
            except OSError as error:
                raise write_error(error, folder) from error

    @property
    def layers(self) -> int:
        """Number of decoder layers whose statistics and output activations are here."""
        try:
            with safe_open(self._activations, "numpy") as file:
                return int(file.metadata()["layers"])
        except (OSError, SafetensorError, KeyError, TypeError):
            return 0

    @property
    def returns_tuple(self) -> bool:
        """Whether the model's layers return a tuple; known once a layer was saved."""
        with safe_open(self._activations, "numpy") as file:
            return bool(json.loads(file.metadata()["returns_tuple"]))

    @property
    def _activations(self) -> Path:
        return self.folder / "activations.safetensors"

    def _stats(self, layer: int) -> Path:
        return self.folder / f"layer-{layer}.safetensors"

    def save(self, layer: int, stats: Stats | None, states: Activations, returns_tuple: bool) -> None:
        """Remember that `layer` is finished; `stats` are its own, None for a layer of which none are asked."""
        if stats is not None:
            stats.save(self._stats(layer))
        states.save(self._activations, {"layers": str(layer + 1), "returns_tuple": json.dumps(returns_tuple)})

    def load(self, states: Activations) -> None:
        """Fill `states` with the outputs of the last finished layer."""
        states.load(self._activations)

    def stats(self, layer: int) -> Stats:
        """Return the statistics of a finished layer that has some."""
        return Stats.load(self._stats(layer))
