"""What determines a fit: what is learnt (a module of `espalier.fits`) and how it is trained; imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from espalier.errors import UserError, nearest
from espalier.training.tune_settings import SCHEDULES

NEW = {"weight_decay": 0.0, "tokens": None}


@dataclass(frozen=True)
class Fitting:
    """The settings of a fit, which the property `fit` of a method returns; they know nothing of its ratio.

    name: the module of `espalier.fits`, which is also what the arrays are called in the statistics, and the method's
    YAML. own: the keyword arguments of the module's class `Fit`. epochs: how often the calibration is read, unless
    `tokens` says how many are in all. batch: sequences of a micro-batch; a step takes `accumulation` of them. clip:
    largest norm of the gradient, None: any. seed: of the order of the sequences.

    UserError, naming the method's file, for a value that cannot be.
    """

    name: str
    rate: float
    epochs: int
    batch: int = 8
    accumulation: int = 1
    schedule: str = "cosine"
    clip: float | None = None
    seed: int = 0
    weight_decay: float = 0.0
    tokens: int | None = None
    own: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        where = f"conf/method/{self.name}.yaml"
        for key, least in (("epochs", 1), ("batch", 1), ("accumulation", 1), ("seed", 0), ("tokens", 1)):
            value = getattr(self, key)
            if key == "tokens" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UserError(f"{where}: {key}={value!r} is not a whole number >= {least}.")
        for key in ("rate", "clip"):
            value = getattr(self, key)
            number = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
            if not number and not (key == "clip" and value is None):
                raise UserError(f"{where}: {key}={value!r} is not a number above 0.")
        if self.schedule not in SCHEDULES:
            raise UserError(f"{where}: schedule={self.schedule!r}; {nearest(str(self.schedule), list(SCHEDULES))}.")

    def document(self) -> dict[str, Any]:
        """Return the settings as JSON; `Fitting(**document)` makes them again."""
        given = asdict(self)
        # Fits from before there were these keys keep their form, and so their id.
        return {key: value for key, value in given.items() if key not in NEW or value != NEW[key]}

    def steps(self, sequences: int, length: int) -> int:
        """Return the number of steps on sequences of `length` tokens, read `epochs` times; the last may begin anew.

        UserError where `tokens` is given and is less than one step.
        """
        each = self.batch * self.accumulation
        if self.tokens is None:
            return -(-self.epochs * sequences // each)
        if self.tokens < each * length:
            raise UserError(
                f"conf/method/{self.name}.yaml: tokens={self.tokens} is less than one step of {each * length} "
                f"(batch x accumulation x {length}). Use tokens >= {each * length}."
            )
        return self.tokens // (each * length)
