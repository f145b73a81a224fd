"""Pruning scores that look at outputs, neurons or weights against plain loops; what each leaves of a block."""

from math import sqrt

import numpy as np
import pytest

from espalier.errors import UserError
from espalier.methods.aimer import Aimer
from espalier.methods.camera_p import CameraP
from espalier.methods.mone import Mone
from espalier.methods.router_norm import RouterNorm
from espalier.methods.stun import Stun
from espalier.plans.operations import Keep, Merge
from stats_factory import Block, PlainExperts, make_blocks, make_shape, observe, swiglu

SHAPE = make_shape()


def route(logits, shape):
    """Return the chosen experts of one token with their weights, by sorting."""
    exponentials = [np.exp(float(value)) for value in logits]
    chosen = sorted(range(len(logits)), key=lambda e: (-exponentials[e], e))[: shape.top_k]
    total = sum(exponentials[e] for e in (chosen if shape.renormalise else range(len(logits))))
    return {e: exponentials[e] / total for e in chosen}


def run(block, shape, replaced=None, kept=None):
    """Return the block's output by tokens; `replaced` experts give vectors, of the others only neurons `kept` work."""
    inner = swiglu(block.hidden, block.gate, block.up)
    rows = []
    for t, logits in enumerate(block.logits):
        total = np.zeros(shape.hidden)
        for e, weight in route(logits, shape).items():
            neurons = range(shape.width) if kept is None else kept[e]
            output = sum(inner[t, e, n] * block.down[e, n] for n in neurons)
            total += weight * (replaced[e] if e in (replaced or {}) else output)
        rows.append(total)
    return np.array(rows)


def constants(plan, layer):
    """Return the vectors that stand for experts."""
    (operation,) = plan.layers[layer]
    return dict(zip(operation.experts, plan.tensors[operation.vectors].read(), strict=True))


def neurons(plan, layer):
    """Return the neurons that stay, by expert."""
    (operation,) = plan.layers[layer]
    return [[n for n in row if n >= 0] for row in plan.tensors[operation.neurons].read().tolist()]


@pytest.mark.parametrize("gate", ["mean", "sum"])
@pytest.mark.parametrize("renormalise", [True, False])
def test_mone_scores_equal_plain_loops_and_vectors_are_means(gate, renormalise):
    shape = make_shape(renormalise=renormalise)
    blocks = make_blocks(shape, tokens=40)
    blocks[2].logits[:, 6] = -40  # expert 6 of layer 2 is never chosen, expert 5 once
    blocks[2].logits[:, 5] = -30
    blocks[2].logits[7, 5] = 30
    plan = Mone(0.5, gate).plan(observe(blocks, shape), shape).check(shape)
    for layer, block in blocks.items():
        outputs, gates = [[[] for _ in range(8)] for _ in range(2)]
        for t, logits in enumerate(block.logits):
            for e, weight in route(logits, shape).items():
                outputs[e].append(block.outputs[t, e])
                gates[e].append(weight)
        scores, means = [], []
        for own, weights in zip(outputs, gates, strict=True):
            n = len(own)
            mean = [sum(y[d] for y in own) / n if n else 0.0 for d in range(6)]
            variance = [sum((y[d] - mean[d]) ** 2 for y in own) / (n - 1) if n > 1 else 0.0 for d in range(6)]
            weight = sum(weights) / (n if gate == "mean" else 1) if n else 0.0
            scores.append(sqrt(sum(variance)) * weight)
            means.append(mean)
        assert plan.evidence[layer]["scores"] == pytest.approx(scores, rel=1e-6, abs=1e-9)
        found = constants(plan, layer)
        assert list(found) == sorted(sorted(range(8), key=lambda e, s=scores: (s[e], -e))[:4])
        for expert, vector in found.items():
            np.testing.assert_allclose(vector, means[expert], rtol=1e-6, atol=1e-7)
    assert scores[5] == scores[6] == 0
    assert not constants(plan, 2)[6].any()


