"""NAEE's searches among more experts against every subset, run token by token; budgets by hand."""

from itertools import combinations, product

import numpy as np
import pytest

from espalier.collecting.sampling import gram_sample
from espalier.errors import UserError
from espalier.methods import naee
from espalier.methods.naee import Naee
from espalier.methods.rerouting import Router
from espalier.methods.subset_loss import BlockLoss
from espalier.methods.subset_search import State, best_of, branch_and_bound, eliminate, improve, seeds
from espalier.probes.residual_gram import ResidualGram
from stats_factory import make_blocks, make_shape, observe
from test_naee import brute_force

CASES = [(12, 2, True, 6), (12, 2, False, 5), (10, 3, True, 5), (10, 3, False, 4), (9, 1, True, 4)]


def block_of(experts, top_k, renormalise, seed, tokens=60, chunks=2):
    shape = make_shape(experts, top_k, renormalise, layers=(0,))
    block = make_blocks(shape, tokens, seed)[0]
    arrays = observe({0: block}, shape).layer("residual_gram", 0)
    chunk = np.arange(tokens) * chunks // tokens
    return block, shape, BlockLoss(arrays, chunk, Router("softmax", top_k, renormalise))


def mask(kept, experts):
    return np.isin(np.arange(experts), list(kept))


@pytest.mark.parametrize(("experts", "top_k", "renormalise", "removed"), CASES)
def test_losses_on_the_way_are_those_of_the_really_pruned_block(experts, top_k, renormalise, removed):
    """Each step of elimination removes the expert that costs least of all that are left."""
    block, shape, loss = block_of(experts, top_k, renormalise, seed=experts)
    chunks = [range(30), range(30, 60)]
    everyone = set(range(experts))
    before = everyone
    for number, (kept, value) in enumerate(eliminate(loss, removed), 1):
        expected = brute_force(block, shape, number, chunks)
        left = set(np.flatnonzero(kept).tolist())
        assert left < before
        assert value == pytest.approx(expected[tuple(sorted(everyone - left))], rel=3e-5)
        best = min(expected[tuple(sorted(everyone - (before - {e})))] for e in before)
        assert value == pytest.approx(best, rel=3e-5)
        before = left
    assert len(before) == experts - removed


@pytest.mark.parametrize(("experts", "top_k", "renormalise", "removed"), CASES)
def test_what_one_expert_less_adds_is_exact(experts, top_k, renormalise, removed):
    _, _, loss = block_of(experts, top_k, renormalise, seed=1)
    kept = mask(range(0, experts, 2), experts) | mask([1, 3], experts)
    state = State(loss, kept)
    assert state.loss == pytest.approx(loss.loss(kept))
    for e in np.flatnonzero(kept):
        less = kept.copy()
        less[e] = False
        total = np.bincount(loss.chunk, loss.error(less))
        np.testing.assert_allclose(state.total + state.gain[:, e], total, rtol=1e-6, atol=1e-9 * loss.norm.sum())


