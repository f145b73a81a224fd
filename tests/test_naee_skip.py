"""NAEE's skipping thresholds against hand-made examples and a token-by-token count of what is kept."""

import numpy as np
import pytest

from espalier.collecting.stats import Stats
from espalier.errors import UserError
from espalier.methods.naee_skip import NaeeSkip
from espalier.plans.operations import Skip
from stats_factory import make_blocks, make_shape, observe


def ratio_stats(ratios):
    shape = make_shape(layers=(0,))
    weights = np.array([[1, ratio] for ratio in ratios], np.float32)
    return Stats(shape, (len(ratios),), {("routing", 0): {"weights": weights}}), shape


def experts_kept(weights, skip):
    """Number of experts that one token keeps, by the paper's two rules; `weights` descend."""
    if skip.rule == "ratio":
        return 1 if weights[1] < skip.beta * weights[0] else 2
    for kept in range(1, len(weights) + 1):
        if sum(weights[kept:]) <= skip.beta * sum(weights):
            return kept
    raise AssertionError("the last tail is 0")


def test_median_by_hand():
    """Four tokens: the mean of the two middle ratios; 0.125 and 0.25 lie below, 0.5 and 1 do not."""
    stats, shape = ratio_stats([0.5, 0.125, 1.0, 0.25])
    plan = NaeeSkip().plan(stats, shape).check(shape)
    assert plan.layers[0] == (Skip(0.375, "ratio"),)
    assert plan.evidence[0] == {"beta": 0.375, "experts_per_token": 1.5}


def test_the_inequality_is_strict_by_hand():
    """Five tokens, the median is one of them: it is not below itself and keeps both experts."""
    stats, shape = ratio_stats([0.5, 0.125, 1.0, 0.25, 0.75])
    plan = NaeeSkip().plan(stats, shape)
    assert plan.layers[0] == (Skip(0.5, "ratio"),)
    assert plan.evidence[0]["experts_per_token"] == pytest.approx((5 + 3) / 5)
    stats, shape = ratio_stats([0.5, 0.5, 0.5])
    assert NaeeSkip().plan(stats, shape).evidence[0]["experts_per_token"] == 2


def test_the_median_is_taken_of_float32_ratios_in_float64():
    ratios = np.array([0.1, 0.7], np.float32)
    stats, shape = ratio_stats(ratios)
    assert NaeeSkip().plan(stats, shape).layers[0][0].beta == (float(ratios[0]) + float(ratios[1])) / 2


@pytest.mark.parametrize(
    ("wanted", "beta", "kept"), [(2, 0, 2), (1.5, 0.375, 1.5), (1.3, 0.5625, 1.25), (1, 0.8125, 1)]
)
def test_mean_k_by_hand(wanted, beta, kept):
    """Ratios 1/8, 1/4, 1/2, 5/8: thresholds lie half-way between neighbours."""
    stats, shape = ratio_stats([0.5, 0.125, 0.625, 0.25])
    plan = NaeeSkip(mean_k=wanted).plan(stats, shape)
    assert plan.layers[0] == (Skip(beta, "ratio"),)
    assert plan.evidence[0]["experts_per_token"] == kept


def test_mean_k_with_ties_takes_the_nearest():
    stats, shape = ratio_stats([0.25] * 6 + [0.5] * 4)
    assert NaeeSkip(mean_k=1.5).plan(stats, shape).evidence[0]["experts_per_token"] == 1.4
    assert NaeeSkip(mean_k=1.8).plan(stats, shape).evidence[0]["experts_per_token"] == 2


@pytest.mark.parametrize("top_k", [2, 3, 5])
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("keys", [{}, {"beta": 0.3}, {"mean_k": 1.6}, {"mean_k": 1.0}])
def test_experts_per_token_equal_a_count_over_tokens(top_k, renormalise, keys):
    shape = make_shape(8, top_k, renormalise)
    blocks = make_blocks(shape, 101)
    plan = NaeeSkip(**keys).plan(observe(blocks, shape), shape).check(shape)
    for layer, block in blocks.items():
        (skip,) = plan.layers[layer]
        assert skip.rule == ("ratio" if top_k == 2 else "tail")
        kept = []
        for logits in block.logits.astype(np.float64):
            weights = np.sort(np.exp(logits) / np.exp(logits).sum())[::-1][:top_k].astype(np.float32)
            kept.append(experts_kept((weights.astype(np.float64)).tolist(), skip))
        # the median is itself an observed value, on which rounding may decide either way
        assert plan.evidence[layer]["experts_per_token"] == pytest.approx(np.mean(kept), abs=1.01 / 101)
        if "mean_k" in keys:
            assert plan.evidence[layer]["experts_per_token"] == pytest.approx(keys["mean_k"], abs=0.5 / 101)
        if "beta" in keys:
            assert skip.beta == 0.3


def test_median_of_all_tails_halves_the_experts_that_can_be_skipped():
    """By hand: K = 3, two tokens. Tails (3/4, 1/4) and (1/2, 1/8); the median of the four is 3/8."""
    shape = make_shape(top_k=3, layers=(0,))
    weights = np.array([[0.25, 0.5, 0.25], [0.5, 0.375, 0.125]], np.float32)
    plan = NaeeSkip().plan(Stats(shape, (2,), {("routing", 0): {"weights": weights}}), shape)
    assert plan.layers[0] == (Skip(0.375, "tail"),)
    assert plan.evidence[0]["experts_per_token"] == 2  # (K + 1) / 2


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"beta": 1.5}, r"beta=1.5 is not a number in 0..1"),
        ({"beta": "median"}, r"beta=median is not a number"),
        ({"beta": 0.5, "mean_k": 1.5}, r"beta=0.5 and mean_k=1.5 exclude each other"),
        ({"mean_k": 3}, r"mean_k=3 lies outside 1..top_k=2"),
        ({"mean_k": 0.5}, r"mean_k=0.5 lies outside 1..top_k=2"),
    ],
)
def test_bad_values_are_refused(keys, message):
    stats, shape = ratio_stats([0.5, 0.25])
    with pytest.raises(UserError, match=f"conf/method/naee_skip.yaml: {message}"):
        NaeeSkip(**keys).plan(stats, shape)


def test_a_router_that_picks_one_expert_has_nothing_to_skip():
    shape = make_shape(top_k=1)
    with pytest.raises(UserError, match="top_k=1; skipping needs at least 2"):
        NaeeSkip().plan(observe(make_blocks(shape), shape), shape)
