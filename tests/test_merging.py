"""What merging methods compare and how many clusters they leave, against explicit vectors and exhaustive search."""

import itertools

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from espalier.methods import cluster_budget, similarity
from espalier.methods.agglomerate import LINKAGES, cut, linkage_matrix
from espalier.methods.hc_smoe import HcSmoe
from espalier.methods.similarity import DISTANCES, SIMILARITIES, distances, gram_distances, squares, vectors
from stats_factory import Block, PlainExperts, make_blocks, make_shape, observe


def explicit_vectors(kind, block, shape):
    """The vectors that a similarity compares, one row an expert, from the block itself."""
    if kind == "expert_output":
        return block.outputs.sum(axis=0) / len(block.outputs)
    if kind == "router_logits":
        return block.logits.astype(np.float64).T
    if kind == "weight":
        return np.stack([np.concatenate([p[e].ravel() for p in (block.gate, block.up, block.down)]) for e in range(8)])
    chosen = np.argsort(-block.logits, axis=1, kind="stable")[:, : shape.top_k]
    rows = [[block.outputs[t, e] for t in range(len(chosen)) if e in chosen[t]] for e in range(8)]
    return np.stack([np.mean(row, axis=0) if row else np.zeros(shape.hidden) for row in rows])


def with_unused_expert(blocks, expert=6):
    for block in blocks.values():
        block.logits[:, expert] = -40
    return blocks


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("kind", SIMILARITIES)
def test_distances_are_those_of_the_explicit_vectors(kind, distance, monkeypatch):
    monkeypatch.setattr(similarity, "WEIGHT_BYTES", 8 * 8 * 3 * 6 * 2)  # two neurons a pass: three passes for five
    shape = make_shape()
    blocks = with_unused_expert(make_blocks(shape)) if kind == "routed_output" else make_blocks(shape)
    stats = observe(blocks, shape)
    for layer, block in blocks.items():
        rows = explicit_vectors(kind, block, shape)
        given = distances(kind, distance, layer, stats, shape, PlainExperts(blocks))
        if distance == "euclidean":
            expected = cdist(rows, rows)
        else:
            expected = np.ones((8, 8))  # a vector of zeros has no angle
            for i, j in itertools.product(range(8), repeat=2):
                if rows[i].any() and rows[j].any():
                    expected[i, j] = 1 - rows[i] @ rows[j] / (np.linalg.norm(rows[i]) * np.linalg.norm(rows[j]))
            np.fill_diagonal(expected, 0)
        np.testing.assert_allclose(given, expected, rtol=1e-6, atol=1e-7)
        assert (given == given.T).all()
        points = vectors(kind, distance, layer, stats, shape, PlainExperts(blocks))
        if kind != "routed_output" or distance == "euclidean":
            np.testing.assert_allclose(cdist(points, points) ** 2, squares(given, distance), rtol=1e-5, atol=1e-6)


def test_only_the_asked_for_statistics_are_needed():
    shape = make_shape()
    stats = observe(make_blocks(shape), shape)
    for kind, probes in SIMILARITIES.items():
        method = HcSmoe(0.5, similarity=kind)
        assert set(method.probes) == {*probes, "usage"}
        assert method.reads_weights is (kind == "weight")
        kept = {key: value for key, value in stats.arrays.items() if key[0] in method.probes}
        method.plan(type(stats)(shape, stats.sequence_tokens, kept), shape, PlainExperts(make_blocks(shape)))
    assert HcSmoe(0.5, merge="least_squares").probes == ("mean_output", "usage", "inputs")
    assert HcSmoe(0.5, merge="zipit").reads_weights is True


@pytest.mark.parametrize("distance", DISTANCES)
def test_equal_vectors_are_at_distance_zero_by_their_inner_products(distance):
    """Products of equal rows that are summed in another order differ in their last bits."""
    rows = np.random.default_rng(0).normal(size=(5, 40))
    rows[3] = rows[1]
    products = rows @ rows.T
    products[1, 3] = products[3, 1] = products[1, 1] * (1 - 3e-16)
    products[3, 3] = products[1, 1] * (1 + 3e-16)
    found = gram_distances(products, distance)
    assert found[1, 3] == 0
    assert (found[np.triu_indices(5, 1)] == 0).sum() == 1


def test_a_clustering_takes_any_distances():
    """Cosine distances, average linkage, by definition."""
    rows = np.random.default_rng(1).normal(size=(9, 4))
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    apart = 1 - unit @ unit.T
    merges = linkage_matrix(apart, "average")
    groups = [[i] for i in range(9)]
    while len(groups) > 4:
        i, j = min(
            itertools.combinations(range(len(groups)), 2),
            key=lambda pair: np.mean([apart[a, b] for a in groups[pair[0]] for b in groups[pair[1]]]),
        )
        groups = [g for n, g in enumerate(groups) if n not in (i, j)] + [groups[i] + groups[j]]
    assert cut(merges, 4) == sorted(sorted(group) for group in groups)


