"""The settings of router tuning (conf/tuning), checked; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from espalier.errors import UserError, nearest

OBJECTIVES = ("lm", "distill", "layerwise")
SCHEDULES = ("constant", "linear", "cosine")
INPUTS = ("original", "compressed")
TRAIN = ("routers", "ffn", "depth", "lora", "all")
TERMS = ("product", "excess")


@dataclass(frozen=True)
class Tuning:
    """What router tuning does, without the text that it reads.

    objective: `lm` (next-token cross entropy), `distill` (KL from the original model's `top` likeliest tokens and the
    mass of all others), `layerwise` (each MoE block's routed output against the original's). inputs, of `layerwise`:
    each block sees what the `original` model feeds it, or what the `compressed` one does, whose earlier errors it then
    makes good. norms: tune the norms too (layerwise: the one before each block, whose whole output is then compared).
    entropy: weight of the mean entropy of the routers' softmax.
    train, of split dense models: the `routers`, `ffn` (with the routers), or `all` parameters. Of models whose layers
    tokens skip: the routers of `depth`, or `all`. Of both: `lora`, routers with adapters of `rank` and `alpha` at the
    linear layers, merged in the end. router_rate: highest rate of routers, where it is another. gates: weight of
    DSMoE's L1 term, load: of the term for tokens that enter routed layers, whose form is `load_term`; moved by a
    controller where `target` is given: the fraction of the FFNs' neurons that a token is to run, or of tokens that are
    to enter, to which the threshold is set in the end, on `threshold_tokens` of the tuning text. straight_through:
    whether gates of what does not run have a gradient.
    tokens: how many are read in all, of `layerwise` for each layer. batch: sequences a micro-batch; a step takes
    `accumulation` of them. warm_up: share of the steps. clip: largest norm of the gradient, or None. bf16: autocast.

    UserError, naming the file, for a value that cannot be.
    """

    name: str
    objective: str
    rate: float
    tokens: int
    batch: int = 8
    accumulation: int = 1
    warm_up: float = 0.05
    schedule: str = "cosine"
    weight_decay: float = 0.0
    clip: float | None = 1.0
    entropy: float = 0.0
    norms: bool = False
    inputs: str = "compressed"
    top: int = 64
    bf16: bool = False
    seed: int = 0
    train: str = "routers"
    router_rate: float | None = None
    gates: float = 0.0
    target: float | None = None
    straight_through: bool = True
    threshold_tokens: int = 8192
    load: float = 0.0
    load_term: str = "product"
    rank: int = 8
    alpha: int = 16

    @classmethod
    def of(cls, config: dict[str, Any]) -> Tuning:
        """Return the settings of a composed `tuning` group."""
        where = f"conf/tuning/{config.get('name')}.yaml"
        known = [field.name for field in fields(cls)]
        given = {key: value for key, value in config.items() if key not in ("calibration", "defaults")}
        for key in given:
            if key not in known:
                raise UserError(f"{where}: unknown key {key!r}; {nearest(key, known)}.")
        for key in ("name", "objective", "rate", "tokens"):
            if given.get(key) is None:
                raise UserError(f"{where}: key {key!r} has no value. Give tuning.{key}=... .")
        tuning = cls(**given)
        tuning._check(where)
        return tuning

    @property
    def label(self) -> str:
        """The part of a table's label: the public name, the objective or the file of conf/tuning, and the norms."""
        if self.train != "routers":
            return f"{self.name} {self.objective}"
        usual = self.name == f"router_{self.objective}"
        return f"router_tuning {self.objective if usual else self.name}{' and norms' if self.norms else ''}"

    def steps(self, length: int) -> int:
        """Return the number of steps on sequences of `length` tokens; UserError where `tokens` is less than one."""
        each = self.batch * self.accumulation * length
        if self.tokens < each:
            raise UserError(
                f"conf/tuning/{self.name}.yaml: tokens={self.tokens} is less than one step of {each} "
                f"(batch x accumulation x {length}). Use tokens >= {each}."
            )
        return self.tokens // each

    def _check(self, where: str) -> None:
        choices = {"objective": OBJECTIVES, "schedule": SCHEDULES, "inputs": INPUTS, "train": TRAIN, "load_term": TERMS}
        for key, known in choices.items():
            value = getattr(self, key)
            if value not in known:
                raise UserError(f"{where}: {key}={value!r}; {nearest(str(value), list(known))}.")
        for key, least in (
            ("tokens", 1),
            ("batch", 1),
            ("accumulation", 1),
            ("top", 1),
            ("seed", 0),
            ("rank", 1),
            ("alpha", 1),
            ("threshold_tokens", 1),
        ):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UserError(f"{where}: {key}={value!r}, expected a whole number >= {least}.")
        for key in ("norms", "bf16", "straight_through"):
            if not isinstance(getattr(self, key), bool):
                raise UserError(f"{where}: {key}={getattr(self, key)!r}, expected true or false.")
        ranges = {
            "rate": (_number(self.rate) > 0, "a number above 0"),
            "warm_up": (0 <= _number(self.warm_up) < 1, "a share in [0, 1)"),
            "weight_decay": (_number(self.weight_decay) >= 0, "a number >= 0"),
            "entropy": (_number(self.entropy) >= 0, "a number >= 0"),
            "clip": (self.clip is None or _number(self.clip) > 0, "a number above 0 or null"),
            "router_rate": (self.router_rate is None or _number(self.router_rate) > 0, "a number above 0 or null"),
            "gates": (_number(self.gates) >= 0, "a number >= 0"),
            "load": (_number(self.load) >= 0, "a number >= 0"),
            "target": (self.target is None or 0 < _number(self.target) < 1, "a fraction in (0, 1) or null"),
        }
        for key, (fits, wanted) in ranges.items():
            if not fits:
                raise UserError(f"{where}: {key}={getattr(self, key)!r}, expected {wanted}.")
        if self.target is not None and bool(self.gates) == bool(self.load):
            raise UserError(f"{where}: target={self.target} needs the first weight of one term: gates > 0 or load > 0.")
        if self.load and self.load_term == "excess" and self.target is None:
            raise UserError(f"{where}: load_term=excess is over a target. Give target.")
        if self.objective == "layerwise" and (self.train != "routers" or self.gates or self.load):
            raise UserError(f"{where}: objective=layerwise tunes routers of MoE blocks. Use objective=lm or distill.")


def _number(value: Any) -> float:
    """Return a number, or -1 for what is none: outside of every range above."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else -1.0
