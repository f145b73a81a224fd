"""DiEP: keep the experts of the largest learnt masks, in all layers together.

Bai et al., "Adaptive Mixture-of-Experts Compression through Differentiable Expert Pruning", NeurIPS 2025
(arXiv 2509.16105): score of expert i in layer l = beta_l softmax(alpha_l)_i, the lowest of all layers are dropped.
How alpha and beta are learnt, and what the paper leaves open of that, says `espalier.fits.diep`.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from espalier.checkpoints.shape import ModelShape
from espalier.collecting.stats import Stats
from espalier.errors import UserError
from espalier.methods.options import one_of, whole_number
from espalier.methods.ranking import BUDGETS, keep_best
from espalier.plans.plan import Plan
from espalier.training.fit_settings import Fitting


@dataclass(frozen=True)
class Diep:
    """Keep the experts of the largest beta_l softmax(alpha_l).

    `budget="uniform"` ranks within each layer, by alpha alone. The other keys are those of the fit, which all ratios
    and budgets share.
    """

    ratio: float
    budget: str = "global"
    start: float = 0.5
    penalty: float = 0.01
    alternate: int = 3
    rate: float = 0.03
    epochs: int = 10
    batch: int = 16
    accumulation: int = 1
    seed: int = 0
    probes: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        one_of("diep", "budget", self.budget, BUDGETS)
        whole_number("diep", "alternate", self.alternate, 1)
        for key, least in (("start", "above"), ("penalty", "of at least")):
            value = getattr(self, key)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or value < 0 or (key == "start" and value == 0):
                raise UserError(f"conf/method/diep.yaml: {key}={value} is not a number {least} 0.")
        _ = self.fit  # its own keys are refused now, not when it runs

    @property
    def fit(self) -> Fitting:
        """The settings of what is learnt."""
        own = {"start": float(self.start), "penalty": float(self.penalty), "alternate": self.alternate}
        return Fitting("diep", self.rate, self.epochs, self.batch, self.accumulation, seed=self.seed, own=own)

    def plan(self, stats: Stats, shape: ModelShape) -> Plan:
        return keep_best({"name": "diep"} | asdict(self), self._scores(stats), shape, budget=self.budget)

    def _scores(self, stats: Stats) -> Iterator[tuple[int, NDArray[np.float64]]]:
        for layer, learnt in stats.layers("diep"):
            alpha = learnt["alpha"].astype(np.float64)
            shares = np.exp(alpha - alpha.max())
            yield layer, float(learnt["beta"][0]) * shares / shares.sum()
