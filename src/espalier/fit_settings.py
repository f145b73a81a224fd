"""What determines a fit: what is learnt (a module of `espalier.fits`) and how it is trained; imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from espalier.errors import UserError, nearest
from espalier.tune_settings import SCHEDULES


@dataclass(frozen=True)
class Fitting:
    """The settings of a fit, which the property `fit` of a method returns; they know nothing of its ratio.

    name: the module of `espalier.fits`, which is also what the arrays are called in the statistics, and the method's
    YAML. own: the keyword arguments of the module's class `Fit`. epochs: how often the calibration is read. batch:
    sequences of a micro-batch; a step takes `accumulation` of them. clip: largest norm of the gradient, None: any.
    seed: of the order of the sequences.

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
    own: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        where = f"conf/method/{self.name}.yaml"
        for key, least in (("epochs", 1), ("batch", 1), ("accumulation", 1), ("seed", 0)):
            value = getattr(self, key)
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
        return asdict(self)

    def steps(self, sequences: int) -> int:
        """Return the number of steps in which so many sequences are read `epochs` times; the last may begin anew."""
        return -(-self.epochs * sequences // (self.batch * self.accumulation))
