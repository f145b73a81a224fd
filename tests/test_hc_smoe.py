"""HC-SMoE's clustering against linkage written from its definition, and its merge weights."""

import numpy as np
import pytest
from scipy.cluster.hierarchy import linkage as scipy_linkage
from scipy.spatial.distance import cdist

from espalier.collecting.stats import Stats
from espalier.errors import UserError
from espalier.methods.agglomerate import LINKAGES, cut, linkage_matrix
from espalier.methods.hc_smoe import HcSmoe
from espalier.methods.random_merge import RandomMerge
from stats_factory import make_blocks, make_shape, observe, random_stats


def cluster_distance(points, a, b, linkage):
    """The distance of two clusters (lists of rows of `points`) by definition."""
    pairs = [float(np.sqrt(((points[i] - points[j]) ** 2).sum())) for i in a for j in b]
    if linkage == "average":
        return sum(pairs) / len(pairs)
    if linkage == "single":
        return min(pairs)
    if linkage == "complete":
        return max(pairs)
    centres = points[a].mean(axis=0) - points[b].mean(axis=0)
    return float(np.sqrt(2 * len(a) * len(b) / (len(a) + len(b))) * np.linalg.norm(centres))


def plain_clustering(points, linkage):
    """All partitions from N groups to 1, and the height of each merge; the first closest pair (i, j) merges."""
    groups = [[i] for i in range(len(points))]
    partitions, heights = {len(groups): [list(g) for g in groups]}, []
    while len(groups) > 1:
        best = None
        for i in range(len(groups)):
            for j in range(i + 1, len(groups)):
                height = cluster_distance(points, groups[i], groups[j], linkage)
                if best is None or height < best[0]:
                    best = (height, i, j)
        height, i, j = best
        heights.append(height)
        groups = [sorted(g + groups[j]) if k == i else g for k, g in enumerate(groups) if k != j]
        partitions[len(groups)] = sorted(groups)
    return partitions, heights


@pytest.mark.parametrize("linkage", LINKAGES)
@pytest.mark.parametrize("seed", range(4))
def test_clusters_equal_the_definition_and_scipy(linkage, seed):
    points = np.random.default_rng(seed).normal(size=(11, 4))
    partitions, heights = plain_clustering(points, linkage)
    merges = linkage_matrix(cdist(points, points), linkage)
    np.testing.assert_allclose(merges[:, 2], heights, rtol=1e-9)
    for clusters in range(1, 12):
        assert cut(merges, clusters) == partitions[clusters]
    np.testing.assert_allclose(merges, scipy_linkage(points, linkage), rtol=1e-9)


@pytest.mark.parametrize("linkage", ["single", "complete"])
def test_ties_merge_the_lowest_ids_first(linkage):
    """On a grid most distances tie; single and complete linkage then compute without rounding."""
    for seed in range(20):
        points = np.random.default_rng(seed).integers(0, 3, size=(9, 2)).astype(np.float64)
        partitions, _ = plain_clustering(points, linkage)
        merges = linkage_matrix(cdist(points, points), linkage)
        assert all(cut(merges, clusters) == partitions[clusters] for clusters in range(1, 10))


@pytest.mark.parametrize("linkage", LINKAGES)
def test_identical_experts_still_leave_exactly_r_groups(linkage):
    merges = linkage_matrix(np.zeros((6, 6)), linkage)
    assert [len(cut(merges, clusters)) for clusters in range(1, 7)] == [1, 2, 3, 4, 5, 6]
    assert cut(merges, 4) == [[0, 1, 2], [3], [4], [5]]


