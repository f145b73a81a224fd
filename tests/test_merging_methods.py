"""K-means, M-SMoE, Sub-MoE and REAM against slow computations and by their properties."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from espalier.errors import UserError
from espalier.methods.kmeans import Kmeans
from espalier.methods.lloyd import kmeans, split
from espalier.methods.m_smoe import MSmoe
from espalier.methods.ream import Ream, pseudo_groups
from espalier.methods.sub_moe import SubMoe, together
from espalier.models.experts import ExpertWeights
from plain_block import PlainBlock
from stats_factory import PlainExperts, make_blocks, make_shape, observe, permuted, random_stats


def cost(points, groups):
    return sum(((points[g] - points[g].mean(axis=0)) ** 2).sum() for g in groups)


@pytest.mark.parametrize("seed", range(4))
def test_kmeans_ends_where_no_point_is_nearer_to_another_centre(seed):
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(20, 3)) + 4 * rng.integers(0, 3, size=(20, 1))
    groups = kmeans(points, 5, [seed])
    assert sorted(e for group in groups for e in group) == list(range(20))
    centres = np.stack([points[group].mean(axis=0) for group in groups])
    for number, group in enumerate(groups):
        for e in group:
            assert np.argmin(((points[e] - centres) ** 2).sum(axis=1)) == number
    assert groups == kmeans(points, 5, [seed])


def test_a_fixed_start_is_lloyds_algorithm_from_there():
    rng = np.random.default_rng(3)
    points = rng.normal(size=(18, 2))
    start = np.array([4, 11, 2, 7])
    centres = points[start]
    for _ in range(100):
        label = np.argmin(((points[:, None] - centres[None]) ** 2).sum(axis=2), axis=1)
        centres = np.stack([points[label == n].mean(axis=0) for n in range(4)])
    expected = sorted(np.flatnonzero(label == n).tolist() for n in range(4))
    assert kmeans(points, 4, start) == expected


def test_no_cluster_is_empty_even_among_equal_experts():
    for seed in range(3):
        assert [len(kmeans(np.ones((6, 2)), n, [seed])) for n in range(1, 7)] == [1, 2, 3, 4, 5, 6]
    assert kmeans(np.ones((6, 2)), 4, np.arange(4)) == [[0], [1], [2], [3, 4, 5]]
    line = np.array([[0.0], [1.0], [5.0], [20.0]])
    assert split([[0, 1, 2], [3]], line, 3) == [[0, 1], [2], [3]]
    assert split([[0, 1, 2, 3]], line, 2) == [[0, 1, 2], [3]]


def test_kmeans_merges_the_clusters_of_the_mean_outputs():
    shape = make_shape(layers=(0, 2))
    blocks = make_blocks(shape)
    for keys in ({}, {"init": "fixed"}, {"distance": "cosine"}, {"similarity": "router_logits", "init": "fixed"}):
        plan = Kmeans(0.5, **keys).plan(observe(blocks, shape), shape).check(shape)
        for layer, block in blocks.items():
            (merge,) = plan.layers[layer]
            points = block.logits.T.astype(np.float64) if "similarity" in keys else block.outputs.mean(axis=0)
            if "distance" in keys:
                points = points / np.linalg.norm(points, axis=1, keepdims=True)
            groups = [list(group) for group in merge.groups]
            assert plan.evidence[layer]["inertia"] == pytest.approx(cost(points, groups))
            for a, b in itertools.permutations(groups, 2):  # moving one expert never helps by more than its own move
                centre_a, centre_b = points[a].mean(axis=0), points[b].mean(axis=0)
                for e in a:
                    assert ((points[e] - centre_a) ** 2).sum() <= ((points[e] - centre_b) ** 2).sum() + 1e-9
    with pytest.raises(UserError, match=r"kmeans.yaml: init=random is not available; available: kmeans\+\+, fixed"):
        Kmeans(0.5, init="random")


def test_a_fixed_start_permutes_with_the_experts():
    shape = make_shape()
    order = [3, 0, 7, 5, 1, 6, 2, 4]
    blocks = make_blocks(shape, tokens=200)
    before, after = (
        Kmeans(0.5, init="fixed").plan(observe(given, shape), shape) for given in (blocks, permuted(blocks, order))
    )
    for layer in shape.layers:
        groups = {frozenset(order[e] for e in group) for group in after.layers[layer][0].groups}
        assert groups == {frozenset(group) for group in before.layers[layer][0].groups}


@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_m_smoe_joins_each_expert_to_the_dominant_one_of_most_similar_logits(ratio):
    shape = make_shape(10, layers=(0, 1, 4))
    blocks = make_blocks(shape, tokens=150, seed=2)
    blocks[1].logits[:, 3] += 3  # one expert gets most tokens: this layer needs fewer
    stats = observe(blocks, shape)
    plan = MSmoe(ratio).plan(stats, shape).check(shape)
    counts = {layer: stats.layer("usage", layer)["counts"].tolist() for layer in shape.layers}
    always = {(layer, e) for layer in shape.layers for e in sorted(range(10), key=lambda e: (-counts[layer][e], e))[:2]}
    others = sorted(
        ((layer, e) for layer in shape.layers for e in range(10) if (layer, e) not in always),
        key=lambda pair: (-counts[pair[0]][pair[1]], pair),
    )
    dominant = always | set(others[: 3 * (10 - round(10 * ratio)) - 6])
    assert len({plan.experts_after(layer, shape) for layer in shape.layers}) > 1
    for layer, block in blocks.items():
        leaders = sorted(e for number, e in dominant if number == layer)
        (merge,) = plan.layers[layer]
        columns = block.logits.astype(np.float64).T
        for e in range(10):
            cosine = {
                d: columns[e] @ columns[d] / np.linalg.norm(columns[e]) / np.linalg.norm(columns[d]) for d in leaders
            }
            leader = e if e in leaders else max(leaders, key=lambda d, c=cosine: c[d])
            group = next(g for g in merge.groups if e in g)
            assert leader in group
            total = sum(counts[layer][m] for m in group)
            assert merge.weights[merge.groups.index(group)][group.index(e)] == pytest.approx(counts[layer][e] / total)
        assert plan.evidence[layer]["dominant"] == [next(d for d in leaders if d in group) for group in merge.groups]


def test_m_smoe_undoes_a_permutation_of_neurons():
    """Experts that are each other's with neurons in another order merge into just that expert."""
    shape = make_shape(layers=(0,))
    block = make_blocks(shape, tokens=200)[0]
    turns = np.stack([np.random.default_rng(e).permutation(5) for e in range(8)])
    for part in (block.gate, block.up, block.down):
        part[:] = np.stack([part[0][turns[e]] for e in range(8)])
    stats = observe({0: block}, shape)
    plan = MSmoe(0.5, permute="weights").plan(stats, shape, PlainExperts({0: block})).check(shape)
    (merge,) = plan.layers[0]
    targets = plan.tensors[merge.neurons].read()
    for group, leader in zip(merge.groups, plan.evidence[0]["dominant"], strict=True):
        for e in group:
            assert sorted(targets[e]) == list(range(5))
            np.testing.assert_array_equal(block.gate[leader][targets[e]], block.gate[e])
    assert MSmoe(0.5).plan(stats, shape).layers[0][0].neurons is None


