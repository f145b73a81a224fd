"""Every method in conf/method: keys, errors, determinism, ratios, equivariance; scores against plain loops."""

import json
from dataclasses import MISSING, fields
from pathlib import Path

import numpy as np
import pytest
import yaml

from espalier.errors import UserError
from espalier.methods import build
from espalier.methods.ranking import keep_best
from espalier.plan import Keep, Merge, Plan, Skip
from stats_factory import make_blocks, make_shape, observe, permuted, random_stats

FILES = sorted((Path(__file__).parents[1] / "conf" / "method").glob("*.yaml"))
CONFIGS = {path.stem: config for path in FILES if "_target_" in (config := yaml.safe_load(path.read_text()))}
DRAWN = [name for name, config in CONFIGS.items() if "seed" in config]
SIZED = [name for name, config in CONFIGS.items() if "ratio" in config]
SCORES = ["frequency", "soft_count", "ean", "reap"]

every_method = pytest.mark.parametrize("name", CONFIGS)
every_sized_method = pytest.mark.parametrize("name", SIZED)


def make(name, **keys):
    return build(CONFIGS[name] | keys)


def experts_left(plan, layer, shape):
    return plan.experts_after(layer, shape)


@every_method
def test_yaml_names_itself_and_its_defaults_are_the_class_defaults(name):
    config = CONFIGS[name]
    assert config["name"] == name
    assert config["_target_"].startswith(f"espalier.methods.{name}.")
    method = build(config)
    defaults = {field.name: field.default for field in fields(method)}
    assert set(config) == {*defaults, "_target_", "name"}
    for key, default in defaults.items():
        assert default is MISSING or config[key] == default


@every_method
def test_yaml_explains_every_key(name):
    lines = next(path for path in FILES if path.stem == name).read_text().splitlines()
    assert lines[0].startswith("# ")
    assert all("  # " in line for line in lines if not line.startswith(("#", "_target_", "name")))


@every_method
def test_unknown_key_is_refused_with_its_file_and_the_known_keys(name):
    with pytest.raises(UserError, match=rf"conf/method/{name}.yaml: unknown key 'rations'; .*known: ") as error:
        make(name, rations=1)
    assert all(field.name in str(error.value) for field in fields(make(name)))


@every_method
def test_plan_is_deterministic_and_says_what_it_was_made_with(name):
    shape = make_shape()
    plans = [make(name).plan(random_stats(shape), shape).check(shape) for _ in range(2)]
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
    before = make(name).plan(observe(blocks, shape), shape)
    after = make(name).plan(observe(permuted(blocks, order), shape), shape)
    for layer in shape.layers:
        for old, new in zip(before.layers[layer], after.layers[layer], strict=True):
            assert type(old) is type(new)
            if isinstance(new, Keep):
                assert tuple(sorted(order[e] for e in new.experts)) == old.experts
            elif isinstance(new, Merge):
                assert member_weights(new, order) == pytest.approx(member_weights(old, range(8)))
                groups = {frozenset(order[e] for e in group) for group in new.groups}
                assert groups == {frozenset(group) for group in old.groups}
            else:
                assert isinstance(new, Skip)
                assert new == old


def member_weights(merge, order):
    pairs = zip(merge.groups, merge.weights, strict=True)
    return {order[e]: w for group, weights in pairs for e, w in zip(group, weights, strict=True)}


@every_sized_method
@pytest.mark.parametrize(("ratio", "left"), [(0.125, 7), (0.25, 6), (0.5, 4), (0.75, 2)])
def test_ratio_is_the_fraction_removed(name, ratio, left):
    shape = make_shape()
    plan = make(name, ratio=ratio).plan(random_stats(shape), shape).check(shape)
    assert {experts_left(plan, layer, shape) for layer in shape.layers} == {left}


@every_sized_method
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
        make(name, ratio=ratio).plan(random_stats(shape), shape)


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
    sums = {key: list(zero) for key in ("count", "probability", "norm", "gate_norm", "probability_norm")}
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
            ("soft_count",): sums["probability"],
            ("ean", "variant", "sum"): sums["norm"],
            ("ean", "variant", "mean"): means(sums["norm"], sums["count"]),
            ("ean", "variant", "weighted_sum"): sums["gate_norm"],
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
    with pytest.raises(UserError, match="no router groups"):
        make("naee").plan(random_stats(shape), shape)


@pytest.mark.parametrize(
    ("name", "key", "value"), [("ean", "variant", "max"), ("reap", "weights", "uniform"), ("reap", "weights", True)]
)
def test_bad_values_are_refused(name, key, value):
    with pytest.raises(UserError, match=f"conf/method/{name}.yaml: {key}={value} is not available; available: "):
        make(name, **{key: value})
