"""NAEE's exact search against a brute force that runs the pruned block token by token."""

from itertools import combinations
from math import comb

import numpy as np
import pytest

from espalier.errors import UserError
from espalier.methods.naee import Naee
from espalier.methods.rerouting import Router
from espalier.methods.subset_loss import BlockLoss, all_subsets, enumerate_subsets
from espalier.plans.operations import Keep
from stats_factory import Block, make_blocks, make_shape, observe

SEQUENCES = (7, 5, 9, 4, 11)
TOKENS = sum(SEQUENCES)


def run_token(logits, outputs, experts, top_k, renormalise):
    """The block's output for one token when only `experts` exist."""
    exponentials = {e: np.exp(float(logits[e])) for e in experts}
    total = sum(exponentials.values())
    chosen = sorted(experts, key=lambda e: (-float(logits[e]), e))[:top_k]
    weights = [exponentials[e] / total for e in chosen]
    if renormalise:
        weights = [w / sum(weights) for w in weights]
    return sum(w * outputs[e] for w, e in zip(weights, chosen, strict=True))


def brute_force(block, shape, removed, chunks):
    """Loss of every set of dropped experts by running every token through the whole and the pruned block.

    `chunks` lists the token ids of each chunk.
    """
    everyone = range(shape.experts)
    args = (shape.top_k, shape.renormalise)
    whole = {t: run_token(block.logits[t], block.outputs[t], everyone, *args) for chunk in chunks for t in chunk}
    losses = {}
    for dropped in combinations(everyone, removed):
        kept = [e for e in everyone if e not in dropped]
        loss = 0.0
        for chunk in chunks:
            squared = 0.0
            for t in chunk:
                changed = run_token(block.logits[t], block.outputs[t], kept, *args)
                squared += float(((whole[t] - changed) ** 2).sum())
            loss += squared**0.5
        losses[dropped] = loss
    return losses


def chunks_of(chunk_sequences):
    """Token ids by chunk of so many sequences."""
    chunks, start = [], 0
    for first in range(0, len(SEQUENCES), chunk_sequences):
        length = sum(SEQUENCES[first : first + chunk_sequences])
        chunks.append(range(start, start + length))
        start += length
    return chunks


CASES = [
    (experts, top_k, renormalise, removed)
    for experts, removed in ((5, 2), (6, 3), (7, 1), (8, 4))
    for top_k in (1, 2, 3)
    for renormalise in (True, False)
    if experts - removed >= top_k
]


@pytest.mark.parametrize(("experts", "top_k", "renormalise", "removed"), CASES)
def test_search_equals_brute_force(experts, top_k, renormalise, removed):
    shape = make_shape(experts, top_k, renormalise, layers=(1, 3))
    blocks = make_blocks(shape, TOKENS, seed=experts * 10 + top_k)
    stats = observe(blocks, shape, SEQUENCES)
    everyone = range(experts)
    for loss, chunks in (("single", [range(TOKENS)]), ("chunked", chunks_of(2))):
        plan = Naee(removed / experts, loss, chunk_sequences=2).plan(stats, shape).check(shape)
        for layer in shape.layers:
            expected = brute_force(blocks[layer], shape, removed, chunks)
            ranked = sorted(expected, key=expected.__getitem__)
            assert plan.layers[layer] == (Keep(tuple(e for e in everyone if e not in ranked[0])),)
            evidence = plan.evidence[layer]
            assert evidence["subsets"] == comb(experts, removed)
            assert evidence["loss"] == pytest.approx(expected[ranked[0]], rel=3e-5)
            assert [tuple(b["dropped"]) for b in evidence["best"]] == ranked[:5]
            assert [b["loss"] for b in evidence["best"]] == pytest.approx([expected[d] for d in ranked[:5]], rel=3e-5)
            whole = 0.0
            for chunk in chunks:
                args = (everyone, top_k, renormalise)
                z = [run_token(blocks[layer].logits[t], blocks[layer].outputs[t], *args) for t in chunk]
                whole += float(np.linalg.norm(z))
            assert evidence["relative_loss"] == pytest.approx(expected[ranked[0]] / whole, rel=1e-5)