def test_mone_changes_nothing_where_outputs_are_constant():
    blocks = make_blocks(SHAPE, tokens=300)  # so many that every expert is chosen twice
    plain = {}
    for layer, block in blocks.items():
        steady = (1, 3, 4, 6) if layer else (0, 2, 5, 7)
        vectors = {e: np.full(6, e - 3.0) for e in steady}
        block.outputs[:, list(steady)] = np.stack(list(vectors.values()))
        plain[layer] = vectors
    plan = Mone(0.5).plan(observe(blocks, SHAPE), SHAPE)
    for layer, block in blocks.items():
        assert set(constants(plan, layer)) == set(plain[layer])
        np.testing.assert_allclose(
            run(block, SHAPE, constants(plan, layer)), run(block, SHAPE, plain[layer]), rtol=1e-6, atol=1e-9
        )


def test_mone_leaves_the_best_vector_of_all():
    """Of all constants the mean has the least squared error over the tokens that chose the expert."""
    blocks = make_blocks(SHAPE)
    plan = Mone(0.25).plan(observe(blocks, SHAPE), SHAPE)
    block = blocks[0]
    for expert, vector in constants(plan, 0).items():
        own = np.array(
            [y[expert] for y, logits in zip(block.outputs, block.logits, strict=True) if expert in route(logits, SHAPE)]
        )
        errors = [((own - vector - shift) ** 2).sum() for shift in np.vstack([np.zeros(6), 0.05 * np.eye(6)])]
        assert min(errors) == errors[0]


def test_mone_over_all_layers_replaces_the_lowest_and_leaves_one_in_each():
    blocks = make_blocks(make_shape(layers=(0, 1, 2)))
    blocks[1].outputs[:] *= 1e-3  # all of layer 1 score low
    shape = make_shape(layers=(0, 1, 2))
    plan = Mone(0.5, budget="global").plan(observe(blocks, shape), shape).check(shape)
    gone = {layer: constants(plan, layer) if plan.layers[layer] else {} for layer in shape.layers}
    assert len(gone[1]) == 7
    assert sum(map(len, gone.values())) == 12
    scores = {layer: plan.evidence[layer]["scores"] for layer in shape.layers}
    highest = max(scores[layer][e] for layer, own in gone.items() for e in own)
    assert all(scores[layer][e] >= highest for layer in (0, 2) for e in range(8) if e not in gone[layer])


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("scope", ["layer", "expert"])
def test_camera_keeps_the_neurons_that_plain_loops_rank_highest(scope, alpha):
    blocks = make_blocks(SHAPE, tokens=40)
    blocks[2].logits[:, 6] = -40
    plan = CameraP(0.4, scope, alpha).plan(observe(blocks, SHAPE), SHAPE, PlainExperts(blocks)).check(SHAPE)
    for layer, block in blocks.items():
        inner = swiglu(block.hidden, block.gate, block.up)
        scores = {}
        for e in range(8):
            for n in range(5):
                squares = [0.0]
                for t, logits in enumerate(block.logits):
                    squares.append((route(logits, SHAPE).get(e, 0.0) * inner[t, e, n]) ** 2)
                norm = sum(w * w for w in block.down[e, n])
                scores[e, n] = norm * ((1 - alpha) * sum(squares) + alpha * max(squares))
        ranked = sorted(scores, key=lambda key: (-scores[key], key))
        if scope == "layer":
            best = ranked[:24]  # of 40
        else:
            best = [key for e in range(8) for key in [key for key in ranked if key[0] == e][:3]]
        assert sorted((e, n) for e, own in enumerate(neurons(plan, layer)) for n in own) == sorted(best)
        lost = sum(score for key, score in scores.items() if key not in best) / sum(scores.values())
        assert plan.evidence[layer]["lost_share"] == pytest.approx(lost)


