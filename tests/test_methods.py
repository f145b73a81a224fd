"""Every method in conf/method: keys, errors, determinism, ratios, equivariance; scores against plain loops."""

import json
from dataclasses import MISSING, fields
from pathlib import Path

import numpy as np
import pytest
import yaml

from espalier.errors import UserError
from espalier.methods import build, is_for_dense, is_for_depth
from espalier.methods.ranking import keep_best
from espalier.plans.operations import Constant, Keep, Merge, Narrow, Skip
from espalier.plans.plan import Plan
from stats_factory import Block, PlainExperts, make_blocks, make_shape, observe, permuted, random_stats

FILES = sorted((Path(__file__).parents[1] / "conf" / "method").glob("*.yaml"))
EVERY = {path.stem: config for path in FILES if "_target_" in (config := yaml.safe_load(path.read_text()))}
CONFIGS = {
    name: config
    for name, config in EVERY.items()
    if not is_for_dense(method := build(config)) and not is_for_depth(method)
}
DRAWN = [name for name, config in CONFIGS.items() if "seed" in config and name != "diep"]  # whose seed is its fit's
SIZED = [name for name, config in CONFIGS.items() if "ratio" in config]
WHOLE = [name for name in SIZED if name not in ("mone", "camera_p")]  # remove experts, router rows or both
GLOBAL = ("stun", "m_smoe", "sub_moe", "diep")  # decide over several layers, which so keep different numbers
SCORES = ["frequency", "soft_count", "ean", "reap"]

every_file = pytest.mark.parametrize("name", EVERY)
every_method = pytest.mark.parametrize("name", CONFIGS)
every_whole_method = pytest.mark.parametrize("name", WHOLE)


def make(name, **keys):
    return build(EVERY[name] | keys)


def base_of(blocks):
    """Blocks of a model whose router rows had other norms; each depends on its expert only."""
    return {
        layer: Block(b.logits, b.outputs, b.hidden, b.router * (1.5 + np.sin(9 * b.router.sum(axis=1, keepdims=True))))
        for layer, b in blocks.items()
    }


def plan_for(method, blocks, shape):
    """Return the plan of a method that is given whatever it asks for, checked."""
    more = []
    if getattr(method, "reads_weights", False):
        more.append(PlainExperts(blocks))
    if hasattr(method, "base"):
        more.append(PlainExperts(base_of(blocks)))
    return method.plan(observe(blocks, shape), shape, *more).check(shape)


def experts_left(plan, layer, shape):
    return plan.experts_after(layer, shape)


@every_file
def test_yaml_names_itself_and_its_defaults_are_the_class_defaults(name):
    config = EVERY[name]
    assert config["name"] == name
    assert config["_target_"].startswith(f"espalier.methods.{name}.")
    method = build(config)
    defaults = {field.name: field.default for field in fields(method)}
    assert set(config) == {*defaults, "_target_", "name"}
    for key, default in defaults.items():
        assert default is MISSING or config[key] == default


@every_file
def test_yaml_explains_every_key(name):
    lines = next(path for path in FILES if path.stem == name).read_text().splitlines()
    assert lines[0].startswith("# ")
    assert all("  # " in line for line in lines if not line.startswith(("#", "_target_", "name")))


@every_file
def test_unknown_key_is_refused_with_its_file_and_the_known_keys(name):
    with pytest.raises(UserError, match=rf"conf/method/{name}.yaml: unknown key 'rations'; .*known: ") as error:
        make(name, rations=1)
    assert all(field.name in str(error.value) for field in fields(make(name)))


@every_method
def test_plan_is_deterministic_and_says_what_it_was_made_with(name):
    shape = make_shape()
    plans = [plan_for(make(name), make_blocks(shape), shape) for _ in range(2)]
    assert plans[0].document() == plans[1].document()
    assert plans[0].method == {key: value for key, value in CONFIGS[name].items() if key != "_target_"}
    assert tuple(plans[0].layers) == shape.layers
    text = json.dumps(plans[0].document(), allow_nan=False)
    assert Plan.from_document(json.loads(text)).document() == plans[0].document()


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in DRAWN])
@pytest.mark.parametrize("top_k", [2, 3])
@pytest.mark.parametrize("renormalise", [True, False])
def test_permuting_experts_permutes_the_plan(name, top_k, renormalise):
    shape = make_shape(8, top_k, renormalise)
    order = [3, 0, 7, 5, 1, 6, 2, 4]  # new expert i is the old order[i]
    blocks = make_blocks(shape, tokens=200)
    before, after = (plan_for(make(name), given, shape) for given in (blocks, permuted(blocks, order)))
    for layer in shape.layers:
        for old, new in zip(described(before, layer, range(8)), described(after, layer, order), strict=True):
            assert new[0] == old[0]
            assert new[1] == pytest.approx(old[1])