@pytest.mark.parametrize("experts", [4, 10, 11, 12])
@pytest.mark.parametrize("chunked", [False, True])
def test_table_of_all_subsets_equals_enumeration(experts, chunked):
    shape = make_shape(experts, layers=(0,))
    stats = observe(make_blocks(shape, 2 * TOKENS, seed=experts), shape, SEQUENCES * 2)
    arrays = stats.layer("residual_gram", 0)
    chunk = np.repeat(np.arange(10), SEQUENCES * 2) // 3 * chunked
    block = BlockLoss(arrays, chunk, Router("softmax", 2, True))
    table = all_subsets(block)
    for removed in {1, experts // 2, experts - 2}:
        sets = list(combinations(range(experts), removed))
        position = [sum(1 << e for e in dropped) for dropped in sets]
        expected = enumerate_subsets(block, sets)
        np.testing.assert_allclose(table[position], expected, rtol=1e-12)
    assert table[0] == 0
    assert all(np.isinf(table[position]) for position in range(1 << experts) if position.bit_count() > experts - 2)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_experts_that_no_token_needs_cost_exactly_nothing(top_k):
    shape = make_shape(9, top_k, layers=(0,))
    block = make_blocks(shape, 400)[0]
    logits = block.logits.copy()
    logits[:, [2, 4, 5, 7]] -= 300
    stats = observe({0: Block(logits, block.outputs)}, shape)
    plan = Naee(3 / 9).plan(stats, shape)
    evidence = plan.evidence[0]
    assert evidence["loss"] == 0  # exactly
    assert [b["dropped"] for b in evidence["best"][:4]] == [[2, 4, 5], [2, 4, 7], [2, 5, 7], [4, 5, 7]]
    assert [b["loss"] for b in evidence["best"][:4]] == [0, 0, 0, 0]
    assert evidence["best"][4]["loss"] > 0


def test_equal_losses_drop_the_lexicographically_smallest_set():
    """Experts 1, 3, 4 are copies of each other: each pair of them costs the same."""
    for top_k, renormalise in ((2, True), (3, True), (2, False)):
        shape = make_shape(6, top_k, renormalise, layers=(0,))
        block = make_blocks(shape, seed=3)[0]
        source = [0, 1, 2, 1, 1, 5]
        outputs = block.outputs[:, source]
        logits = block.logits[:, source]
        logits[:, [1, 3, 4]] -= 30
        stats = observe({0: Block(logits, outputs)}, shape)
        plan = Naee(2 / 6).plan(stats, shape)
        assert plan.layers[0] == (Keep((0, 2, 4, 5)),)


def test_one_norm_and_a_sum_of_norms_can_disagree():
    """By hand: K = 1, one number a token. Dropping expert 0 moves token 0 by 3; dropping expert 1 moves tokens
    1 and 2, in different sequences, by 2 each; dropping expert 2 moves token 3 by 10.

    One norm: 3, sqrt(8), 10. Sum over two sequences: 3, 2 + 2, 10.
    """
    shape = make_shape(3, top_k=1, layers=(0,), hidden=1)
    logits = np.array([[9, 0, 5], [0, 9, 5], [0, 9, 5], [5, 0, 9]], np.float32)
    outputs = np.array([[3, 9, 0], [9, 2, 0], [9, -2, 0], [10, 9, 0]], np.float64)[:, :, None]
    stats = observe({0: Block(logits, outputs)}, shape, sequence_tokens=(2, 2))
    single = Naee(1 / 3, "single").plan(stats, shape)
    chunked = Naee(1 / 3, "chunked", chunk_sequences=1).plan(stats, shape)
    assert single.layers[0] == (Keep((0, 2)),)
    assert single.evidence[0]["loss"] == pytest.approx(8**0.5)
    assert single.evidence[0]["relative_loss"] == pytest.approx((8 / (9 + 4 + 4)) ** 0.5)
    assert chunked.layers[0] == (Keep((1, 2)),)
    assert [b["loss"] for b in chunked.evidence[0]["best"]] == pytest.approx([3, 4, 10])


@pytest.mark.parametrize(("top_k", "renormalise"), [(2, True), (2, False)])
def test_sampled_tokens_stay_in_their_sequences(top_k, renormalise):
    shape = make_shape(6, top_k, renormalise, layers=(0,))
    blocks = make_blocks(shape, TOKENS)
    sample = np.arange(0, TOKENS, 3)
    stats = observe(blocks, shape, SEQUENCES, gram_tokens=sample)
    plan = Naee(0.5, "chunked", chunk_sequences=2).plan(stats, shape)
    chunks = [[t for t in chunk if t in set(sample.tolist())] for chunk in chunks_of(2)]
    expected = brute_force(blocks[0], shape, 3, chunks)
    assert plan.evidence[0]["loss"] == pytest.approx(min(expected.values()), rel=1e-5)
    assert plan.evidence[0]["tokens"] == len(sample)


def test_logits_of_any_size_are_safe():
    for top_k, renormalise in ((2, True), (3, True), (2, False)):
        shape = make_shape(6, top_k, renormalise, layers=(0,))
        block = make_blocks(shape)[0]
        stats = observe({0: Block(block.logits * 1000, block.outputs)}, shape)
        with np.errstate(over="raise", invalid="raise", divide="raise"):
            plan = Naee(0.5).plan(stats, shape)
        assert np.isfinite(plan.evidence[0]["loss"])


def test_an_exact_search_that_would_take_days_is_refused_with_its_size():
    shape = make_shape(64, 8, layers=(0,), hidden=2)
    with pytest.raises(UserError, match=r"naee.yaml: search=exact, removing 16 of 64 .* 4.89e\+14 subsets on 3 tokens"):
        Naee(0.25, search="exact").check(shape, 3)
    stats = observe(make_blocks(shape, 3), shape)
    with pytest.raises(UserError, match="Use search=auto"):
        Naee(0.25, search="exact").plan(stats, shape)
    assert len(Naee(1 / 64, search="exact").plan(stats, shape).layers[0][0].experts) == 63
    assert len(Naee(0.25).plan(stats, shape).layers[0][0].experts) == 48


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"mode": "backwards"}, "mode=backwards is not available; available: layerwise, progressive"),
        ({"search": "random"}, "search=random is not available; available: auto, exact, greedy, branch_and_bound"),
        ({"budget": "global"}, "budget=global is not available; available: uniform, knapsack"),
        ({"mode": "progressive", "budget": "knapsack"}, "budget=knapsack compares all layers before the first"),
        ({"loss": "l1"}, "loss=l1 is not available; available: single, chunked"),
        ({"chunk_sequences": 0}, "chunk_sequences=0 is not a whole number >= 1"),
        ({"chunk_sequences": 1.5}, "chunk_sequences=1.5 is not a whole number >= 1"),
    ],
)
def test_bad_values_are_refused(keys, message):
    with pytest.raises(UserError, match=message):
        Naee(0.5, **keys)
