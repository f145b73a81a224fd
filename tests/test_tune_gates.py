"""Training gates and FFNs: DSMoE's loss and budget by slow computations, what is trained, resuming, refusals."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dense_models import HIDDEN, KINDS, LAYERS, WIDTH, save_dense, split_plan
from espalier import conf
from espalier.checkpoints.checkpoint import Checkpoint
from espalier.collecting.stats import Stats
from espalier.errors import UserError
from espalier.methods import build, make_plan
from espalier.models import runtime
from espalier.models.ffn_count import count_neurons
from espalier.models.running import Running
from espalier.surgery.apply import apply
from espalier.training.train import Step
from espalier.training.tune import Text, tune
from espalier.training.tune_gates import Controller, Gates
from espalier.training.tune_names import tuned_names
from espalier.training.tune_settings import Tuning
from tiny import save_tiny

RUNNING = Running.of(device="cpu", stream="never")
IDS = np.random.default_rng(0).integers(3, 95, (12, 16)).astype(np.int32)
MASK = np.ones_like(IDS)
MASK[:, 13:] = 0
BASE = Tuning("dsmoe", "lm", rate=3e-3, tokens=8 * 64, batch=4, train="ffn", gates=1.0, router_rate=0.03)


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """A model that was split by DSMoE, its gates untrained."""
    base = tmp_path_factory.mktemp("split")
    source = save_dense("llama", base / "model")
    shape = Checkpoint(source).dense_shape()
    method = build(conf.load("method", "dsmoe") | {"blocks": 4, "std": 0.5})
    apply(source, make_plan(method, Stats.empty(shape), shape, source), base / "out", prove=False)
    return base / "out"


def tuned(source, out, tuning, state="state", mask=None):
    facts = tune(source, out, tuning, Text(IDS, mask), RUNNING, out.parent / state)
    return facts, json.loads((out / "tuning.json").read_text())


def tensors(directory):
    return load_file(directory / "model.safetensors")


def gate_values(model, ids, mask):
    """The gates of every layer on unmasked tokens, by plain products of what each router gets."""
    seen = []
    hooks = [
        layer.mlp.router.register_forward_pre_hook(lambda router, args: seen.append((router, args[0])))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    for hook in hooks:
        hook.remove()
    kept = mask.flatten().bool()
    return [1 / (1 + torch.exp(-(hidden[kept] @ router.weight.T))) for router, hidden in seen]


def test_the_loss_is_equation_19_over_unmasked_tokens(split):
    model = runtime.load(split)
    ids, mask = torch.tensor(IDS).long(), torch.tensor(MASK).long()
    gates = Gates(model, Checkpoint(split).dense_family, "here")
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    values = gate_values(model, ids, mask)
    total, running = 0.0, 0
    for q in values:
        for row in q.tolist():
            over = [value for value in row if value > 0.5] or [max(row)]
            total += sum(over)
            running += len(over)
    tokens = len(values[0])
    assert float(gates.loss(mask)) == pytest.approx(total / (LAYERS * 4 * tokens), rel=1e-5)
    assert gates.active(mask) == pytest.approx(running / (LAYERS * 4 * tokens), rel=1e-6)


def test_the_controller_moves_by_a_fifth_a_step_and_has_bounds():
    controller = Controller(2.0, 0.5)
    curve = [Step(n, {}, 0.0, {"active": active}) for n, active in enumerate((0.7, 0.6, 0.4))]
    controller.follow([])
    assert controller.coefficient == 2
    controller.follow(curve)
    assert controller.coefficient == pytest.approx(2 * 1.2)
    controller.follow([Step(n, {}, 0.0, {"active": 0.9}) for n in range(200)])
    assert controller.coefficient == pytest.approx(2e6)
    fixed = Controller(2.0, None)
    fixed.follow(curve)
    assert fixed.coefficient == 2


@pytest.mark.parametrize("target", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("mask", [None, MASK])
def test_the_budget_is_met(target, mask, split, tmp_path):
    facts, record = tuned(split, tmp_path / "out", replace(BASE, target=target), mask=mask)
    model = runtime.load(tmp_path / "out")
    assert [layer.mlp.router.threshold for layer in model.model.layers] == [facts["threshold"]] * LAYERS
    given = None if mask is None else torch.tensor(mask)
    with count_neurons(model, Checkpoint(tmp_path / "out").dense_family) as counter, torch.no_grad():
        model(input_ids=torch.tensor(IDS).long(), attention_mask=given)
    share = np.mean(list(counter.means().values())) / WIDTH
    assert share == pytest.approx(target, abs=0.01)
    assert record["threshold"] == facts["threshold"]
    assert record["threshold_share"] == facts["threshold_share"] == pytest.approx(share, abs=1e-6)
    assert all(0 < row["measured"]["active"] <= 1 for row in record["curve"])


def test_without_a_target_the_threshold_stays_and_the_term_is_what_it_says(split, tmp_path):
    facts, record = tuned(split, tmp_path / "out", replace(BASE, gates=5.0))
    assert "threshold" not in facts
    assert Checkpoint(tmp_path / "out").config == Checkpoint(split).config
    first, last = record["curve"][0]["terms"]["gates"], record["curve"][-1]["terms"]["gates"]
    assert 0 < last < first  # gates are pushed down
    plain = tuned(split, tmp_path / "plain", replace(BASE, gates=1e-9))[1]
    assert plain["curve"][-1]["measured"]["active"] > record["curve"][-1]["measured"]["active"]


def test_what_is_trained(split, tmp_path):
    before = tensors(split)
    for train, changes in {
        "routers": lambda name: ".router." in name,
        "ffn": lambda name: ".mlp." in name,
        "all": lambda name: True,
    }.items():
        tuned(split, tmp_path / train, replace(BASE, train=train), state=f"state-{train}")
        after = tensors(tmp_path / train)
        assert after.keys() == before.keys()
        for name, tensor in after.items():
            assert torch.equal(tensor, before[name]) != changes(name), (train, name)


def test_adapters_are_trained_and_merged_where_ffns_are_split(split, tmp_path):
    tuned(split, tmp_path / "out", replace(BASE, train="lora", target=0.6))
    before, after = tensors(split), tensors(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    linear = {name for name in before if "_proj" in name}
    assert changed == linear | {name for name in before if ".router." in name}
    for name in linear:
        assert 0 < torch.linalg.matrix_rank((after[name] - before[name]).double(), rtol=1e-3) <= BASE.rank
    # The threshold was set with the adapters, which are in the weights now.
    model = runtime.load(tmp_path / "out")
    with torch.no_grad(), count_neurons(model, Checkpoint(tmp_path / "out").dense_family) as counter:
        model(input_ids=torch.tensor(IDS).long())
    assert np.mean(list(counter.means().values())) / WIDTH == pytest.approx(0.6, abs=0.01)


def test_straight_through_teaches_gates_that_never_fire(tmp_path):
    """Blocks whose gates stay under the threshold learn nothing without it."""
    source = save_dense("llama", tmp_path / "model")
    plan = split_plan(replace(KINDS["dsmoe"], threshold=0.9999))
    apply(source, plan, tmp_path / "split", prove=False)
    before = tensors(tmp_path / "split")
    moved = {}
    for on in (True, False):
        out = tmp_path / f"out{on}"
        tuned(tmp_path / "split", out, replace(BASE, straight_through=on, gates=1e-9, train="routers"), state=str(on))
        name = "model.layers.0.mlp.router.weight"
        moved[on] = (tensors(out)[name] - before[name]).abs().amax(dim=1)
    assert (moved[True] > 0).all()
    rare = moved[False].argmin()
    assert moved[False][rare] < moved[True][rare]


def test_an_interrupted_training_ends_with_the_same_bytes(split, tmp_path, monkeypatch):
    tuning = replace(BASE, target=0.5)
    tuned(split, tmp_path / "whole", tuning)
    steps = []

    def log(values, step):
        steps.append(values)
        if len(steps) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("espalier.training.train.SAVE_SECONDS", -1.0)
    monkeypatch.setattr("espalier.training.train.TrainingState.due", lambda self: True)
    state = tmp_path / "other"
    with pytest.raises(KeyboardInterrupt):
        tune(split, tmp_path / "broken", tuning, Text(IDS), RUNNING, state, log=log)
    tune(split, tmp_path / "broken", tuning, Text(IDS), RUNNING, state)
    assert (tmp_path / "broken" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
    curves = [json.loads((tmp_path / name / "tuning.json").read_text())["curve"] for name in ("whole", "broken")]
    for rows in curves:
        for row in rows:
            row.pop("seconds")
    assert curves[0] == curves[1]


def test_routers_train_at_their_own_rate(split, tmp_path):
    """The first step of Adam moves each number by the rate: that of the gates is ten times the other."""
    tuned(split, tmp_path / "out", replace(BASE, tokens=64, clip=None, warm_up=0.0, schedule="constant"))
    before, after = tensors(split), tensors(tmp_path / "out")
    names = {"model.layers.1.mlp.router.weight": 0.03, "model.layers.1.mlp.up_proj.weight": 0.003}
    for name, rate in names.items():
        assert float((after[name] - before[name]).abs().max()) == pytest.approx(rate, rel=0.01)


@pytest.mark.parametrize("kind", ["cmoe", "llama_moe", "tomoe", "narrower"])
def test_other_splits_are_tuned_too(kind, tmp_path):
    source = save_dense("qwen2", tmp_path / "model")
    apply(source, split_plan(KINDS[kind]), tmp_path / "split", prove=False)
    tuning = replace(BASE, gates=0.0)
    facts, record = tuned(tmp_path / "split", tmp_path / "out", tuning)
    routers = {name for name in record["tensors"] if ".router." in name}
    expected = {"cmoe": {"gate", "up", "scale"}, "llama_moe": {"weight"}}.get(kind, set())
    assert {name.rpartition(".")[2] for name in routers} == expected
    assert facts["loss"][1] < facts["loss"][0]
    assert math.isfinite(facts["loss"][1])
    runtime.load(tmp_path / "out")


def test_a_teacher_is_followed(split, tmp_path):
    from espalier.training.teacher import make_teacher, save_teacher

    original = split.parent / "model"
    save_teacher(tmp_path / "teacher", make_teacher(original, IDS, None, 8, "float32", RUNNING), {})
    tuning = replace(BASE, objective="distill", gates=0.01, tokens=40 * 64)
    given = {"teacher": tmp_path / "teacher"}
    tune(split, tmp_path / "out", tuning, Text(IDS), RUNNING, tmp_path / "state", **given)
    curve = json.loads((tmp_path / "out" / "tuning.json").read_text())["curve"]
    assert set(curve[0]["terms"]) == {"kl", "gates"}
    assert curve[-1]["terms"]["kl"] < curve[0]["terms"]["kl"]


def test_refusals(split, tmp_path):
    plain = save_dense("llama", tmp_path / "model")
    with pytest.raises(UserError, match=r"trains gates with a threshold, and the model has none. Use method=dsmoe"):
        tuned(plain, tmp_path / "out", BASE)
    with pytest.raises(UserError, match=r"has no router to tune"):
        tuned_names(plain, "float32", replace(BASE, train="routers"))
    with pytest.raises(UserError, match=r"entropy=0.1 is for routers of MoE blocks"):
        tuned(split, tmp_path / "out", replace(BASE, entropy=0.1))
    moe = save_tiny("mixtral", tmp_path / "moe")
    with pytest.raises(UserError, match=r"train=ffn is for dense models; mixtral has experts"):
        tuned_names(moe, "float32", BASE)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("target", 1.0, "expected a fraction in"),
        ("gates", -1, "expected a number >= 0"),
        ("router_rate", 0, "expected a number above 0 or null"),
        ("train", "gates", "known: "),
        ("straight_through", 1, "expected true or false"),
    ],
)
def test_bad_settings_are_refused(key, value, message):
    config = conf.load("tuning", "dsmoe") | {key: value}
    with pytest.raises(UserError, match=rf"conf/tuning/dsmoe.yaml: {key}=.*{message}"):
        Tuning.of(config)


def test_a_target_needs_a_weight_to_start_from():
    with pytest.raises(UserError, match=r"target=0.5 needs the first weight of one term: gates > 0"):
        Tuning.of(conf.load("tuning", "dsmoe") | {"target": 0.5, "gates": 0.0})


def test_the_shape_of_a_split_model_is_that_of_its_source(split):
    shape = Checkpoint(split).dense_shape()
    assert (shape.width, shape.hidden, shape.layers) == (WIDTH, HIDDEN, tuple(range(LAYERS)))
