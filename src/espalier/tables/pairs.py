"""Methods against each other: paired bootstrap on the same items, corrected for the number of pairs; no torch.

Intervals of two rows say little of their difference, since what makes an item hard is in both. Rows of one model that
leave equal shares, and were scored alike, are compared pair by pair. Items of each task (documents of each text) are
drawn with replacement, the same for all rows, and so are a row's seeds; a statistic is the mean over tasks of the
accuracy, or of the log-perplexity. A draw of S seeds varies (S - 1) / S as much as the seeds do, which is made good.
The p-value is of the normal law with the bootstrap's standard error, since quantiles of some thousand draws end before
a correction begins.

Holm's step-down correction (Scandinavian Journal of Statistics 6 (1979) 65) is over *all* pairs of a share and a
measure: whichever row turns out best may so be compared with the others after the fact.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from espalier.artefacts.store import canonical
from espalier.tables.measured import Measured, values

DRAWS = 2000
CHUNK = 2**24  # counts of items that are held at once
LEVEL = 0.05

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Sampled:
    """One task: `values` [S, n] of all rows' seeds, one after another, and the items' `weights` [n]."""

    values: Array
    weights: Array


def compare(groups: Sequence[Sequence[Measured]], draws: int = DRAWS) -> list[dict[str, Any]]:
    """Return one entry a pair of lines that leave equal shares of one model and were scored alike, by measure.

    groups: the rows of each line. `scored` counts the ways in which lines were scored. `first` and `second` are labels;
    `value`, `low` and `high` the difference of the mean accuracies, or the ratio of the geometric means of the
    perplexities, first to second, with a 95 % interval; `p`, and `p_holm` corrected; `better` is the label that is
    better beyond chance at the corrected 5 %, else None. A single item tells nothing apart and is not compared.
    """
    found = []
    ways = list(dict.fromkeys(canonical(group[0].asked) for group in groups))
    keys = [
        (group[0].row.get("model"), group[0].row.get("share"), ways.index(canonical(group[0].asked)))
        for group in groups
    ]
    for model, share, scored in dict.fromkeys(keys):
        own = [group for group, key in zip(groups, keys, strict=True) if key == (model, share, scored)]
        if share is None or len(own) < 2:
            continue
        for measure, kind, column in (("accuracy", "choice", "correct"), ("perplexity", "perplexity", "nll")):
            tasks = own[0][0].of_kind(kind)
            sampled = [_sampled(own, task, column) for task in tasks]
            if sampled and all(task.values.shape[1] > 1 for task in sampled):
                head = {"model": model, "share": share, "scored": scored, "measure": measure}
                found += [head | pair for pair in _pairs(own, sampled, measure, draws)]
    return found


def _sampled(groups: Sequence[Sequence[Measured]], task: str, column: str) -> Sampled:
    rows = [one for group in groups for one in group]
    measured = values(rows, task, column)
    return Sampled(measured, values(rows[:1], task, "tokens")[0] if column == "nll" else np.ones(measured.shape[1]))


def _pairs(
    groups: Sequence[Sequence[Measured]], tasks: Sequence[Sampled], measure: str, draws: int
) -> list[dict[str, Any]]:
    sizes = [len(group) for group in groups]
    means = statistic(tasks, sizes)
    drawn = bootstrap(tasks, sizes, draws)
    ratio, sign = measure == "perplexity", -1 if measure == "perplexity" else 1
    pairs = []
    for a, b in combinations(range(len(groups)), 2):
        difference, spread = means[a] - means[b], drawn[:, a] - drawn[:, b]
        numbers = [difference, *np.quantile(spread, (0.025, 0.975))]
        value, low, high = (float(np.exp(x) if ratio else x) for x in numbers)
        names = [groups[n][0].row["label"] for n in (a, b)]
        better = names[0] if sign * difference > 0 else names[1]
        pairs.append(
            {"first": names[0], "second": names[1], "value": value, "low": low, "high": high, "better": better}
            | {"p": two_sided(difference, float(spread.std(ddof=1)))}
        )
    for pair, corrected in zip(pairs, holm([pair["p"] for pair in pairs]), strict=True):
        pair["p_holm"] = corrected
        pair["better"] = pair["better"] if corrected < LEVEL else None
    return pairs


def statistic(tasks: Sequence[Sampled], sizes: Sequence[int]) -> Array:
    """Return [M]: each line's mean over tasks and seeds of sum(values) / sum(weights); `sizes` are the lines' seeds."""
    ends = np.cumsum(sizes)[:-1]
    by_task = [task.values.sum(axis=1) / task.weights.sum() for task in tasks]
    return np.array([part.mean() for part in np.split(np.mean(by_task, axis=0), ends)])


def bootstrap(tasks: Sequence[Sampled], sizes: Sequence[int], draws: int = DRAWS, seed: int = 0) -> Array:
    """Return [draws, M]: the statistic of each line on drawn items and seeds, the same items for all lines."""
    rng = np.random.default_rng(seed)
    by_row = np.zeros((draws, sum(sizes)))
    for task in tasks:
        items = task.values.shape[1]
        step = max(1, CHUNK // items)
        for start in range(0, draws, step):
            counts = rng.multinomial(items, np.full(items, 1 / items), size=min(step, draws - start)).astype(np.float64)
            by_row[start : start + step] += (counts @ task.values.T) / (counts @ task.weights)[:, None] / len(tasks)
    lines = []
    for part, seeds in zip(np.split(by_row, np.cumsum(sizes)[:-1], axis=1), sizes, strict=True):
        line = part.mean(axis=1)
        if seeds > 1:
            chosen = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws) / seeds
            line = line + np.sqrt(seeds / (seeds - 1)) * ((chosen - 1 / seeds) * part).sum(axis=1)
        lines.append(line)
    return np.stack(lines, axis=1)


def two_sided(difference: float, error: float) -> float:
    """Return the p-value of a difference under the normal law; 1 where nothing differs."""
    if error == 0:
        return 1.0 if difference == 0 else 0.0
    return float(2 * special.ndtr(-abs(difference) / error))


def holm(p: ArrayLike) -> list[float]:
    """Return p-values corrected by Holm's step-down procedure, in the order given."""
    given = np.asarray(p, dtype=np.float64)
    order = np.argsort(given, kind="stable")
    stepped = np.maximum.accumulate((len(given) - np.arange(len(given))) * given[order])
    corrected = np.empty_like(given)
    corrected[order] = np.minimum(stepped, 1.0)
    return [float(value) for value in corrected]
