"""Errors of measured qualities: 95 % intervals over items, documents and seeds; imports no torch.

An accuracy is a mean over items and a log-perplexity a ratio of sums over documents; both are the ratio
estimator R = sum_i x_i / sum_i m_i (m_i = 1 for items, tokens for documents). Its variance by the delta method
is n / (n - 1) * sum_i (x_i - R m_i)^2 / (sum_i m_i)^2 (Cochran, Sampling Techniques, section 2.11). Differences
of two models on the same items are paired: x_i is the difference, so what makes an item hard cancels.

Seeds and items are crossed random effects. With S seeds, the variance of the mean is taken as the variance of
the S seeds' values over S, plus the variance over items of each item's mean over seeds. The interaction of
seed and item enters both terms, so the interval is slightly too wide rather than too narrow.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special  # not scipy.stats, which takes seconds to import

LEVEL = 0.95


def _quantile(probability: float, freedom: float) -> float:
    """Quantile of Student's t, of the normal law for infinite degrees of freedom."""
    return float(special.ndtri(probability) if math.isinf(freedom) else special.stdtrit(freedom, probability))


@dataclass(frozen=True)
class Estimate:
    """A mean with its variance and the degrees of freedom of Student's t (infinite: the normal law)."""

    value: float
    variance: float
    freedom: float = math.inf

    @property
    def error(self) -> float:
        """Standard error."""
        return math.sqrt(self.variance)

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """Return the two-sided interval; (nan, nan) when the variance is unknown (a single item)."""
        half = _quantile(0.5 + level / 2, self.freedom) * self.error
        return self.value - half, self.value + half

    def exp(self, level: float = LEVEL) -> tuple[float, float, float]:
        """Return exp of (value, low, high): a perplexity from a log-perplexity, a ratio from a difference."""
        with np.errstate(over="ignore"):  # a perplexity beyond 1e308 is infinite
            value, low, high = (float(np.exp(x)) for x in (self.value, *self.interval(level)))
        return value, low, high


def estimate(values: ArrayLike, weights: ArrayLike | None = None) -> Estimate:
    """Return sum(values) / sum(weights) and its error.

    values: float [n] or [S, n], a quantity of each item (S seeds on the same n items). weights: float [n],
    default 1. The interval is over items, and over seeds too when S > 1.
    """
    x: NDArray[np.float64] = np.atleast_2d(np.asarray(values, dtype=np.float64))  # [S, n]
    seeds, items = x.shape
    m = np.ones(items) if weights is None else np.asarray(weights, dtype=np.float64)
    total = m.sum()
    by_seed = x.sum(axis=1) / total  # [S]
    value = float(by_seed.mean())
    if items < 2:
        return Estimate(value, math.nan, 1)
    residual = x.mean(axis=0) - value * m
    over_items = items / (items - 1) * float(residual @ residual) / total**2
    if seeds == 1:
        return Estimate(value, over_items, items - 1)
    over_seeds = float(by_seed.var(ddof=1)) / seeds
    return _sum(value, [(over_items, items - 1), (over_seeds, seeds - 1)])


def mean_ratio(ratios: ArrayLike) -> tuple[float, float, float]:
    """Return the geometric mean of `ratios` [S, n] and its 95 % interval, over n and over seeds where S > 1."""
    return estimate(np.log(np.asarray(ratios, dtype=np.float64))).exp()


def mean(estimates: Sequence[Estimate]) -> Estimate:
    """Return the unweighted mean of independent estimates, such as of several tasks or domains."""
    count = len(estimates)
    value = math.fsum(e.value for e in estimates) / count
    return _sum(value, [(e.variance / count**2, e.freedom) for e in estimates])


def mean_over_seeds(by_seed: Sequence[Sequence[Estimate]]) -> Estimate:
    """Return the mean over tasks and seeds of `by_seed[seed][task]`, for tasks with different items.

    The variance over seeds is that of the seeds' task means (tasks share a seed's plan, so they are not
    independent over seeds); the variance over items is that of the tasks, averaged over seeds.
    """
    means = [mean(tasks) for tasks in by_seed]
    if len(means) == 1:
        return means[0]
    value = math.fsum(m.value for m in means) / len(means)
    over_seeds = float(np.var([m.value for m in means], ddof=1)) / len(means)
    items = math.fsum(m.variance for m in means) / len(means)
    return _sum(value, [(items, min(m.freedom for m in means)), (over_seeds, len(means) - 1)])


def _sum(value: float, parts: list[tuple[float, float]]) -> Estimate:
    # Welch and Satterthwaite: degrees of freedom of a sum of independent variances.
    variance = math.fsum(v for v, _ in parts)
    spread = math.fsum(v * v / freedom for v, freedom in parts)
    return Estimate(value, variance, variance**2 / spread if spread > 0 else math.inf)


def wilson(correct: float, items: int, level: float = LEVEL) -> tuple[float, float]:
    """Return Wilson's score interval of the proportion correct / items, which stays inside 0..1.

    Wilson, JASA 22 (1927) 209.
    """
    z = _quantile(0.5 + level / 2, math.inf)
    p, n = correct / items, float(items)
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def accuracy_interval(values: NDArray[Any]) -> tuple[float, float, float]:
    """Return (value, low, high) of a mean over items, values in 0..1 [S, n].

    One seed of rights and wrongs: Wilson. Otherwise Student's t, cut to 0..1.
    """
    table = np.atleast_2d(values)
    found = estimate(table)
    if table.shape[0] == 1 and np.isin(table, (0, 1)).all():
        low, high = wilson(float(table.sum()), table.shape[1])
    else:
        low, high = found.interval()
        low, high = max(0.0, low), min(1.0, high)
    return found.value, low, high
