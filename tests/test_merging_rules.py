"""How a group becomes one expert: identities, neuron matching and refitted projections against slow computations."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from espalier.errors import UserError
from espalier.methods import merge_rules
from espalier.methods.evidence import Evidence
from espalier.methods.hc_smoe import HcSmoe
from espalier.methods.kmeans import Kmeans
from espalier.methods.matching import by_weights, by_weights_and_activations, to_dominant, zipped
from espalier.methods.merge_rules import RULES, merge_by_rule
from espalier.methods.refit import refit
from stats_factory import Block, PlainExperts, make_blocks, make_shape, observe, permuted, swiglu

GROUPS = [[0, 3, 5], [1, 2], [4], [6, 7]]


def merged_expert(block, merge, tensors, number):
    """Gate, up and down [F, D] of the merged expert of group `number`, by loops."""
    group, weights = merge.groups[number], merge.weights[number]
    width = block.gate.shape[1]
    parts = [np.zeros(block.gate.shape[1:]) for _ in range(3)]
    share = np.zeros(width)
    target = np.tile(np.arange(width), (len(block.gate), 1))
    if merge.neurons is not None and len(group) > 1:
        target = tensors[merge.neurons].read()
    for expert, weight in zip(group, weights, strict=True):
        for m in range(width):
            n = target[expert][m]
            share[n] += weight
            for total, part in zip(parts, (block.gate, block.up, block.down), strict=True):
                total[n] += weight * part[expert, m]
    parts = [part / share[:, None] for part in parts]
    if merge.down is not None and len(group) > 1:
        parts[2] = tensors[merge.down].read()[[g for g in merge.groups if len(g) > 1].index(group)]
    return parts


def merged_outputs(block, merge, tensors, hidden):
    """Every expert's output [T, E, D] on `hidden` after the merge."""
    experts = [merged_expert(block, merge, tensors, number) for number in range(len(merge.groups))]
    gate, up, down = (np.stack([experts[g][part] for g in merge.expert_map()]) for part in range(3))
    return np.einsum("tef,efd->ted", swiglu(hidden, gate, up), down)


def merge_block(rule, block, shape, groups=GROUPS, layer=0, stats=None):
    stats = stats or observe({layer: block}, shape)
    evidence = Evidence(stats, shape, PlainExperts({layer: block}))
    means = block.outputs.mean(axis=0)
    square = ((means[:, None] - means[None]) ** 2).sum(axis=2)
    counts = stats.layer("usage", layer)["counts"]
    return merge_by_rule(rule, layer, groups, counts, square, "remap", evidence, "x.yaml")


def block_of(shape, tokens=200, seed=0, like=None):
    """A block; expert e equals expert like[e] in its weights."""
    block = make_blocks(replace(shape, layers=(0,)), tokens, seed)[0]
    order = list(like or range(shape.experts))
    return Block.of(block.hidden, block.router, block.gate[order], block.up[order], block.down[order])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("tokens", [200, 1])
def test_merging_equal_experts_changes_nothing(rule, tokens):
    shape = make_shape()
    block = block_of(shape, tokens, like=[0, 1, 1, 0, 4, 0, 6, 6])
    block.gate[0, 2] = block.gate[3, 2] = block.gate[5, 2] = 0  # a neuron that never does anything
    block = Block.of(block.hidden, block.router, block.gate, block.up, block.down)
    merge, tensors = merge_block(rule, block, shape)
    hidden = np.random.default_rng(9).normal(size=(30, shape.hidden))
    before = np.einsum("tef,efd->ted", swiglu(hidden, block.gate, block.up), block.down)
    np.testing.assert_allclose(merged_outputs(block, merge, tensors, hidden), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_experts_that_stay_alone_stay_as_they_are(rule):
    shape = make_shape()
    block = block_of(shape)
    merge, tensors = merge_block(rule, block, shape)
    number = merge.groups.index((4,))
    assert merge.weights[number] == (1.0,)
    for part, own in zip(merged_expert(block, merge, tensors, number), (block.gate, block.up, block.down), strict=True):
        np.testing.assert_array_equal(part, own[4])
    alone, none = merge_block(rule, block, shape, groups=[[e] for e in range(8)])
    assert none == {}
    assert alone.neurons is None
    assert alone.down is None


@pytest.mark.parametrize("rule", RULES)
def test_permuting_experts_permutes_what_the_merge_computes(rule):
    shape = make_shape()
    order = [3, 0, 7, 5, 1, 6, 2, 4]  # new expert i is the old order[i]
    block = block_of(shape)
    turned = permuted({0: block}, order)[0]
    merge, tensors = merge_block(rule, block, shape)
    groups = [[order.index(e) for e in group] for group in GROUPS]
    found = merged_outputs(turned, *merge_block(rule, turned, shape, groups), block.hidden)
    expected = merged_outputs(block, merge, tensors, block.hidden)[:, order]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_weights_are_by_frequency_or_equal(rule):
    shape = make_shape()
    block = block_of(shape)
    merge, _ = merge_block(rule, block, shape)
    chosen = np.argsort(-block.logits, axis=1)[:, :2].ravel().tolist()
    for group, weights in zip(merge.groups, merge.weights, strict=True):
        counts = [
            chosen.count(e) if rule in ("frequency", "least_squares", "routed_least_squares") else 1 for e in group
        ]
        assert weights == pytest.approx([count / sum(counts) for count in counts])


def inner_of(seed, members=3, tokens=40, width=7):
    """Inner activations of members whose neurons are related, one of them still."""
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(tokens, width))
    found = [(base[:, rng.permutation(width)] + 0.4 * rng.normal(size=base.shape)) for _ in range(members)]
    found[1][:, 3] = 0.7
    return [part.astype(np.float32) for part in found]