@pytest.mark.parametrize(("ratio", "kept"), [(0.025, 39), (0.3, 28), (0.51, 20), (0.975, 1)])
def test_camera_removes_the_ratio_of_a_layer_exactly(ratio, kept):
    blocks = make_blocks(SHAPE)
    plan = CameraP(ratio).plan(observe(blocks, SHAPE), SHAPE, PlainExperts(blocks)).check(SHAPE)
    for layer in SHAPE.layers:
        assert sum(map(len, neurons(plan, layer))) == kept == plan.layers[layer][0].kept
        assert max(map(len, neurons(plan, layer))) == plan.layers[layer][0].width
    assert plan.parameter_counts(SHAPE)["unique"] == SHAPE.total_parameters - 2 * (40 - kept) * 18


@pytest.mark.parametrize("scope", ["layer", "expert"])
def test_camera_changes_nothing_where_the_neurons_are_dead(scope):
    blocks = make_blocks(SHAPE)
    for block in blocks.values():
        for e in range(8):
            block.down[e, [e % 5, (e + 2) % 5]] = 0  # two of five
    blocks = {n: Block.of(b.hidden, b.router, b.gate, b.up, b.down) for n, b in blocks.items()}
    plan = CameraP(0.4, scope).plan(observe(blocks, SHAPE), SHAPE, PlainExperts(blocks))
    for layer, block in blocks.items():
        kept = neurons(plan, layer)
        assert [len(own) for own in kept] == [3] * 8
        np.testing.assert_allclose(run(block, SHAPE, kept=kept), run(block, SHAPE), rtol=1e-9)
        assert plan.evidence[layer]["lost_share"] == 0


def test_aimer_drops_the_experts_of_the_most_even_weights():
    blocks = make_blocks(SHAPE)
    even, single = 3, 5
    for part in (blocks[0].gate, blocks[0].up, blocks[0].down):
        part[even] = np.where(part[even] > 0, 0.7, -0.7)
    blocks[0].gate[single] = blocks[0].up[single] = blocks[0].down[single] = 0
    blocks[0].up[single, 2, 1] = 4.0
    blocks[2].gate[1] = blocks[2].up[1] = blocks[2].down[1] = 0
    stats = observe(blocks, SHAPE)
    plan = Aimer(0.5).plan(stats, SHAPE, PlainExperts(blocks)).check(SHAPE)
    for layer, block in blocks.items():
        expected = []
        for e in range(8):
            weights = [float(w) for part in (block.gate, block.up, block.down) for w in part[e].ravel()]
            top, bottom = sum(map(abs, weights)) / 90, sqrt(sum(w * w for w in weights) / 90)
            expected.append(top / bottom if bottom else 1.0)
        assert plan.evidence[layer]["scores"] == pytest.approx([-value for value in expected], rel=1e-6)
        assert plan.layers[layer] == (Keep(tuple(sorted(sorted(range(8), key=lambda e: expected[e])[:4]))),)
    scores = plan.evidence[0]["scores"]
    assert (scores[even], scores[single]) == pytest.approx((-1, -1 / sqrt(90)))
    assert even not in plan.layers[0][0].experts
    assert single in plan.layers[0][0].experts
    for block in blocks.values():
        block.gate[:] *= 8.0
        block.up[:] *= 8.0
        block.down[:] *= 8.0
    assert Aimer(0.5).plan(stats, SHAPE, PlainExperts(blocks)).layers == plan.layers  # scale has no part in it


