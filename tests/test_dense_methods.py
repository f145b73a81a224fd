"""Methods that split the FFNs of dense models: budgets, determinism, permutations; slow computations beside them."""

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from dense_models import HIDDEN, LAYERS, save_dense
from espalier import conf
from espalier.checkpoints.checkpoint import Checkpoint
from espalier.collecting.collect import collect_checkpoint
from espalier.collecting.stats import Stats
from espalier.errors import UserError
from espalier.methods import build, check, is_for_dense, make_plan
from espalier.methods.partition import balanced_assignment, balanced_kmeans
from espalier.models import runtime
from espalier.models.ffn_weights import FFNWeights
from espalier.models.running import Running
from espalier.plans.plan import Plan
from espalier.probes import DENSE_PROBES
from espalier.surgery.apply import apply
from stats_factory import make_shape
from tiny import VOCABULARY

pytestmark = pytest.mark.usefixtures("proof_here")

WIDTH = 64
CONFIGS = {
    name: config
    for name in conf.names("method")
    if name not in ("none", "threshold", "tomoe")  # which follow another, or learn: tests of their own
    and is_for_dense(build(config := conf.load("method", name)))
}
SMALL = {"random_blocks": {"blocks": 8}, "moefication": {"blocks": 8, "epochs": 3}, "cmoe": {"blocks": 8, "shared": 2}}
SIZED = [name for name, config in CONFIGS.items() if "ratio" in config]
IDS = np.random.default_rng(0).integers(3, VOCABULARY - 1, (6, 24))
MASK = np.ones_like(IDS)
MASK[1, 20:] = MASK[4, :3] = 0
RUNNING = Running.of(device="cpu", stream="never", collect_batch_size=4)

every_method = pytest.mark.parametrize("name", CONFIGS)


def make(name, **keys):
    return build(CONFIGS[name] | SMALL.get(name, {}) | keys)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    @cache
    def model(family):
        return save_dense(family, tmp_path_factory.mktemp(family) / "model", intermediate_size=WIDTH)

    return model


@pytest.fixture(scope="module")
def evidence(models):
    @cache
    def collected(family):
        return collect_checkpoint(models(family), "float32", RUNNING, IDS, MASK, tuple(DENSE_PROBES))

    return collected


@pytest.fixture(scope="module")
def plan_of(models, evidence):
    def plan(name, family="llama", **keys):
        shape = Checkpoint(models(family)).dense_shape()
        method = make(name, **keys)
        check(method, shape, None)
        return make_plan(method, evidence(family), shape, models(family))

    return plan


def written(plan):
    """A plan as JSON, with the values of its tensors."""
    values = {name: tensor.read().tolist() for name, tensor in plan.tensors.items()}
    return json.dumps([plan.document(), values], allow_nan=False)


# What is observed


def test_probes_are_what_a_plain_forward_says(models, evidence):
    model, stats = runtime.load(models("phi")), evidence("phi")
    seen: dict[int, list] = {layer: [[], []] for layer in range(LAYERS)}
    for layer, part in enumerate(model.model.layers):
        part.mlp.register_forward_hook(lambda m, a, o, layer=layer: seen[layer][0].append(a[0]))
        part.mlp.fc2.register_forward_hook(lambda m, a, o, layer=layer: seen[layer][1].append(a[0]))
    with torch.no_grad():
        for row, mask in zip(IDS, MASK, strict=True):
            model(input_ids=torch.tensor(row)[None], attention_mask=torch.tensor(mask)[None])
    for layer, (inputs, inner) in seen.items():
        kept = [value[0, np.flatnonzero(mask)] for value, mask in zip(inputs, MASK, strict=True)]
        active = torch.cat([value[0, np.flatnonzero(mask)] for value, mask in zip(inner, MASK, strict=True)]).double()
        np.testing.assert_allclose(stats.layer("ffn_inputs", layer)["hidden"], torch.cat(kept).numpy(), atol=2e-5)
        found = stats.layer("ffn_energy", layer)
        np.testing.assert_allclose(found["square_sum"], [float((column**2).sum()) for column in active.T], rtol=1e-4)
        np.testing.assert_allclose(found["absolute_sum"], [float(column.abs().sum()) for column in active.T], rtol=1e-4)
    assert stats.tokens == MASK.sum() == len(stats.layer("ffn_inputs", 0)["token"])


