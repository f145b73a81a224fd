"""The settings of a timing (conf/speed), checked; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from espalier.errors import UserError, nearest
from espalier.models.running import DTYPE_BYTES


@dataclass(frozen=True)
class Timing:
    """How a checkpoint is timed against the uncompressed model: `rounds` of a `prompt` and `new` tokens, one sequence.

    `domain` is the embedded text that is read; `threads` those of a processor; `dtype` that of the weights, None the
    one that the model is scored in; `seeds` how many seeds of a line are timed, the first ones, None all. UserError
    for a number or a dtype that cannot be.
    """

    name: str
    prompt: int = 512
    new: int = 32
    rounds: int = 5
    threads: int = 1
    domain: str = "wiki"
    dtype: str | None = None
    seeds: int | None = None

    @classmethod
    def of(cls, config: dict[str, Any]) -> Timing:
        """Return the settings of a composed `speed` group."""
        where = f"conf/speed/{config.get('name')}.yaml"
        known = [field.name for field in fields(cls)]
        config = {key: value for key, value in config.items() if not key.startswith("_")}
        for key in config:
            if key not in known:
                raise UserError(f"{where}: unknown key {key!r}; {nearest(key, known)}.")
        timing = cls(**config)
        for key, least in (("prompt", 1), ("new", 1), ("rounds", 2), ("threads", 1), ("seeds", 1)):
            value = getattr(timing, key)
            if key == "seeds" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UserError(f"{where}: {key}={value!r}, expected a whole number >= {least}.")
        if timing.dtype is not None and timing.dtype not in DTYPE_BYTES:
            raise UserError(f"{where}: dtype={timing.dtype!r}; {nearest(timing.dtype, list(DTYPE_BYTES))}, or null.")
        return timing