def test_router_norm_keeps_the_rows_that_grew_most():
    blocks = make_blocks(SHAPE)
    grown = {0: (1, 2, 5, 7), 2: (0, 3, 4, 6)}
    base = {}
    for layer, block in blocks.items():
        rows = block.router.copy()
        for e in range(8):
            length = sqrt(sum(w * w for w in block.router[e]))
            rows[e] *= (length - (2 - 0.1 * e if e in grown[layer] else -0.1 * e)) / length
        base[layer] = Block(block.logits, block.outputs, block.hidden, rows)
    stats = observe(blocks, SHAPE)
    plan = RouterNorm(0.5, "before").plan(stats, SHAPE, PlainExperts(blocks), PlainExperts(base)).check(SHAPE)
    for layer, experts in grown.items():
        assert plan.layers[layer] == (Keep(experts),)
        expected = [2 - 0.1 * e if e in experts else -0.1 * e for e in range(8)]
        norms = np.linalg.norm(blocks[layer].router, axis=1)
        shrunk = [abs(n - d) for n, d in zip(norms, expected, strict=True)]  # a length is never negative
        assert plan.evidence[layer]["scores"] == pytest.approx((norms - shrunk).tolist(), rel=1e-5, abs=1e-5)


def test_router_norm_refuses_a_base_that_says_nothing():
    blocks = make_blocks(SHAPE)
    stats, experts = observe(blocks, SHAPE), PlainExperts(blocks)
    with pytest.raises(UserError, match=r"router_norm.yaml: base=me: its routers have the norms of this model's"):
        RouterNorm(0.5, "me").plan(stats, SHAPE, experts, experts)
    other = PlainExperts(make_blocks(make_shape(experts=6)))
    with pytest.raises(UserError, match=r"the router of layer 0 is \[6, 6\] there and \[8, 6\] here"):
        RouterNorm(0.5, "other").plan(stats, SHAPE, experts, other)


def clusters_below(distance, threshold, least):
    """Merge the closest clusters, by their farthest pair, while that lies at or below the threshold."""
    clusters = [[e] for e in range(len(distance))]
    while len(clusters) > least:
        pairs = [
            (max(distance[i][j] for i in a for j in b), a, b) for n, a in enumerate(clusters) for b in clusters[n + 1 :]
        ]
        height, a, b = min(pairs)
        if height > threshold:
            break
        clusters = sorted([*(c for c in clusters if c not in (a, b)), sorted(a + b)])
    return clusters


@pytest.mark.parametrize("ratio", [0.125, 0.375, 0.5])
@pytest.mark.parametrize(("lambda1", "lambda2"), [(1, 0), (0, 1), (1.0, 0.5)])
def test_stun_clusters_are_those_of_one_threshold_for_all_layers(lambda1, lambda2, ratio):
    shape = make_shape(8, layers=(0, 1, 3))
    blocks = make_blocks(shape, tokens=400, seed=3)
    distances = {}
    for layer, block in blocks.items():
        apart, together = np.zeros((8, 8)), np.zeros((8, 8))
        for i in range(8):
            for j in range(8):
                apart[i, j] = sqrt(sum((a - b) ** 2 for a, b in zip(block.router[i], block.router[j], strict=True)))
        for logits in block.logits:
            i, j = route(logits, shape)
            together[i, j] += 1
            together[j, i] += 1
        distances[layer] = lambda1 * apart / (apart.sum() / 56) - lambda2 * together / (together.sum() / 56)
    low, high = -100.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        found = {layer: clusters_below(distance, middle, 2) for layer, distance in distances.items()}
        low, high = (low, middle) if sum(map(len, found.values())) <= 24 - 24 * ratio else (middle, high)
    found = {layer: clusters_below(distance, high, 2) for layer, distance in distances.items()}
    method = Stun(ratio, lambda1, lambda2)
    plan = method.plan(observe(blocks, shape), shape, PlainExperts(blocks)).check(shape)
    assert {layer: plan.evidence[layer]["clusters"] for layer in shape.layers} == found
    assert method.probes == (("coactivation",) if lambda2 else ())