def correlation(a, b):
    """Pearson's, by its definition; 0 where a column does not vary."""
    a, b = a.astype(np.float64) - a.astype(np.float64).mean(), b.astype(np.float64) - b.astype(np.float64).mean()
    size = (a**2).sum() ** 0.5 * (b**2).sum() ** 0.5
    return (a * b).sum() / size if size > 1e-4 else 0.0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dominant", [0, 2])
def test_fix_dominant_takes_the_most_correlated_neuron(seed, dominant):
    inner = inner_of(seed)
    found = to_dominant(inner, dominant)
    for member, activation in enumerate(inner):
        for n in range(7):
            if member == dominant or (member, n) == (1, 3):
                assert found[member, n] == n
                continue
            related = [correlation(inner[dominant][:, m], activation[:, n]) for m in range(7)]
            assert found[member, n] == related.index(max(related))
    assert (to_dominant([part[:1] for part in inner], dominant) == np.arange(7)).all()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("members", [2, 3])
def test_zipit_joins_the_most_correlated_pair_until_enough_are_left(seed, members):
    inner = inner_of(seed, members)
    columns = [part[:, n] for part in inner for n in range(7)]
    groups = [[i] for i in range(len(columns))]
    related = {(i, j): correlation(columns[i], columns[j]) for i, j in itertools.combinations(range(len(columns)), 2)}

    def least(a, b):  # of two groups: as related as their least related members
        return min(related[min(i, j), max(i, j)] for i in a for j in b)

    while len(groups) > 7:
        a, b = max(itertools.combinations(groups, 2), key=lambda pair: least(*pair))
        groups = [g for g in groups if g not in (a, b)] + [a + b]
    found = zipped(inner).ravel()
    assert {frozenset(g) for g in groups} == {frozenset(np.flatnonzero(found == n).tolist()) for n in range(7)}
    first = [int(np.flatnonzero(found == n)[0]) for n in range(7)]
    assert first == sorted(first)


@pytest.mark.parametrize(("rule", "match"), [("fix_dominant", lambda inner: to_dominant(inner, 0)), ("zipit", zipped)])
def test_neurons_are_compared_on_the_tokens_that_chose_a_member(rule, match):
    shape = make_shape()
    block = block_of(shape, 24)
    merge, tensors = merge_block(rule, block, shape)
    chosen = np.argsort(-block.logits, axis=1)[:, :2]
    rows = [t for t in range(24) if set(chosen[t]) & {1, 2}]
    inner = swiglu(block.hidden[rows], block.gate, block.up).astype(np.float32)
    found = tensors[merge.neurons].read()[[1, 2]]  # of two the first is dominant
    np.testing.assert_array_equal(found, match([inner[:, 1], inner[:, 2]]))
    everywhere = swiglu(block.hidden, block.gate, block.up).astype(np.float32)
    assert (found != match([everywhere[:, 1], everywhere[:, 2]])).any(), "the example must tell the tokens apart"


@pytest.mark.parametrize("seed", range(3))
def test_hungarian_matching_equals_a_search_over_all_permutations(seed):
    rng = np.random.default_rng(seed)
    first, other = rng.normal(size=(2, 5, 6)).astype(np.float32)
    inner = rng.normal(size=(2, 30, 5)).astype(np.float32)

    def best(cost):
        return min(itertools.permutations(range(5)), key=lambda p: sum(cost(p[m], m) for m in range(5)))

    assert tuple(by_weights(first, other)) == best(lambda n, m: ((first[n] - other[m]) ** 2).sum())

    def cost(n, m):
        rows = first[n] / np.linalg.norm(first[n]) - other[m] / np.linalg.norm(other[m])
        a, b = inner[0][:, n], inner[1][:, m]
        return np.linalg.norm(rows) + np.linalg.norm(a / np.linalg.norm(a) - b / np.linalg.norm(b))

    assert tuple(by_weights_and_activations((first, other), (inner[0], inner[1]))) == best(cost)