@pytest.mark.parametrize("family", ["llama", "phi", "gemma2"])
def test_streamed_and_sharded_statistics_are_the_same(family, models, evidence, tmp_path):
    from espalier.collecting.reduce import reduce

    streamed = replace(RUNNING, stream="always")
    probes, whole = tuple(DENSE_PROBES), evidence(family)
    found = collect_checkpoint(models(family), "float32", streamed, IDS, MASK, probes, state=tmp_path / "state")
    parts = [collect_checkpoint(models(family), "float32", RUNNING, IDS, MASK, probes, shard=(n, 2)) for n in range(2)]
    for stats in (found, reduce(parts)):
        assert stats.sequence_tokens == whole.sequence_tokens
        for key, arrays in whole.arrays.items():
            for name, array in arrays.items():
                np.testing.assert_allclose(stats.arrays[key][name], array, rtol=1e-4, atol=1e-5)


def test_statistics_survive_their_file(evidence, tmp_path):
    stats = evidence("llama")
    stats.save(tmp_path / "stats.safetensors")
    loaded = Stats.load(tmp_path / "stats.safetensors")
    assert loaded.shape == stats.shape
    assert np.array_equal(loaded.layer("ffn_energy", 1)["square_sum"], stats.layer("ffn_energy", 1)["square_sum"])


@pytest.mark.parametrize("family", ["llama", "phi", "gemma2"])
def test_weights_compute_what_the_model_does(family, models):
    model, ffns = runtime.load(models(family)), FFNWeights(models(family))
    x = torch.randn(5, HIDDEN)
    for layer in range(LAYERS):
        ffn = ffns.layer(layer)
        bias = 0 if ffn.down_bias is None else ffn.down_bias
        with torch.no_grad():
            expected = model.model.layers[layer].mlp(x)
        torch.testing.assert_close(ffn.inner(x) @ ffn.down.T + bias, expected, rtol=1e-5, atol=1e-6)


# Every method


@every_method
@pytest.mark.parametrize("family", ["llama", "phi"])
def test_it_is_applied_and_proven(name, family, models, plan_of, tmp_path):
    report = apply(models(family), plan_of(name, family), tmp_path / "out")
    assert "max_abs_diff" in report["proof"]


@every_method
def test_plan_is_deterministic_and_says_what_it_was_made_with(name, plan_of):
    plan = plan_of(name)
    assert written(plan) == written(plan_of(name))
    given = CONFIGS[name] | SMALL.get(name, {})
    assert plan.method == {key: value for key, value in given.items() if key != "_target_"}
    assert Plan.from_document(json.loads(json.dumps(plan.document()))).document() == plan.document()


@pytest.mark.parametrize("name", SIZED)
@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_ratio_is_the_fraction_that_a_token_leaves_out(name, ratio, plan_of):
    keys = {"blocks": 8} if name == "factor_llm" else {}
    for operations in plan_of(name, ratio=ratio, **keys).layers.values():
        assert operations[0].widest == round(WIDTH * (1 - ratio))


@pytest.mark.parametrize("name", SIZED)
@pytest.mark.parametrize("ratio", [0, 1, 1.5, "half", True])
def test_bad_ratio_is_refused(name, ratio, plan_of):
    with pytest.raises(UserError, match=f"conf/method/{name}.yaml: ratio={ratio} is not a fraction in"):
        plan_of(name, ratio=ratio)


@pytest.mark.parametrize("name", [name for name, config in CONFIGS.items() if "blocks" in config])
def test_blocks_that_do_not_divide_are_refused(name, plan_of):
    with pytest.raises(
        UserError, match=rf"conf/method/{name}.yaml: blocks=7 does not divide 64 neurons.*blocks=2, 4, 8, 16"
    ):
        plan_of(name, blocks=7)