def described(plan, layer, names):
    """Yield (what, numbers by expert) of each operation, with `names` for the experts that it finds."""
    for operation in plan.layers[layer]:
        if isinstance(operation, Keep):
            names = [names[e] for e in operation.experts]
            yield set(names), {}
        elif isinstance(operation, Merge):
            pairs = zip(operation.groups, operation.weights, strict=True)
            weights = {names[e]: w for group, own in pairs for e, w in zip(group, own, strict=True)}
            yield {frozenset(names[e] for e in group) for group in operation.groups}, weights
        elif isinstance(operation, Constant):
            vectors = plan.tensors[operation.vectors].read()
            rows = zip(operation.experts, vectors, strict=True)
            yield "constant", {(names[e], n): value for e, row in rows for n, value in enumerate(row)}
        elif isinstance(operation, Narrow):
            rows = plan.tensors[operation.neurons].read()
            yield {names[e]: [n for n in row.tolist() if n >= 0] for e, row in enumerate(rows)}, {}
        else:
            assert isinstance(operation, Skip)
            numbers = {}
            if operation.factor is not None:
                factor = plan.tensors[operation.factor].read()
                numbers = {(names[a], names[b]): factor[a, b] for a in range(len(factor)) for b in range(len(factor))}
            yield operation, numbers


@pytest.mark.parametrize("name", [*WHOLE, "mone"])
@pytest.mark.parametrize(("ratio", "left"), [(0.125, 7), (0.25, 6), (0.5, 4), (0.75, 2)])
def test_ratio_is_the_fraction_removed(name, ratio, left):
    shape = make_shape()
    plan = plan_for(make(name, ratio=ratio), make_blocks(shape), shape)
    lefts = [experts_left(plan, layer, shape) for layer in shape.layers]
    assert sum(lefts) == left * len(shape.layers)
    assert name in GLOBAL or set(lefts) == {left}


@every_whole_method
@pytest.mark.parametrize(
    ("ratio", "message"),
    [
        (0.95, r"ratio=0.95 leaves 0 of 8 experts, but the router picks top_k=2. Use ratio <= 0.75"),
        (0.01, r"ratio=0.01 removes none of 8 experts. Use ratio >= 0.125"),
        (0, r"ratio=0 is not a fraction"),
        (1.0, r"ratio=1.0 is not a fraction"),
        ("half", r"ratio=half is not a fraction"),
    ],
)
def test_bad_ratio_is_refused_with_its_numbers(name, ratio, message):
    shape = make_shape()
    with pytest.raises(UserError, match=f"conf/method/{name}.yaml: {message}"):
        plan_for(make(name, ratio=ratio), make_blocks(shape), shape)


@pytest.mark.parametrize("name", DRAWN)
def test_seed_decides_the_draw_and_layers_draw_apart(name):
    shape, fewer = make_shape(16, layers=(0, 1, 2, 3)), make_shape(16, layers=(1, 3))
    stats, stats_of_fewer = random_stats(shape), random_stats(fewer)
    plan = make(name).plan(stats, shape)
    assert make(name, seed=1).plan(stats, shape).layers != plan.layers
    kept = [[getattr(o, "experts", getattr(o, "groups", None)) for o in plan.layers[n]] for n in shape.layers]
    assert len({str(k) for k in kept}) == 4
    if name == "random":
        assert make(name).plan(stats_of_fewer, fewer).layers[3] == plan.layers[3]
    with pytest.raises(UserError, match="seed=-1 is not a whole number >= 0"):
        make(name, seed=-1)


@pytest.mark.parametrize("name", [*SCORES, "random"])
def test_experts_that_survive_more_removal_survive_less(name):
    shape = make_shape(16)
    stats = random_stats(shape)
    half, quarter = (make(name, ratio=ratio).plan(stats, shape).layers for ratio in (0.5, 0.25))
    for layer in shape.layers:
        assert set(half[layer][0].experts) < set(quarter[layer][0].experts)


