"""Comparisons in pairs against closed forms, a loop that draws items one by one, and tables with known answers."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from espalier.tables import pairs
from espalier.tables.measured import Measured


def sampled(values, weights=None):
    values = np.atleast_2d(np.asarray(values, dtype=float))
    return pairs.Sampled(values, np.ones(values.shape[1]) if weights is None else np.asarray(weights, dtype=float))


def spread(tasks, sizes, draws=4000):
    drawn = pairs.bootstrap(tasks, sizes, draws)
    return float((drawn[:, 0] - drawn[:, 1]).std(ddof=1))


def test_the_bootstraps_error_is_that_of_paired_items():
    rng = np.random.default_rng(0)
    hard = rng.random(300)
    rights = np.stack([(hard + rng.normal(0, 0.2, 300)) < level for level in (0.6, 0.55)]).astype(float)
    difference = rights[0] - rights[1]
    expected = math.sqrt(difference.var(ddof=1) / 300)
    assert spread([sampled(rights)], [1, 1]) == pytest.approx(expected, rel=0.05)
    means = pairs.statistic([sampled(rights)], [1, 1])
    assert means[0] - means[1] == pytest.approx(difference.mean())
    p = pairs.two_sided(difference.mean(), expected)
    assert p == pytest.approx(stats.ttest_1samp(difference, 0).pvalue, rel=0.05)


def test_tasks_count_alike_and_documents_by_their_tokens():
    """Against a loop over draws that picks documents one by one."""
    rng = np.random.default_rng(1)
    tasks = []
    for count in (12, 40):
        tokens = rng.integers(30, 300, count)
        tasks.append(sampled(tokens * rng.normal(3, 0.3, (2, count)), tokens))
    slow = []
    for _ in range(2000):
        values = []
        for task in tasks:
            chosen = rng.integers(0, len(task.weights), len(task.weights))
            values.append(sum(task.values[0, n] - task.values[1, n] for n in chosen) / sum(task.weights[chosen]))
        slow.append(sum(values) / 2)
    assert spread(tasks, [1, 1]) == pytest.approx(np.std(slow), rel=0.08)


def test_seeds_vary_as_they_do_in_the_interval():
    """The variance of S seeds' mean is that of the seeds over S, where drawing them again gives (S - 1) / S of it."""
    rng = np.random.default_rng(2)
    shifts = rng.normal(0, 0.1, 4)
    seeds = np.repeat(shifts[:, None], 200, axis=1)  # no item differs from another
    drawn = pairs.bootstrap([sampled(np.concatenate([seeds, np.zeros((1, 200))]))], [4, 1], 20000)
    assert drawn[:, 0].var(ddof=1) == pytest.approx(shifts.var(ddof=1) / 4, rel=0.05)
    assert (drawn[:, 1] == 0).all()


def test_holm_is_the_textbooks():
    assert pairs.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert pairs.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert pairs.holm([]) == []


def test_equal_methods_are_seldom_told_apart():
    """At most one table in twenty may tell any two of four equal methods apart; 200 tables of 150 items."""
    rng = np.random.default_rng(3)
    wrong = 0
    for _ in range(200):
        rights = (rng.random((4, 150)) < 0.6).astype(float)
        own = [[line("reap", number, {"a": rights[number]})] for number in range(4)]
        wrong += any(pair["better"] for pair in pairs.compare(own, draws=200))
    assert wrong <= 19  # 5 % and three standard errors


def line(method, seed, tasks, share=0.5, kind="choice", tokens=None, model="m"):
    """A measured row with given rights or nll by task."""
    one = Measured({"label": f"{method} {seed}", "model": model, "share": share})
    for task, given in tasks.items():
        one.results[task] = {"kind": kind}
        column = "correct" if kind == "choice" else "nll"
        frame = pd.DataFrame({"item": [str(n) for n in range(len(given))], column: given, "tokens": tokens or 1.0})
        one.samples[task] = frame.set_index("item")
    return one


def test_only_rows_of_one_share_and_model_are_compared():
    rng = np.random.default_rng(4)
    rights = {n: {"a": (rng.random(400) < level).astype(float)} for n, level in enumerate((0.9, 0.5, 0.9, 0.2, 0.9))}
    own = [
        [line("best", 0, rights[0])],
        [line("worse", 1, rights[1])],
        [line("other share", 2, rights[2], share=0.75)],
        [line("no share", 3, rights[3], share=None)],
        [line("other model", 4, rights[4], model="n")],
    ]
    (found,) = pairs.compare(own)
    assert (found["first"], found["second"], found["better"]) == ("best 0", "worse 1", "best 0")
    assert found["value"] == pytest.approx(rights[0]["a"].mean() - rights[1]["a"].mean())
    assert found["low"] < found["value"] < found["high"]
    assert found["p_holm"] == found["p"] < 1e-6


def test_one_item_tells_nothing_apart():
    right, wrong = np.ones(1), np.zeros(1)
    many = np.random.default_rng(6).random(50) < 0.5
    for a, b in (({"a": right}, {"a": wrong}), ({"a": right, "b": many}, {"a": wrong, "b": many})):
        assert pairs.compare([[line("one", 0, a)], [line("other", 1, b)]]) == []


def test_perplexities_are_ratios_and_lower_is_better():
    rng = np.random.default_rng(5)
    hard = rng.normal(3, 0.5, 60)
    nll = [hard + rng.normal(0, 0.01, 60), hard + 0.2 + rng.normal(0, 0.01, 60)]
    own = [[line("a", n, {"wiki": values}, kind="perplexity")] for n, values in enumerate(nll)]
    (found,) = pairs.compare(own)
    assert found["measure"] == "perplexity"
    assert found["value"] == pytest.approx(math.exp(nll[0].mean() - nll[1].mean()))
    assert found["better"] == "a 0"
    assert found["high"] < 0.83  # pairing takes away how hard a document is