def test_four_experts_by_hand():
    """Mean outputs 0, 10, 1, 14 on a line: 0 and 2 merge at 1, then 1 and 3 at 4."""
    shape = make_shape(4, hidden=1, layers=(0,))
    counts, top2 = np.array([3, 0, 1, 0]), np.array([1, 2, 3, 2])
    arrays = {
        ("mean_output", 0): {"all_tokens": np.array([[0.0], [10.0], [1.0], [14.0]])},
        ("usage", 0): {"counts": counts, "top2_counts": top2},
    }
    stats = Stats(shape, (2,), arrays)
    plan = HcSmoe(0.5).plan(stats, shape).check(shape)
    (merge,) = plan.layers[0]
    assert merge.groups == ((0, 2), (1, 3))
    assert merge.weights == ((0.75, 0.25), (0.5, 0.5))  # no token chose 1 or 3: averaged, not zero
    assert merge.router == "remap"
    assert plan.evidence[0]["cut_heights"] == [4, 11.5]
    assert plan.evidence[0]["group_counts"] == [4, 0]
    assert plan.evidence[0]["linkage"] == [[0, 2, 1, 2], [1, 3, 4, 2], [4, 5, 11.5, 4]]

    def weights(**keys):
        return HcSmoe(0.5, **keys).plan(stats, shape).layers[0][0].weights

    assert weights(freq_topk=2) == ((0.25, 0.75), (0.5, 0.5))
    assert weights(merge="average") == ((0.5, 0.5), (0.5, 0.5))


@pytest.mark.parametrize("router", ["remap", "slice", "tie"])
def test_router_goes_into_the_plan(router):
    shape = make_shape()
    plan = HcSmoe(0.25, router=router).plan(random_stats(shape), shape).check(shape)
    assert {operation.router for (operation,) in plan.layers.values()} == {router}
    assert {len(operation.groups) for (operation,) in plan.layers.values()} == {6}


def test_layers_are_clustered_by_their_own_mean_outputs():
    shape = make_shape(8, layers=(0, 1, 5))
    blocks = make_blocks(shape)
    for linkage in LINKAGES:
        plan = HcSmoe(0.5, linkage=linkage).plan(observe(blocks, shape), shape)
        for layer, block in blocks.items():
            means = np.stack([block.outputs[:, e].sum(axis=0) / len(block.outputs) for e in range(8)])
            partitions, heights = plain_clustering(means, linkage)
            assert [list(group) for group in plan.layers[layer][0].groups] == partitions[4]
            assert plan.evidence[layer]["cut_heights"] == pytest.approx(heights[3:5])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"similarity": "output"}, "similarity=output is not available; available: expert_output, routed_output"),
        ({"distance": "manhattan"}, "distance=manhattan is not available; available: euclidean, cosine"),
        ({"linkage": "centroid"}, "linkage=centroid .* available: average, single, complete, ward"),
        ({"linkage": "ward", "distance": "cosine"}, "linkage=ward needs distance=euclidean, not cosine"),
        ({"merge": "mean"}, "merge=mean is not available; available: frequency, average, fix_dominant, zipit, least_"),
        ({"budget": "local"}, "budget=local is not available; available: uniform, global, knapsack"),
        ({"global_by": "loss"}, "global_by=loss is not available; available: usage, linkage"),
        ({"freq_topk": 4}, "freq_topk=4 is not available; available: model, 2"),
        ({"router": "drop"}, "router=drop is not available; available: remap, slice, tie"),
    ],
)
def test_bad_values_are_refused(keys, message):
    with pytest.raises(UserError, match=f"conf/method/hc_smoe.yaml: {message}"):
        HcSmoe(0.5, **keys)


@pytest.mark.parametrize(("ratio", "sizes"), [(0.5, {2: 8}), (0.25, {2: 4, 1: 8}), (0.625, {3: 4, 2: 2})])
def test_random_groups_are_of_equal_sizes_where_possible(ratio, sizes):
    shape = make_shape(16, layers=(0, 1))
    blocks = make_blocks(shape, tokens=400)
    plan = RandomMerge(ratio, seed=3).plan(observe(blocks, shape), shape).check(shape)
    for layer, (merge,) in plan.layers.items():
        lengths = [len(group) for group in merge.groups]
        assert {length: lengths.count(length) for length in lengths} == sizes
        counts = observe(blocks, shape).layer("usage", layer)["counts"]
        for group, weights in zip(merge.groups, merge.weights, strict=True):
            total = sum(int(counts[e]) for e in group)
            shares = [int(counts[e]) / total for e in group] if total else [1 / len(group)] * len(group)
            assert weights == pytest.approx(shares)
    assert plan.layers[0][0].groups != plan.layers[1][0].groups