@pytest.mark.parametrize("name", [name for name, config in CONFIGS.items() if "seed" in config])
def test_the_seed_decides_and_layers_draw_apart(name, plan_of):
    assert written(plan_of(name, seed=1)) != written(plan_of(name))
    with pytest.raises(UserError, match="seed=-1 is not a whole number >= 0"):
        plan_of(name, seed=-1)


@every_method
def test_it_is_for_dense_models(name):
    with pytest.raises(UserError, match=rf"{name}.yaml: splits the feed-forward networks .* toy has experts"):
        check(make(name), make_shape(), None)


def test_methods_for_experts_are_refused(models):
    with pytest.raises(UserError, match=r"reap.yaml: changes the experts .* llama is a dense model without experts"):
        check(build(conf.load("method", "reap")), Checkpoint(models("llama")).dense_shape(), None)


@pytest.mark.parametrize("name", ["static", "oracle"])
def test_permuting_neurons_changes_nothing_that_is_computed(name, models, plan_of, tmp_path):
    """A model with its neurons in another order is the same model; so must be what is left of it."""
    order = np.random.default_rng(3).permutation(WIDTH)
    source = models("llama")
    model = runtime.load(source)
    with torch.no_grad():
        for part in model.model.layers:
            part.mlp.gate_proj.weight.copy_(part.mlp.gate_proj.weight[order])
            part.mlp.up_proj.weight.copy_(part.mlp.up_proj.weight[order])
            part.mlp.down_proj.weight.copy_(part.mlp.down_proj.weight[:, order])
    model.save_pretrained(tmp_path / "permuted")
    stats = collect_checkpoint(tmp_path / "permuted", "float32", RUNNING, IDS, MASK, tuple(DENSE_PROBES))
    shape = Checkpoint(source).dense_shape()
    other = make_plan(make(name), stats, shape, tmp_path / "permuted")
    outs = []
    for directory, plan, out in ((source, plan_of(name), "a"), (tmp_path / "permuted", other, "b")):
        apply(directory, plan, tmp_path / out, prove=False)
        with torch.no_grad():
            outs.append(runtime.load(tmp_path / out)(input_ids=torch.tensor(IDS)).logits)
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)


# Each method


def inner_of(ffns, layer, x):
    """Activations of one token by a loop over neurons."""
    ffn = ffns.layer(layer)
    found = []
    for neuron in range(WIDTH):
        value = float(ffn.up[neuron].double() @ x.double())
        gate = float(ffn.gate[neuron].double() @ x.double())
        found.append(gate / (1 + np.exp(-gate)) * value)
    return np.array(found)