def test_sub_moes_merge_is_the_frequency_weighted_mean():
    """Its decomposition of [W_1 .. W_n] with a weighted mean of the right factors, without truncation."""
    rng = np.random.default_rng(0)
    matrices, shares = rng.normal(size=(3, 7, 5)), np.array([0.5, 0.2, 0.3])
    u, s, v = np.linalg.svd(np.concatenate(matrices, axis=1), full_matrices=False)  # [7, 7], [7], [7, 15]
    mean = sum(f * v[:, 5 * i : 5 * i + 5] for i, f in enumerate(shares))
    np.testing.assert_allclose(u * s @ mean, np.einsum("i,iod->od", shares, matrices), atol=1e-12)


@pytest.mark.parametrize("clusters", [3, 5, 7])
@pytest.mark.parametrize("seed", range(4))
def test_sub_moe_shares_a_number_between_two_layers(clusters, seed):
    rng = np.random.default_rng(seed)
    mixed = [rng.normal(size=(8, 4)) for _ in range(2)]
    apart = [rng.normal(size=(8, 4)) + 50 * layer for layer in range(2)]
    for points in (mixed, apart, [np.ones((8, 4)), rng.normal(size=(8, 4))], mixed[:1]):
        found = together(points, clusters, 2, [seed])
        assert sum(map(len, found)) == clusters * len(points)
        for groups in found:
            assert sorted(e for group in groups for e in group) == list(range(8))
            assert len(groups) >= 2
    tight = [0.01 * rng.normal(size=(8, 4)), 50 + rng.normal(size=(8, 4))]
    assert len(together(tight, 4, 2, [seed])[0]) <= 3  # one layer's experts are alike: it keeps fewer


def test_sub_moe_takes_layers_by_twos():
    shape = make_shape(8, layers=(0, 2, 3))
    stats = random_stats(shape, tokens=80)
    plan = SubMoe(0.5).plan(stats, shape).check(shape)
    left = [plan.experts_after(layer, shape) for layer in shape.layers]
    assert left[0] + left[1] == 8
    assert left[2] == 4
    assert plan.layers[0] == SubMoe(0.5).plan(stats, replace(shape, layers=(0, 2))).layers[0]
    stats.layer("mean_output", 2)["all_tokens"][1::2] *= 50  # lengths are no matter
    assert SubMoe(0.5).plan(stats, shape).layers == plan.layers


