"""The settings of a benchmark of kernels (conf/kernel), checked; imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from espalier.errors import UserError, nearest
from espalier.kernels.targets import TARGETS

ROUTINGS = ("uniform", "zipf", "hot", "trace")
PEERS = ("vllm", "scattermoe")  # other projects', left out where they are not installed or do not run
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm", *PEERS, "espalier")
CACHES = ("warm", "cold")
FLUSHED = 2**28  # bytes read between calls for a cold cache


@dataclass(frozen=True)
class KernelBench:
    """Which implementations of a MoE block's experts are timed, on how many tokens, with which routing.

    UserError for an unknown key or name, or a number that cannot be.
    """

    name: str
    layer: int | None = None
    tokens: tuple[int, ...] = (1, 16, 256)
    routings: tuple[str, ...] = ROUTINGS
    implementations: tuple[str, ...] = IMPLEMENTATIONS
    copying: int = 64
    caches: tuple[str, ...] = ("warm",)
    rounds: int = 9
    threads: int = 1
    targets: tuple[str, ...] = tuple(TARGETS)

    @classmethod
    def of(cls, config: dict[str, Any]) -> KernelBench:
        """Return the settings of a composed `kernel` group."""
        where = f"conf/kernel/{config.get('name')}.yaml"
        known = [field.name for field in fields(cls)]
        for key in config:
            if key not in known:
                raise UserError(f"{where}: unknown key {key!r}; {nearest(key, known)}.")
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in config.items()
        }
        bench = cls(**values)
        for key, allowed in (
            ("routings", ROUTINGS),
            ("implementations", IMPLEMENTATIONS),
            ("caches", CACHES),
            ("targets", tuple(TARGETS)),
        ):
            _names(where, key, getattr(bench, key), allowed, least=0 if key == "targets" else 1)
        for key, least in (("rounds", 3), ("threads", 1), ("copying", 0)):
            _whole(where, key, getattr(bench, key), least)
        if not bench.tokens:
            raise UserError(f"{where}: tokens=[], expected at least one number.")
        for number in bench.tokens:
            _whole(where, "tokens", number, 1)
        if bench.layer is not None:
            _whole(where, "layer", bench.layer, 0)
        return bench


def _names(where: str, key: str, given: Any, allowed: Sequence[str], least: int) -> None:
    if not isinstance(given, tuple) or len(given) < least:
        raise UserError(f"{where}: {key}={given!r}, expected a list of {', '.join(allowed)}.")
    for name in given:
        if name not in allowed:
            raise UserError(f"{where}: {key} has {name!r}; {nearest(str(name), list(allowed))}.")


def _whole(where: str, key: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{where}: {key}={value!r}, expected a whole number >= {least}.")