@pytest.mark.parametrize("kappa", [0, 3, 9])
def test_stun_leaves_the_expert_closest_to_the_mean_or_the_mean(kappa):
    blocks = make_blocks(SHAPE, seed=5)
    plan = Stun(0.625, kappa=kappa).plan(observe(blocks, SHAPE), SHAPE, PlainExperts(blocks)).check(SHAPE)
    sizes = set()
    for layer, block in blocks.items():
        kept, averaged = [], []
        for cluster in plan.evidence[layer]["clusters"]:
            sizes.add(len(cluster))
            weights = [
                np.concatenate([part[e].ravel() for part in (block.gate, block.up, block.down)]) for e in cluster
            ]
            far = [float(((w - sum(weights) / len(weights)) ** 2).sum()) for w in weights]
            if 1 < len(cluster) < kappa:
                averaged.append(tuple(cluster))
                kept += cluster
            else:
                kept.append(cluster[far.index(min(far)) if len(cluster) > 2 else 0])
        operations = plan.layers[layer]
        assert operations[0] == Keep(tuple(sorted(kept))) or len(kept) == 8
        merges = [operation for operation in operations if isinstance(operation, Merge)]
        assert len(merges) == bool(averaged)
        for merge in merges:
            ids = [tuple(sorted(kept)[e] for e in group) for group in merge.groups]
            assert [group for group in ids if len(group) > 1] == sorted(averaged)
            assert all(weight == pytest.approx(1 / len(own)) for own in merge.weights for weight in own)
            assert merge.router == "slice"
    assert max(sizes) > 2


def test_stun_meets_the_number_where_no_threshold_does():
    blocks = make_blocks(make_shape(hidden=8))
    for block in blocks.values():
        block.router[:] = np.eye(8)  # all distances are equal
    shape = make_shape(hidden=8)
    plan = Stun(0.5).plan(observe(blocks, shape), shape, PlainExperts(blocks)).check(shape)
    assert [plan.experts_after(layer, shape) for layer in shape.layers] == [2, 6]


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        (Mone(0.01), {}, r"mone.yaml: ratio=0.01 removes none of 8 experts. Use ratio >= 0.125"),
        (Mone(0.99), {}, r"mone.yaml: ratio=0.99 leaves none of 8 experts. Use ratio <= 0.875"),
        (Mone("half"), {}, r"mone.yaml: ratio=half is not a fraction in \(0, 1\) of experts"),
        (Mone(0.5), {"family": "llama4_text"}, r"mone.yaml: a constant needs a router that weighs outputs"),
        (CameraP(0.01), {}, r"camera_p.yaml: ratio=0.01 removes none of 40 neurons of a layer. Use ratio >= 0.025"),
        (CameraP(0.95, "expert"), {}, r"camera_p.yaml: ratio=0.95 leaves none of 5 neurons of an? expert. .*<= 0.8"),
        (CameraP(1.0), {}, r"camera_p.yaml: ratio=1.0 is not a fraction"),
        (CameraP(0.5), {"neuron_parameters": 0}, r"camera_p.yaml: experts of family toy cannot be narrowed"),
        (Stun(0.5), {"groups": 2, "groups_chosen": 1}, r"stun.yaml: clusters do not respect the 2 router groups"),
        (Stun(0.5, 1, 1), {"top_k": 1}, r"stun.yaml: lambda2=1, but a token chooses one expert"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_collecting(method, changes, message):
    shape = type(SHAPE).from_document(SHAPE.document() | changes)
    with pytest.raises(UserError, match=message):
        method.check(shape, 48)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CameraP(0.5, alpha=1.5), r"camera_p.yaml: alpha=1.5 is not a share in 0..1"),
        (lambda: Stun(0.5, -1), r"stun.yaml: lambda1=-1 is not a number >= 0"),
        (lambda: Stun(0.5, 0, 0), r"stun.yaml: lambda1 and lambda2 are 0"),
        (lambda: Stun(0.5, kappa=2.5), r"stun.yaml: kappa=2.5 is not a whole number >= 0"),
    ],
)
def test_bad_values_are_refused_at_once(make, message):
    with pytest.raises(UserError, match=message):
        make()
