"""How many experts each layer keeps: the global and the knapsack budget against enumeration."""

import itertools

import numpy as np
import pytest

from espalier.checkpoints.shape import ModelShape
from espalier.methods.budget import global_survivors, knapsack, least
from espalier.methods.ranking import keep_best
from stats_factory import make_shape


def grouped(experts=8, groups=2, top_k=2, layers=(0, 1, 2)):
    document = make_shape(experts, top_k, layers=layers).document()
    return ModelShape.from_document(document | {"groups": groups, "groups_chosen": 1, "group_least": 2})


def test_least_is_what_the_router_needs():
    assert least(make_shape(8, 3)) == 3
    assert least(grouped()) == 4  # two in each of two groups
    assert least(grouped(16, 4, top_k=3)) == 12  # three from the one group that is chosen


@pytest.mark.parametrize("seed", range(5))
def test_global_keeps_the_best_sum_of_scores(seed):
    """Against every way to give each of three layers between K and E experts."""
    shape = make_shape(5, 2, layers=(0, 3, 4))
    rng = np.random.default_rng(seed)
    scores = {layer: rng.integers(0, 6, 5).astype(float) for layer in shape.layers}
    for total in range(6, 16):
        counts = global_survivors(scores, shape, total)
        assert sum(counts.values()) == total

        def kept(numbers):
            return sum(sum(sorted(s, reverse=True)[:n]) for n, s in zip(numbers, scores.values(), strict=True))

        ways = [w for w in itertools.product(range(2, 6), repeat=3) if sum(w) == total]
        assert kept(tuple(counts.values())) == max(map(kept, ways))


def test_global_leaves_every_router_group_the_same_number():
    shape = grouped()
    scores = {0: np.arange(8), 1: 100 + np.arange(8), 2: np.zeros(8)}
    counts = global_survivors(scores, shape, 16)
    assert counts == {0: 4, 1: 8, 2: 4}
    plan = keep_best({"name": "reap", "ratio": 1 / 4}, scores.items(), shape, budget="global").check(shape)
    assert [len(plan.layers[layer][0].experts) for layer in shape.layers] == [6, 8, 4]


def test_equal_scores_go_to_the_lower_layer():
    shape = make_shape(4, 2, layers=(0, 1))
    assert global_survivors({0: np.ones(4), 1: np.ones(4)}, shape, 5) == {0: 3, 1: 2}


@pytest.mark.parametrize("seed", range(6))
def test_knapsack_equals_enumeration(seed):
    rng = np.random.default_rng(seed)
    losses = {layer: np.concatenate([[np.inf], rng.integers(0, 9, 4).astype(float)]) for layer in (1, 2, 5)}
    losses[2][3] = np.inf
    for total in range(3, 13):
        ways = [w for w in itertools.product(range(5), repeat=3) if sum(w) == total]
        costs = [sum(values[n] for values, n in zip(losses.values(), way, strict=True)) for way in ways]
        best = min(costs)
        if np.isinf(best):
            with pytest.raises(ValueError, match="no choice"):
                knapsack(losses, total)
            continue
        counts = knapsack(losses, total)
        assert sum(counts.values()) == total
        assert sum(losses[layer][n] for layer, n in counts.items()) == best


def test_knapsack_of_equal_losses_keeps_fewer_in_the_last_layer():
    losses = {0: np.array([np.inf, 1, 1]), 1: np.array([np.inf, 1, 1])}
    assert knapsack(losses, 3) == {0: 2, 1: 1}