def layers_of(seed, layers=3, experts=7):
    """Points, counts and linkage of some layers on different scales."""
    rng = np.random.default_rng(seed)
    points = {layer: rng.normal(size=(experts, 3)) * 2.0**layer for layer in range(layers)}
    counts = {layer: rng.integers(0, 30, experts) * (rng.random(experts) < 0.7) for layer in range(layers)}
    merges = {layer: linkage_matrix(cdist(rows, rows), "average") for layer, rows in points.items()}
    return points, counts, merges


def within(points, counts, groups):
    """Squared distances to the weighted means of the groups, weighted, by definition."""
    loss = 0.0
    for group in groups:
        total = sum(counts[e] for e in group)
        if total:
            mean = sum(counts[e] * points[e] for e in group) / total
            loss += sum(counts[e] * ((points[e] - mean) ** 2).sum() for e in group)
    return loss


@pytest.mark.parametrize("seed", range(3))
def test_the_loss_curve_equals_the_definition_at_every_number_of_clusters(seed):
    points, counts, merges = layers_of(seed)
    for layer, rows in points.items():
        curve = cluster_budget.loss_curve(merges[layer], cdist(rows, rows) ** 2, counts[layer])
        unused = cluster_budget.loss_curve(merges[layer], cdist(rows, rows) ** 2, np.zeros(7, np.int64))
        assert unused.tolist() == [np.inf, *[0] * 7]
        assert curve[0] == np.inf
        expected = [within(rows, counts[layer], cut(merges[layer], n)) for n in range(1, 8)]
        np.testing.assert_allclose(curve[1:], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("total", [6, 9, 13, 18, 21])
def test_budgets_equal_a_search_over_all_numbers_of_clusters(seed, total):
    shape = make_shape(7, layers=(0, 1, 2))
    points, counts, merges = layers_of(seed)
    choices = [n for n in itertools.product(range(2, 8), repeat=3) if sum(n) == total]

    curves = {n: cluster_budget.loss_curve(merges[n], cdist(points[n], points[n]) ** 2, counts[n]) for n in points}
    found = cluster_budget.by_loss(curves, shape, total)
    assert sum(found.values()) == total
    best = min(sum(curves[n][k] for n, k in enumerate(choice)) for choice in choices)
    assert sum(curves[n][k] for n, k in found.items()) == pytest.approx(best)

    def done(choice):
        """The heights of all merges that a choice does: the fewest that are not the lowest, in order."""
        return sorted(height for n, k in enumerate(choice) for height in merges[n][: 7 - k, 2])

    found = cluster_budget.by_linkage(merges, shape, total)
    assert sum(found.values()) == total
    assert done(tuple(found.values())) == pytest.approx(min(map(done, choices)))

    found = cluster_budget.by_usage(counts, shape, total)
    assert sum(found.values()) == total
    assert min(found.values()) >= 2
    ranked = sorted((-c, n) for n in counts for c in sorted(counts[n], reverse=True)[2:])[: total - 6]
    assert found == {n: 2 + sum(layer == n for _, layer in ranked) for n in counts}


@pytest.mark.parametrize("linkage", LINKAGES)
@pytest.mark.parametrize(
    "keys", [{"budget": "global"}, {"budget": "global", "global_by": "linkage"}, {"budget": "knapsack"}]
)
@pytest.mark.parametrize("ratio", [0.125, 0.5, 0.75])
def test_every_budget_leaves_as_many_as_the_uniform_one(ratio, keys, linkage):
    shape = make_shape(layers=(0, 2, 5))
    blocks = make_blocks(shape)
    block = blocks[5]
    blocks[5] = Block.of(block.hidden, block.router, block.gate, block.up, 1e-3 * block.down)  # cheap to merge
    plan = HcSmoe(ratio, linkage=linkage, **keys).plan(observe(blocks, shape), shape).check(shape)
    left = {layer: plan.experts_after(layer, shape) for layer in shape.layers}
    assert sum(left.values()) == 3 * (8 - round(8 * ratio))
    assert min(left.values()) >= 2
    if keys != {"budget": "global"} and ratio == 0.5:
        assert left[5] == 2
        assert plan.evidence[5]["cut_heights"] == [plan.evidence[5]["linkage"][n][2] for n in (5, 6)]


def test_router_groups_are_no_matter_for_remap():
    shape = make_shape(layers=(0,))
    grouped = type(shape).from_document(shape.document() | {"groups": 2, "groups_chosen": 1})
    stats = observe(make_blocks(shape), shape)
    for keys in ({}, {"budget": "knapsack"}, {"budget": "global"}):
        plan = HcSmoe(0.5, **keys).plan(stats, grouped).check(grouped)
        assert plan.experts_after(0, grouped) == 4