@pytest.mark.parametrize(("experts", "top_k", "renormalise", "removed"), CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_swaps_end_where_no_swap_helps(experts, top_k, renormalise, removed, seed):
    block, shape, loss = block_of(experts, top_k, renormalise, seed)
    expected = brute_force(block, shape, removed, [range(30), range(30, 60)])
    start = mask(range(experts - removed), experts)
    kept, value, tried = improve(loss, start)
    assert tried
    everyone, left = set(range(experts)), set(np.flatnonzero(kept).tolist())
    assert value == pytest.approx(expected[tuple(sorted(everyone - left))], rel=3e-5)
    assert value <= loss.loss(start)
    for out, into in product(left, everyone - left):
        assert expected[tuple(sorted(everyone - (left - {out} | {into})))] >= value * (1 - 1e-4)


@pytest.mark.parametrize(("experts", "top_k", "removed"), [(12, 2, 6), (11, 2, 3), (13, 2, 9), (10, 1, 5), (9, 1, 8)])
@pytest.mark.parametrize("seed", [0, 1])
def test_branch_and_bound_finds_the_best_subset_from_any_start(experts, top_k, removed, seed):
    block, shape, loss = block_of(experts, top_k, True, seed)
    expected = brute_force(block, shape, removed, [range(30), range(30, 60)])
    kept, value, bound = branch_and_bound(loss, removed, mask(range(experts - removed), experts))
    assert bound == value == pytest.approx(min(expected.values()), rel=3e-5)
    dropped = tuple(e for e in range(experts) if not kept[e])
    assert expected[dropped] == pytest.approx(value, rel=3e-5)


def test_a_search_that_stops_early_gives_a_bound_that_holds(monkeypatch):
    block, shape, loss = block_of(12, 2, True, 0)
    best = min(brute_force(block, shape, 6, [range(30), range(30, 60)]).values())
    for picks in (1, 2_000, 50_000):
        monkeypatch.setattr("espalier.methods.subset_search.NODE_PICKS", picks)
        _, value, bound = branch_and_bound(loss, 6, mask(range(6), 12))
        assert bound <= best * 1.0001
        assert value >= best * 0.9999
    assert naee._from_starts(loss, 6, bounded=True)[1]["bound"] <= best * 1.0001


@pytest.mark.parametrize("renormalise", [True, False])
def test_seeds_are_the_scores_of_frequency_and_reap(renormalise):
    block, shape, loss = block_of(8, 2, renormalise, 3)
    found, norm = seeds(loss), observe({0: block}, shape).layer("output_norm", 0)
    np.testing.assert_array_equal(found["frequency"], norm["counts"])
    np.testing.assert_allclose(found["reap"], norm["gate_norm_sum"] / np.maximum(norm["counts"], 1), rtol=1e-4)
    kept = best_of(loss, np.array([1, 2, 1, 1, 2, 1, 0, 1.0]), 4)
    assert np.flatnonzero(kept).tolist() == [0, 1, 2, 4]


@pytest.mark.parametrize(("search", "name", "optimal"), [("auto", "exact", True), ("greedy", None, False)])
def test_the_evidence_says_how_the_experts_were_found(search, name, optimal):
    shape = make_shape(12, 3, layers=(0,))
    stats = observe(make_blocks(shape, 60), shape)
    plan = Naee(0.5, search=search).plan(stats, shape).check(shape)
    evidence = plan.evidence[0]
    assert evidence["optimal"] is optimal
    assert evidence["search"] == name or evidence["search"] in ("greedy", "frequency", "reap")
    if search == "greedy":
        assert set(evidence["starts"]) == {"greedy", "frequency", "reap"}
        assert evidence["loss"] == min(start["swapped"] for start in evidence["starts"].values())


def test_many_experts_are_searched_and_never_refused(monkeypatch):
    monkeypatch.setattr("espalier.methods.subset_search.SWAP_TOKENS", 5000)
    shape = make_shape(64, 8, layers=(0,))
    blocks = make_blocks(shape, 200)
    plan = Naee(0.25).plan(observe(blocks, shape), shape).check(shape)
    (keep,) = plan.layers[0]
    random = [sorted(np.random.default_rng(n).choice(64, 16, replace=False).tolist()) for n in range(8)]
    loss = BlockLoss(observe(blocks, shape).layer("residual_gram", 0), np.zeros(200, int), Router("softmax", 8, True))
    assert len(keep.experts) == 48
    assert plan.evidence[0]["loss"] == pytest.approx(loss.loss(mask(keep.experts, 64)))
    assert all(plan.evidence[0]["loss"] < loss.loss(~mask(gone, 64)) for gone in random)


@pytest.mark.parametrize(("top_k", "renormalise"), [(2, True), (3, True), (2, False)])
def test_knapsack_keeps_as_many_experts_where_the_losses_say(top_k, renormalise):
    """Against every way to share 12 of 3 x 8 experts; for K = 2 the losses are those of the best subsets."""
    shape = make_shape(8, top_k, renormalise, layers=(0, 1, 2))
    blocks = make_blocks(shape, 60)
    blocks[1].outputs[:] = blocks[1].outputs.mean(axis=1, keepdims=True) + 0.05 * blocks[1].outputs
    stats = observe(blocks, shape)
    plan = Naee(0.5, budget="knapsack").plan(stats, shape).check(shape)
    counts = {layer: len(operations[0].experts) for layer, operations in plan.layers.items()}
    assert sum(counts.values()) == 12
    assert counts[1] == min(counts.values()) < 4  # its experts are nearly alike

    def cost(layer, kept):
        if kept == 8:
            return 0.0
        return min(brute_force(blocks[layer], shape, 8 - kept, [range(60)]).values()) ** 2

    if (top_k, renormalise) == (2, True):
        table = {(layer, kept): cost(layer, kept) for layer in range(3) for kept in range(2, 9)}
        best = min(
            sum(table[layer, n] for layer, n in enumerate(share))
            for share in product(range(2, 9), repeat=3)
            if sum(share) == 12
        )
        assert sum(table[layer, n] for layer, n in counts.items()) == pytest.approx(best, rel=1e-4)
    uniform = Naee(0.5).plan(stats, shape)

    def total(found):
        return sum(e["loss"] ** 2 for e in found.evidence.values())

    assert total(plan) <= total(uniform)


def test_an_exact_search_is_refused_where_the_knapsack_takes_far_more_from_one_layer(monkeypatch):
    """C(12, 2) = 66 subsets of each layer may be looked at, and not the C(12, 4) = 495 of one that loses all four."""
    monkeypatch.setattr(naee, "MOST_OPERATIONS", 70.0 * naee.LEAST_TOKENS * (12 + 9))
    shape = make_shape(12, 3, layers=(0, 1))
    blocks = make_blocks(shape, 60)
    blocks[1].outputs[:] = blocks[1].outputs[:, :1]  # all alike: nothing is lost there
    stats = observe(blocks, shape)
    method = Naee(1 / 6, search="exact", budget="knapsack")
    method.check(shape, 60)
    message = r"search=exact, removing 4 of 12 experts in layer 1: 495 subsets on 60 tokens, .* Use search=auto"
    with pytest.raises(UserError, match=message):
        method.plan(stats, shape)
    plan = Naee(1 / 6, budget="knapsack").plan(stats, shape)
    assert [len(plan.layers[layer][0].experts) for layer in (0, 1)] == [12, 8]


def test_groups_lose_equally_many_and_the_best_of_those_is_found():
    document = make_shape(8, layers=(0,)).document() | {"groups": 2, "groups_chosen": 1}
    shape = type(make_shape()).from_document(document)
    rng = np.random.default_rng(0)
    outputs, logits = rng.normal(size=(50, 8, 4)), rng.normal(size=(50, 8)).astype(np.float32)

    def run(t, kept):
        """One token's output: the group of the largest logit, its two best experts."""
        groups = [[e for e in kept if e // 4 == g] for g in range(2)]
        group = max(groups, key=lambda es: max(logits[t, e] for e in es))
        best = sorted(group, key=lambda e: -logits[t, e])[:2]
        w = np.exp(logits[t, best].astype(float))
        return (w / w.sum()) @ outputs[t, best]

    z = np.array([run(t, range(8)) for t in range(50)])
    residual = outputs - z[:, None]
    upper = np.triu_indices(8)
    arrays = {
        "gram": np.einsum("tad,tbd->tab", residual, residual)[:, upper[0], upper[1]].astype(np.float32),
        "cross": np.einsum("tad,td->ta", residual, z).astype(np.float32),
        "norm": (z**2).sum(axis=1).astype(np.float32),
        "logits": logits,
        "token": np.arange(50),
    }
    from espalier.collecting.stats import Stats

    stats = Stats(shape, (50,), {("residual_gram", 0): arrays})
    losses = {
        kept: sum(((run(t, kept) - z[t]) ** 2).sum() for t in range(50)) ** 0.5
        for kept in (a + b for a in combinations(range(4), 2) for b in combinations(range(4, 8), 2))
    }
    plan = Naee(0.5).plan(stats, shape).check(shape)
    assert plan.layers[0][0].experts == min(losses, key=losses.__getitem__)
    greedy = Naee(0.5, search="greedy").plan(stats, shape).check(shape)
    assert greedy.evidence[0]["loss"] == pytest.approx(losses[greedy.layers[0][0].experts], rel=1e-4)
    with pytest.raises(UserError, match="leaves 5 experts, not a multiple of the 2 router groups"):
        Naee(0.375).check(shape, 50)


def test_of_equal_logits_those_count_that_the_model_took():
    """Of six tokens the first three have equal logits at the K-th place; z says which of the experts ran."""
    outputs = np.random.default_rng(0).normal(size=(6, 4, 5))
    logits = np.array([[0, 1, 1, 2], [1, 1, 1, 2], [1, 1, 1, 0], [0, 1, 2, 3], [3, 0, 1, 2], [3, 2, 0, 1]], np.float32)
    ran = [(3, 2), (3, 1), (1, 2), (3, 2), (0, 3), (0, 1)]

    def run(t, chosen):
        w = np.exp(logits[t, list(chosen)].astype(float))
        return (w / w.sum()) @ outputs[t, list(chosen)]

    z = np.array([run(t, chosen) for t, chosen in enumerate(ran)])
    residual, upper = outputs - z[:, None], np.triu_indices(4)
    arrays = {
        "gram": np.einsum("tad,tbd->tab", residual, residual)[:, upper[0], upper[1]].astype(np.float32),
        "cross": np.einsum("tad,td->ta", residual, z).astype(np.float32),
        "norm": (z**2).sum(axis=1).astype(np.float32),
        "logits": logits,
    }
    loss = BlockLoss(arrays, np.zeros(6, int), Router("softmax", 2, True))
    assert [set(chosen) for chosen in loss.chosen.tolist()] == [set(chosen) for chosen in ran]
    without = {
        0: [(3, 2), (3, 1), (1, 2), (3, 2), (3, 2), (1, 3)],
        2: [(3, 1), (3, 1), (1, 0), (3, 1), (0, 3), (0, 1)],
    }
    for expert, left in without.items():
        expected = [((run(t, chosen) - z[t]) ** 2).sum() for t, chosen in enumerate(left)]
        found = loss.error(~mask([expert], 4))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        assert not found[[set(new) == set(old) for new, old in zip(left, ran, strict=True)]].any()


def test_the_sample_of_tokens_is_bounded_by_bytes_and_known_beforehand():
    """The probe and the estimate agree; 2^29 bytes a layer hold 4,017 tokens of 256 experts."""
    for experts, tokens in product((16, 64, 128, 256, 512), (100, 4017, 20_000, 262_144)):
        stride = ResidualGram(make_shape(experts, layers=(0,)), tokens).stride
        kept = -(-tokens // stride)
        assert gram_sample(experts, tokens) == kept
        assert experts <= 16 or kept * 4 * experts * (experts + 1) / 2 <= 2**29
    assert gram_sample(256, 4017) == 4017
    assert gram_sample(256, 4018) == 2009