def plain_scores(block, shape):
    """All scores of each expert by loops over tokens; `norms` and so on follow the papers' formulas."""
    zero = [0.0] * shape.experts
    names = ("count", "gate", "probability", "norm", "gate_norm", "probability_norm", "square", "largest")
    sums = {key: list(zero) for key in names} | {"output": [0.0 for _ in zero]}
    for logits, outputs in zip(block.logits.astype(np.float64), block.outputs, strict=True):
        total = sum(np.exp(value) for value in logits)
        probability = [float(np.exp(value) / total) for value in logits]
        chosen = sorted(range(shape.experts), key=lambda e: (-probability[e], e))[: shape.top_k]
        scale = sum(probability[e] for e in chosen) if shape.renormalise else 1.0
        for e in range(shape.experts):
            sums["probability"][e] += probability[e]
        for e in chosen:
            norm = sum(float(value) ** 2 for value in outputs[e]) ** 0.5
            sums["count"][e] += 1
            sums["gate"][e] += probability[e] / scale
            sums["square"][e] += norm**2
            sums["largest"][e] = max(sums["largest"][e], *outputs[e].tolist())
            sums["output"][e] = sums["output"][e] + outputs[e]
            sums["norm"][e] += norm
            sums["gate_norm"][e] += probability[e] / scale * norm
            sums["probability_norm"][e] += probability[e] * norm
    return sums


def means(total, counts):
    return [t / c if c else 0.0 for t, c in zip(total, counts, strict=True)]


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_scores_equal_plain_loops(top_k, renormalise):
    shape = make_shape(8, top_k, renormalise)
    blocks = make_blocks(shape)
    blocks[2].logits[:, 6] = -40  # expert 6 of layer 2 is never chosen
    stats = observe(blocks, shape)
    for layer, block in blocks.items():
        sums = plain_scores(block, shape)
        expected = {
            ("frequency",): sums["count"],
            ("frequency", "weights", "gate"): sums["gate"],
            ("soft_count",): sums["probability"],
            ("ean", "variant", "sum"): sums["norm"],
            ("ean", "variant", "mean"): means(sums["norm"], sums["count"]),
            ("ean", "variant", "weighted_sum"): sums["gate_norm"],
            ("ean", "variant", "mean_square"): means(sums["square"], sums["count"]),
            ("ean", "variant", "norm_of_mean"): means([np.linalg.norm(y) for y in sums["output"]], sums["count"]),
            ("ean", "variant", "max_activation"): sums["largest"],
            ("reap", "weights", "model"): means(sums["gate_norm"], sums["count"]),
            ("reap", "weights", "published"): means(sums["probability_norm"], sums["count"]),
        }
        for (name, *key), scores in expected.items():
            method = make(name, **({key[0]: key[1]} if key else {}))
            plan = method.plan(stats, shape)
            assert plan.evidence[layer]["scores"] == pytest.approx(scores, rel=1e-9)
            best = sorted(range(8), key=lambda e, s=scores: (-s[e], e))[:4]
            assert plan.layers[layer] == (Keep(tuple(sorted(best))),)
            if layer == 2 and name != "soft_count":
                assert plan.evidence[2]["scores"][6] == 0
                assert 6 not in plan.layers[2][0].experts


def test_equal_scores_keep_the_lower_ids():
    shape = make_shape(8, layers=(0,))
    scores = np.array([1, 2, 1, 1, 2, 1, 0, 1])
    plan = keep_best({"name": "reap", "ratio": 0.5}, [(0, scores)], shape)
    assert plan.layers[0] == (Keep((0, 1, 2, 4)),)


def test_each_router_group_keeps_the_same_number():
    document = make_shape(8, layers=(0,)).document() | {"groups": 2}
    shape = type(make_shape()).from_document(document)
    plan = keep_best({"name": "reap", "ratio": 0.5}, [(0, np.arange(8))], shape)
    assert plan.layers[0] == (Keep((2, 3, 6, 7)),)
    with pytest.raises(UserError, match="leaves 5 experts, not a multiple of the 2 router groups"):
        keep_best({"name": "reap", "ratio": 0.375}, [(0, np.arange(8))], shape)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("ean", "variant", "max"),
        ("reap", "weights", "uniform"),
        ("reap", "weights", True),
        ("frequency", "weights", "probability"),
        ("mone", "gate", "max"),
        ("camera_p", "scope", "model"),
    ],
)
def test_bad_values_are_refused(name, key, value):
    with pytest.raises(UserError, match=f"conf/method/{name}.yaml: {key}={value} is not available; available: "):
        make(name, **{key: value})