def test_static_scores_by_loops(models, evidence, plan_of):
    ffns, stats = FFNWeights(models("llama")), evidence("llama")
    hidden = torch.from_numpy(stats.layer("ffn_inputs", 0)["hidden"])
    ffn = ffns.layer(0)
    inner = np.stack([inner_of(ffns, 0, x) for x in hidden])
    norms = [np.sqrt(sum(float(w) ** 2 for w in ffn.down[:, j])) for j in range(WIDTH)]
    activation = [np.sqrt(np.mean(inner[:, j] ** 2)) * norms[j] for j in range(WIDTH)]
    weights = [float(ffn.up[j].norm() * ffn.gate[j].norm()) * norms[j] for j in range(WIDTH)]
    for score, values in {"activation": activation, "magnitude": weights}.items():
        plan = plan_of("static", score=score)
        best = sorted(sorted(range(WIDTH), key=lambda j, v=values: -v[j])[: WIDTH // 2])
        assert plan.tensors["0.neurons"].read().tolist() == best


def test_balanced_kmeans_finds_separate_clusters():
    rng = np.random.default_rng(0)
    truth = rng.permutation(np.repeat(np.arange(4), 6))
    points = 10 * np.eye(4)[truth] + rng.normal(0, 0.1, (24, 4))
    labels = balanced_kmeans(points, 4, seed=0)
    assert len({(a, b) for a, b in zip(truth, labels, strict=True)}) == 4
    _, first = np.unique(labels, return_index=True)
    assert (np.diff(first) > 0).all()  # numbered by their first member


def test_balanced_assignment_is_the_best_of_all():
    from itertools import permutations

    costs = np.random.default_rng(1).integers(0, 50, (6, 3))
    found = balanced_assignment(costs, 2)
    best = min(sum(costs[row, column] for row, column in enumerate(p)) for p in set(permutations([0, 0, 1, 1, 2, 2])))
    assert sum(costs[np.arange(6), found]) == best
    assert np.bincount(found).tolist() == [2, 2, 2]


def test_the_similarity_router_ranks_by_distance_to_the_centres(models, plan_of):
    plan = plan_of("moefication", router="similarity")
    split, ffn = plan.layers[1][0], FFNWeights(models("llama")).layer(1)
    stored = plan.tensors[split.neurons].read()
    rows = (ffn.gate / ffn.gate.norm(dim=1, keepdim=True)).double().numpy()
    centres = [rows[block].mean(axis=0) for block in stored.reshape(8, 8)]
    x = np.random.default_rng(0).normal(size=HIDDEN)
    x /= np.linalg.norm(x)
    distance = [-float(np.sum((x - centre) ** 2)) for centre in centres]
    weight, bias = (plan.tensors[split.tensors_of[role]].read() for role in ("weight", "bias"))
    np.testing.assert_allclose(weight @ x + bias, np.array(distance) + 1, atol=1e-5)


def test_the_learnt_router_captures_more_than_the_similarity_router(models, evidence, plan_of):
    learnt, plain = plan_of("moefication", epochs=100), plan_of("moefication", router="similarity")
    ffns = FFNWeights(models("llama"))
    for layer in range(LAYERS):
        ffn = ffns.layer(layer)
        hidden = torch.from_numpy(evidence("llama").layer("ffn_inputs", layer)["hidden"])
        split = plain.layers[layer][0]
        value = (ffn.inner(hidden).abs() * ffn.down.norm(dim=0)).numpy()[:, plain.tensors[split.neurons].read()]
        scores = value.reshape(len(hidden), 8, 8).sum(axis=2)
        x = (hidden / hidden.norm(dim=1, keepdim=True)).numpy()
        weight, bias = (plain.tensors[split.tensors_of[role]].read() for role in ("weight", "bias"))
        chosen = np.argsort(-(x @ weight.T + bias), axis=1)[:, :4]
        similar = np.take_along_axis(scores, chosen, 1).sum() / np.sort(scores, axis=1)[:, 4:].sum()
        assert 1 >= learnt.evidence[layer]["captured_score"] > similar


def test_shared_neurons_are_the_most_active(evidence, plan_of):
    plan = plan_of("moefication", shared=0.25, blocks=6, ratio=0.5)
    static = plan_of("static", ratio=0.75)
    for layer in range(LAYERS):
        split = plan.layers[layer][0]
        assert (split.shared, split.segments) == (1, (16, 8, 8, 8, 8, 8, 8))
        assert plan.tensors[split.neurons].read()[:16].tolist() == static.tensors[f"{layer}.neurons"].read().tolist()
        assert split.k == 2


def test_cmoe_by_loops(models, evidence, plan_of):
    plan, ffn = plan_of("cmoe", marks=5), FFNWeights(models("llama")).layer(0)
    hidden = evidence("llama").layer("ffn_inputs", 0)["hidden"].astype(np.float64)
    up, gate = ffn.up.double().numpy(), ffn.gate.double().numpy()
    marked = np.zeros((len(hidden), WIDTH))
    for token, x in enumerate(hidden):
        x = x / np.sqrt(sum(x**2))
        value = []
        for j in range(WIDTH):
            g = x @ gate[j] / np.linalg.norm(gate[j])
            value.append(abs(g / (1 + np.exp(-g)) * (x @ up[j] / np.linalg.norm(up[j]))))
        for j in sorted(range(WIDTH), key=lambda j, v=value: -v[j])[:5]:
            marked[token, j] = 1
    rates = marked.mean(axis=0)
    ranked = sorted(range(WIDTH), key=lambda j: (-rates[j], j))
    split = plan.layers[0][0]
    stored = plan.tensors[split.neurons].read().tolist()
    assert stored[:16] == sorted(ranked[:16])  # the shared experts
    blocks = [stored[start : start + 8] for start in range(16, WIDTH, 8)]
    pairs = [(j, centre) for centre, block in zip(ranked[16:22], blocks, strict=True) for j in block]
    cost = sum(np.abs(marked[:, j] - marked[:, centre]).sum() for j, centre in pairs)
    rest, centres = sorted(ranked[16:]), ranked[16:22]
    distance = np.array([[np.abs(marked[:, j] - marked[:, c]).sum() for c in centres] for j in rest])
    from scipy.optimize import linear_sum_assignment

    repeated = np.repeat(distance, 8, axis=1)
    assert cost == repeated[linear_sum_assignment(repeated)].sum()
    for unit, block in enumerate(blocks):
        mean = marked[:, block].mean(axis=1)
        away = [np.abs(marked[:, j] - mean).sum() for j in block]
        row = plan.tensors[split.tensors_of["gate"]].read()[unit]
        near = [j for j, value in zip(block, away, strict=True) if value <= min(away) + 1e-6]
        assert any(np.allclose(row, gate[j]) for j in near)


def test_the_teacher_of_factor_llm_by_loops(models, evidence, plan_of):
    method, ffn = make("factor_llm"), FFNWeights(models("llama")).layer(0)
    hidden = torch.from_numpy(evidence("llama").layer("ffn_inputs", 0)["hidden"])[:20]
    chosen = method.teacher_choice(ffn, hidden, 2)
    inner = ffn.inner(hidden).double().numpy()
    down = ffn.down.double().numpy()
    for token in range(20):
        whole = down @ inner[token]
        away = []
        for block in range(4):
            rows = slice(16 * block, 16 * block + 16)
            away.append(np.sum((2 * down[:, rows] @ inner[token, rows] - whole) ** 2))
        assert set(chosen[token].tolist()) == set(np.argsort(away)[:2].tolist())
    assert all(0.5 < plan_of("factor_llm", epochs=60).evidence[layer]["agreement"] <= 1 for layer in range(LAYERS))


def test_dsmoe_starts_with_about_half_of_its_blocks(models, evidence, plan_of, tmp_path):
    apply(models("llama"), plan_of("dsmoe"), tmp_path / "out", prove=False)
    model = runtime.load(tmp_path / "out")
    from espalier.models.ffn_count import count_neurons

    with count_neurons(model, Checkpoint(tmp_path / "out").dense_family) as counter, torch.no_grad():
        model(input_ids=torch.tensor(IDS), attention_mask=torch.tensor(MASK))
    assert counter.tokens == dict.fromkeys(range(LAYERS), int(MASK.sum()))
    assert all(0.3 * WIDTH < value < 0.7 * WIDTH for value in counter.means().values())


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("dsmoe", "threshold", 1.0, "a number in"),
        ("dsmoe", "std", 0, "a number above 0"),
        ("dsmoe", "bias", "big", "a number or null"),
        ("moefication", "shared", 1.0, "a number in"),
        ("moefication", "router", "linear", "available: similarity"),
        ("moefication", "rate", 0, "a number in"),
        ("factor_llm", "rate", 0, "a number above 0"),
        ("llama_moe", "split", "kmeans", "available: random, clustering"),
        ("static", "score", "norm", "available: activation, magnitude"),
    ],
)
def test_bad_values_are_refused(name, key, value, message):
    with pytest.raises(UserError, match=rf"conf/method/{name}.yaml: {key}={value} is not .*{message}"):
        make(name, **{key: value})
