"""Training routers of depth: the load term and budgets by slow computations, what is trained, adapters, refusals."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dense_models import save_dense
from depth_plans import KINDS, depth_plan
from espalier import conf
from espalier.checkpoints.checkpoint import Checkpoint
from espalier.collecting.stats import Stats
from espalier.errors import InterruptedWork, UserError
from espalier.methods import build, make_plan
from espalier.models import runtime
from espalier.models.depth_count import count_depth
from espalier.models.running import Running
from espalier.surgery.apply import apply
from espalier.training.tune import Text, tune
from espalier.training.tune_depth import DepthGates
from espalier.training.tune_settings import Tuning

pytestmark = pytest.mark.usefixtures("proof_here")

RUNNING = Running.of(device="cpu", stream="never")
IDS = np.random.default_rng(0).integers(3, 95, (12, 16)).astype(np.int32)
MASK = np.ones_like(IDS)
MASK[:, 13:] = 0
BASE = Tuning("depth", "lm", rate=1e-3, tokens=8 * 64, batch=4, train="depth", load=0.01, router_rate=0.02,
              straight_through=False)  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_dense("llama", tmp_path_factory.mktemp("source") / "model", num_hidden_layers=4)


@pytest.fixture(scope="module")
def routed(source, tmp_path_factory):
    """Return make(method, **keys) -> a model that the method routed."""
    made = {}

    def make(name, **keys):
        key = (name, *sorted(keys.items()))
        if key not in made:
            shape = Checkpoint(source).dense_shape()
            method = build(conf.load("method", name) | keys)
            made[key] = tmp_path_factory.mktemp(name) / "out"
            apply(source, make_plan(method, Stats.empty(shape), shape, source), made[key], prove=False)
        return made[key]

    return make


def tuned(source, out, tuning, mask=None, state="state"):
    facts = tune(source, out, tuning, Text(IDS, mask), RUNNING, out.parent / state)
    return facts, json.loads((out / "tuning.json").read_text())


def tensors(directory):
    return load_file(directory / "model.safetensors")


def real_tokens(mask):
    return torch.ones(12, 16).bool() if mask is None else torch.as_tensor(mask).bool()


def kept_share(directory, ids=IDS):
    model = runtime.load(directory)
    with torch.no_grad(), count_depth(model) as counter:
        model(input_ids=torch.as_tensor(ids).long(), use_cache=False)
    return counter.shares()


@pytest.mark.parametrize("mask", [None, MASK])
def test_load_terms_are_what_their_papers_write(mask, routed):
    model = runtime.load(routed("modification", init_bias=0.3))
    for layer in (1, 3):
        torch.nn.init.normal_(model.model.layers[layer].depth_router.weight, std=0.5)
    given = None if mask is None else torch.as_tensor(mask).long()
    model(input_ids=torch.as_tensor(IDS).long(), attention_mask=given, use_cache=False)
    gates = DepthGates(model, "here", load=True, straight_through=False)
    product, excess, shares = 0.0, 0.0, []
    for layer in (1, 3):
        router = model.model.layers[layer].depth_router
        values = [router.gates[b, t].item() for b in range(12) for t in range(16) if mask is None or mask[b, t]]
        share = sum(value >= 0.5 for value in values) / len(values)
        product += share * sum(values) / len(values)
        excess += max(0.0, share - 0.4) / 2
        shares.append(share)
    assert float(gates.load(given, "product", None)) == pytest.approx(product, rel=1e-5)
    assert float(gates.load(given, "excess", 0.4)) == pytest.approx(excess, rel=1e-4)
    assert gates.kept(given) == pytest.approx(sum(shares) / 2)
    over = sum(shares) / 2 - 0.3
    lifted = sum(
        sum(model.model.layers[layer].depth_router.gates[real_tokens(mask)].tolist()) for layer in (1, 3)
    ) / int(real_tokens(mask).sum())
    assert float(gates.load(given, "product", 0.3)) == pytest.approx(over * lifted, rel=1e-5)
    assert 0 < min(shares) < 1
    # Only gates have a gradient: F_j is a count.
    router = model.model.layers[3].depth_router
    (slope,) = torch.autograd.grad(gates.load(given, "product", None), router.bias)
    g = router.gates[real_tokens(mask)].double()
    assert float(slope) == pytest.approx(shares[1] * float((g * (1 - g)).mean()), rel=1e-4)


def test_the_predictor_learns_who_is_among_the_largest_and_changes_nothing_else(routed, tmp_path):
    start = routed("mod", capacity=0.5)
    model = runtime.load(start)
    gates = DepthGates(model, "here", load=False, straight_through=False)
    model(input_ids=torch.as_tensor(IDS).long(), use_cache=False)
    loss = gates.predictors(None)
    losses = []
    for layer in (1, 3):
        router = model.model.layers[layer].depth_router
        chance = router.predicted.sigmoid().double()
        losses.append(-torch.where(router.kept, chance, 1 - chance).log().mean())
    assert float(loss) == pytest.approx(float(sum(losses)) / 2, rel=1e-5)
    loss.backward()
    touched = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.grad is not None}
    assert touched == {"first", "second", "offset"}
    _, record = tuned(start, tmp_path / "out", replace(BASE, load=0.0, tokens=64 * 200, router_rate=0.1))
    curve = [row["terms"]["predictors"] for row in record["curve"]]
    assert np.mean(curve[-20:]) < 0.75 * np.mean(curve[:20])
    assert all(row["measured"]["kept"] == 0.5 for row in record["curve"])


@pytest.mark.parametrize("train", ["depth", "lora", "all"])
def test_what_is_trained(train, routed, tmp_path):
    start = routed("modification")
    before = tensors(start)
    _, record = tuned(start, tmp_path / "out", replace(BASE, train=train, norms=train == "lora"))
    after = tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    routers = {name for name in before if ".depth_router." in name}
    linear = {name for name in before if "_proj" in name}
    norms = {name for name in before if "norm" in name}
    expected = {"depth": routers, "lora": routers | linear | norms, "all": set(before)}[train]
    assert changed == expected
    assert set(record["tensors"]) == expected
    if train == "lora":
        for name in linear:
            difference = (after[name] - before[name]).double()
            assert 0 < torch.linalg.matrix_rank(difference, rtol=1e-3) <= 8


@pytest.mark.parametrize("train", ["depth", "lora"])
def test_an_interrupted_training_has_the_same_bytes(train, routed, tmp_path, monkeypatch):
    import signal

    start, tuning = routed("modification"), replace(BASE, train=train, target=0.5)
    tuned(start, tmp_path / "whole", tuning, state="one")
    steps = []

    def stop(values, step):
        steps.append(values)
        if len(steps) == 3:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("espalier.training.train.TrainingState.due", lambda self: True)
    with pytest.raises(InterruptedWork):
        tune(start, tmp_path / "out", tuning, Text(IDS), RUNNING, tmp_path / "two", log=stop)
    tuned(start, tmp_path / "out", tuning, state="two")
    one, two = tensors(tmp_path / "whole"), tensors(tmp_path / "out")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert (tmp_path / "whole/config.json").read_bytes() == (tmp_path / "out/config.json").read_bytes()


@pytest.mark.parametrize("target", [0.3, 0.7])
@pytest.mark.parametrize("granularity", ["block", "attention", "ffn"])
def test_a_budget_is_met(granularity, target, routed, tmp_path):
    start = routed("modification", granularity=granularity)
    assert set(kept_share(start).values()) == {1.0}
    facts, record = tuned(start, tmp_path / "out", replace(BASE, target=target, tokens=64 * 60, load=0.1))
    shares = kept_share(tmp_path / "out")
    assert sum(shares.values()) / 2 == pytest.approx(target, abs=0.01)
    assert record["threshold_share"] == facts["threshold_share"] == pytest.approx(sum(shares.values()) / 2, abs=1e-6)
    last = [row["measured"]["active"] for row in record["curve"][-max(1, len(record["curve"]) // 10) :]]
    assert record["trained_share"] == facts["trained_share"] == pytest.approx(sum(last) / len(last), abs=1e-6)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert {own["threshold"] for own in config["espalier"]["depth"]["layers"].values()} == {facts["threshold"]}
    assert record["curve"][-1]["measured"]["active"] < record["curve"][0]["measured"]["active"]
    # Another threshold after the training: the tuned checkpoint has what its plan names.
    shape, rule = Checkpoint(start).any_shape(), build(conf.load("method", "depth_rule") | {"threshold": 1.0})
    apply(
        tmp_path / "out", make_plan(rule, Stats.empty(shape), shape, tmp_path / "out"), tmp_path / "after", prove=False
    )
    assert set(kept_share(tmp_path / "after").values()) == {0.0}


def test_masks_learn_by_straight_through(routed, tmp_path):
    start = routed("modification", weights="mask", granularity="attention")
    with pytest.raises(UserError, match="straight_through=true"):
        tuned(start, tmp_path / "out", BASE)
    tuning = replace(BASE, straight_through=True, load_term="excess", load=1.0, target=0.5, tokens=64 * 60)
    tuned(start, tmp_path / "out", tuning)
    shares = kept_share(tmp_path / "out")
    assert sum(shares.values()) / 2 == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("train", ["depth", "lora"])
def test_a_model_with_experts(train, tiny_model, tmp_path):
    source = tiny_model("mixtral")
    apply(source, depth_plan("threshold", Checkpoint(source).any_shape()), tmp_path / "routed", prove=False)
    tuned(tmp_path / "routed", tmp_path / "out", replace(BASE, train=train, target=0.6, tokens=64 * 30))
    shares = kept_share(tmp_path / "out").values()
    assert sum(shares) / len(shares) == pytest.approx(0.6, abs=0.01)
    before, after = tensors(tmp_path / "routed"), tensors(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    own = {name for name in before if ".depth_router." in name}
    assert changed == own | ({name for name in before if "_proj" in name} if train == "lora" else set())


def test_what_cannot_be_trained_is_said(source, routed, tmp_path):
    with pytest.raises(UserError, match="method=modification"):
        tuned(routed("random_depth"), tmp_path / "out", replace(BASE, train="all"))
    with pytest.raises(UserError, match="no router to tune"):
        tuned(source, tmp_path / "out", replace(BASE, load=0.0))
    composed = conf.load("tuning", "depth") | {"tokens": 64}
    for wrong, said in (
        ({"load": -1}, "load=-1"),
        ({"load_term": "sum"}, "load_term='sum'"),
        ({"load_term": "excess"}, "Give target"),
        ({"target": 0.5, "load": 0}, "load > 0"),
        ({"train": "depths"}, "did you mean"),
        ({"rank": 0}, "rank=0"),
    ):
        with pytest.raises(UserError, match=said):
            Tuning.of(composed | wrong)


def test_another_rule_after_training(routed, tmp_path):
    shape = Checkpoint(routed("modification")).any_shape()
    start = routed("modification", init_bias=0.0)
    for threshold in (0.2, 0.8):
        method = build(conf.load("method", "depth_rule") | {"threshold": threshold})
        plan = make_plan(method, Stats.empty(shape), shape, start)
        out = tmp_path / str(threshold)
        apply(start, plan, out, prove=True)
        assert set(kept_share(out).values()) == {1.0 if threshold < 0.5 else 0.0}
        assert sorted(json.loads((out / "plan.json").read_text())["layers"]) == ["1", "3"]
    mod = routed("mod", capacity=0.5)
    plan = make_plan(build(conf.load("method", "depth_rule") | {"rule": "predictor"}), Stats.empty(shape), shape, mod)
    apply(mod, plan, tmp_path / "guessing", prove=True)
    assert set(kept_share(mod).values()) == {0.5}
    model = runtime.load(tmp_path / "guessing")
    assert {layer.depth_router.rule for layer in model.model.layers if hasattr(layer, "depth_router")} == {"predictor"}
    for wrong, said in (({"threshold": 0.5}, "method=modification first"), ({"rule": "predictor"}, "method=mod first")):
        directory = mod if "threshold" in wrong else start
        with pytest.raises(UserError, match=said):
            make_plan(build(conf.load("method", "depth_rule") | wrong), Stats.empty(shape), shape, directory)


def test_kinds_are_all_of_the_operation():
    from espalier.plans.depth import GRANULARITIES, RULES

    assert {operation.rule for operation in KINDS.values()} == set(RULES)
    assert {operation.granularity for operation in KINDS.values()} == set(GRANULARITIES)