@pytest.mark.parametrize("tokens", [60, 12, 4, 0])
def test_refit_equals_lstsq(tokens):
    """With its ridge as more rows; and, with next to none and more tokens than neurons, without them."""
    rng = np.random.default_rng(tokens)
    width, hidden, ridge = 9, 4, 0.05
    p, r, down = rng.normal(size=(tokens, width)), rng.normal(size=(tokens, hidden)), rng.normal(size=(width, hidden))
    strength = ridge * (p**2).sum() / max(min(tokens, width), 1)
    stacked = np.concatenate([p, np.sqrt(strength) * np.eye(width)])
    change = np.linalg.lstsq(stacked, np.concatenate([r, np.zeros((width, hidden))]))[0]
    np.testing.assert_allclose(refit(down, p, r, ridge), down + change, atol=1e-8)
    if tokens > width:
        plain = np.linalg.lstsq(p, p @ down + r)[0]
        np.testing.assert_allclose(refit(down, p, r, 1e-12), plain, atol=1e-8)
    if tokens == 0:
        np.testing.assert_array_equal(refit(down, p, r, ridge), down)


def test_least_squares_reproduces_the_members_mean_output():
    """The fitted projection against lstsq on the tokens that chose a member, all by plain arrays."""
    shape = make_shape()
    block = block_of(shape, 400)
    for rule in ("least_squares", "routed_least_squares"):
        merge, tensors = merge_block(rule, block, shape)
        plain, _ = merge_block("frequency", block, shape)
        down = tensors[merge.down].read()
        probability = np.exp(block.logits.astype(np.float64))
        chosen = np.argsort(-block.logits, axis=1)[:, :2]
        for number, group in enumerate([(0, 3, 5), (1, 2), (6, 7)]):
            rows = [t for t in range(400) if set(chosen[t]) & set(group)]
            gate, up, start = merged_expert(block, plain, {}, merge.groups.index(group))
            p = swiglu(block.hidden[rows], gate[None], up[None])[:, 0]
            g = np.array([[probability[t, e] if e in chosen[t] else 0 for e in group] for t in rows])
            g /= np.array([probability[t, chosen[t]].sum() for t in rows])[:, None]
            if rule == "least_squares":
                g = np.tile(merge.weights[merge.groups.index(group)], (len(rows), 1))
            wanted = np.einsum("te,ted->td", g, block.outputs[rows][:, group])
            p = p * g.sum(axis=1, keepdims=True)
            ridge = {"least_squares": 1e-2, "routed_least_squares": 1e-1}[rule] * (p**2).sum() / 5
            more = np.sqrt(ridge) * np.eye(5)
            expected = np.linalg.lstsq(np.concatenate([p, more]), np.concatenate([wanted, more @ start]))[0]
            np.testing.assert_allclose(down[number], expected, atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_refitting_lowers_the_error_on_held_out_tokens(seed):
    """Of the group's contribution, for tokens that the fit has not seen."""
    shape = make_shape()
    whole = block_of(shape, 1200, seed)
    seen = Block.of(whole.hidden[:800], whole.router, whole.gate, whole.up, whole.down)
    chosen = np.argsort(-whole.logits, axis=1)[800:, :2]
    gate = np.take_along_axis(np.exp(whole.logits[800:].astype(np.float64)), chosen, axis=1)
    gate /= gate.sum(axis=1, keepdims=True)

    def error(rule):
        merge, tensors = merge_block(rule, seen, shape)
        change = merged_outputs(whole, merge, tensors, whole.hidden[800:]) - whole.outputs[800:]
        return np.linalg.norm(np.einsum("tk,tkd->td", gate, np.take_along_axis(change, chosen[:, :, None], axis=1)))

    frequency, mean, routed = (error(rule) for rule in ("frequency", "least_squares", "routed_least_squares"))
    assert routed < mean < frequency


def test_the_dominant_member_is_nearest_to_the_mean():
    points = np.random.default_rng(2).normal(size=(8, 3))
    square = ((points[:, None] - points[None]) ** 2).sum(axis=2)
    for group in ([0, 3, 5], [1, 2, 4, 6, 7]):
        centre = points[group].mean(axis=0)
        assert merge_rules.dominant(square, group) == int(np.argmin(np.linalg.norm(points[group] - centre, axis=1)))
    assert merge_rules.dominant(square, [6, 2]) == 0  # of two the first


def test_zipit_refuses_what_does_not_fit_into_memory(monkeypatch):
    monkeypatch.setattr(merge_rules, "ZIP_BYTES", 4 * 12**2)
    shape = make_shape()
    blocks = make_blocks(shape)
    with pytest.raises(
        UserError, match=r"conf/method/hc_smoe.yaml: merge=zipit needs .* neurons of a group in layer 0"
    ):
        HcSmoe(0.75, merge="zipit").plan(observe(blocks, shape), shape, PlainExperts(blocks))
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"conf/method/kmeans.yaml: merge=zipit needs 4 GiB for the 2 x 17000 neurons"):
        Kmeans(0.5, merge="zipit").check(replace(shape, width=17_000), 10)


def test_routed_least_squares_needs_weights_on_the_output():
    shape = replace(make_shape(), router="sigmoid of the largest logit on the experts' input")
    for method in (HcSmoe(0.5, merge="routed_least_squares"), Kmeans(0.5, merge="routed_least_squares")):
        with pytest.raises(UserError, match="merge=routed_least_squares needs a router that weighs outputs"):
            method.check(shape, 10)