def test_ream_groups_by_falling_saliency():
    saliency = np.array([1.0, 9.0, 2.0, 8.0, 3.0, 4.0, 5.0])
    apart = np.abs(np.subtract.outer(np.arange(7.0), np.arange(7.0)))
    assert pseudo_groups(saliency, apart, 3, 3, 1) == [[1, 0, 2], [3, 4, 5], [6]]
    assert pseudo_groups(saliency, apart, 3, 16, 1) == [[1, 0, 2, 4, 5], [3], [6]]
    assert pseudo_groups(np.ones(4), np.zeros((4, 4)), 2, 16, 1) == [[0, 2, 3], [1]]
    assert pseudo_groups(np.arange(8.0), np.zeros((8, 8)), 2, 3, 2) == [
        [7, 0, 1],
        [3, 2, 4],
    ]  # one of each router group


@pytest.mark.parametrize("router", ["slice", "remap"])
def test_ream_by_plain_loops(router):
    shape = make_shape()
    blocks = make_blocks(shape, tokens=120, seed=5)
    blocks[2].logits[:, 6] = -40  # never chosen: saliency is that of the least salient
    stats = observe(blocks, shape)
    plan = Ream(0.5, group_size=3, router=router).plan(stats, shape, PlainExperts(blocks)).check(shape)
    for layer, block in blocks.items():
        chosen = np.argsort(-block.logits, axis=1, kind="stable")[:, :2]
        gate = np.zeros((120, 8))
        for t, (a, b) in enumerate(chosen):
            weights = np.exp(block.logits[t, [a, b]].astype(np.float64))
            gate[t, [a, b]] = weights / weights.sum()
        rows = [np.flatnonzero((chosen == e).any(axis=1)) for e in range(8)]
        norm = np.linalg.norm(block.outputs, axis=2)
        saliency = [np.mean(gate[r, e] * norm[r, e]) if len(r) else np.inf for e, r in enumerate(rows)]
        saliency = [min(0.5, min(saliency)) if s == np.inf else s for s in saliency]
        assert plan.evidence[layer]["saliency"] == pytest.approx(saliency)
        added = [(gate[:, e, None] * block.outputs[:, e]).sum(axis=0) for e in range(8)]
        columns = [c / np.linalg.norm(c) for c in block.logits.astype(np.float64).T]
        logits = np.array([[np.linalg.norm(a - b) for a in columns] for b in columns])

        def similar(e, f, added=added, logits=logits):
            sizes = np.linalg.norm(added[e]) * np.linalg.norm(added[f])
            cosine = added[e] @ added[f] / sizes if sizes else 0.0
            return ((cosine + 1) / 2 + 1 - logits[e, f] / logits.max()) / 2

        ranked = sorted(range(8), key=lambda e: -saliency[e])
        free, expected = set(ranked[4:]), {}
        for centroid in ranked[:4]:
            taken = sorted(free, key=lambda e: -similar(centroid, e))[:2]
            expected[centroid] = {centroid, *taken}
            free -= set(taken)
        (merge,) = plan.layers[layer]
        assert {frozenset(g) for g in merge.groups} == {frozenset(g) for g in expected.values()}
        for group, weights, centroid in zip(
            merge.groups, merge.weights, plan.evidence[layer]["centroids"], strict=True
        ):
            assert set(group) == expected[centroid]
            assert weights == pytest.approx([saliency[e] / sum(saliency[m] for m in group) for e in group])
        assert merge.rows == (tuple(plan.evidence[layer]["centroids"]) if router == "slice" else None)
        targets = plan.tensors[merge.neurons].read()
        for group, centroid in zip(merge.groups, plan.evidence[layer]["centroids"], strict=True):
            assert targets[centroid].tolist() == list(range(5))
            assert all(sorted(targets[e]) == list(range(5)) for e in group)


def test_ream_refuses_groups_that_cannot_hold_all():
    shape = make_shape()
    with pytest.raises(UserError, match=r"2 groups of at most group_size=3 cannot hold 8 experts\. Use group_size >="):
        Ream(0.75, group_size=3).plan(random_stats(shape), shape)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "granitemoe"])
def test_a_merged_block_of_a_checkpoint_runs_averaged_tensors(family, tiny_model):
    """Layouts, biases and folded gates: against the tensors on disk."""
    source = tiny_model(family)
    hidden = torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
    block = ExpertWeights(source).block(2).merged([1, 4, 6], [0.5, 0.2, 0.3])
    plain = PlainBlock(source, 2)
    expert = [0.5 * a + 0.2 * b + 0.3 * c for a, b, c in zip(*(plain.experts[e] for e in (1, 4, 6)), strict=True)]
    for t, token in enumerate(hidden):
        torch.testing.assert_close(block.inner(0, hidden)[t].double(), plain.inner(expert, token), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(block.output(0, hidden)[t].double(), plain.run(expert, token), rtol=1e-4, atol=1e-5)
