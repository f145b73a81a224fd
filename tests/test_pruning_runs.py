"""Pruning methods from a model on disk to a checkpoint, in one call and as nodes of an experiment."""

import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import espalier
from espalier import conf, stages
from espalier.artefacts.store import Store
from espalier.errors import UserError
from espalier.models import runtime
from espalier.plans.operations import Keep
from espalier.plans.plan import Plan
from espalier.workflow import graph
from tiny import save_tiny

pytestmark = pytest.mark.usefixtures("proof_here")

GROWN = {0: (1, 2, 6, 7), 1: (0, 3, 4, 5), 2: (2, 3, 5, 7)}  # experts whose router rows are longer than the base's


def rewrite(directory, change):
    """Pass each tensor of a tiny model through `change` (name, tensor)."""
    path = directory / "model.safetensors"
    tensors = {name: change(name, tensor) for name, tensor in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    return directory


def shrunk(name, tensor):
    if not name.endswith("mlp.gate.weight"):
        return tensor
    tensor = tensor.clone()
    tensor[list(GROWN[int(name.split(".")[2])])] *= 0.5
    return tensor


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, the base that it was fine-tuned from, and a token file."""
    base = tmp_path_factory.mktemp("models")
    save_tiny("olmoe", base / "tuned")
    rewrite(shutil.copytree(base / "tuned", base / "before"), shrunk)
    np.savez(base / "tokens.npz", input_ids=np.random.default_rng(0).integers(3, 95, (6, 24)))
    return base


def compress(folder, method, model="tuned", **settings):
    out = folder / f"{model}-{method}-{len(list(folder.iterdir()))}"
    report = espalier.compress(
        folder / model, method, folder / "tokens.npz", out, results=folder / "results", **({"ratio": 0.5} | settings)
    )
    return out, report


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("mone", {}),
        ("mone", {"budget": "global"}),
        ("camera_p", {}),
        ("camera_p", {"scope": "expert"}),
        ("stun", {"kappa": 9, "lambda2": 0.3}),
    ],
)
def test_checkpoints_load_and_compute_what_the_plan_says(folder, method, settings):
    out, report = compress(folder, method, **settings)
    proof = report["apply"][0]["proof"]
    assert proof["max_abs_diff"] <= proof["tolerance"] * proof["max_abs_logit"]
    assert report["counts"]["unique"] < report["source_parameters"]
    assert Plan.load(out / "plan.json").method["name"] == method


def test_aimer_reads_weights_only(folder):
    out, _ = compress(folder, "aimer", prove=False)
    assert "Calibration | none" in " ".join((out / "README.md").read_text().replace("|", " | ").split())
    weights = load_file(folder / "tuned/model.safetensors")
    for layer, (operation,) in Plan.load(out / "plan.json").layers.items():
        values = []
        for e in range(8):
            parts = [weights[f"model.layers.{layer}.mlp.experts.{e}.{p}_proj.weight"] for p in ("gate", "up", "down")]
            flat = torch.cat([part.flatten() for part in parts]).double()
            values.append(float(flat.abs().mean() / flat.square().mean().sqrt()))
        assert operation == Keep(tuple(sorted(sorted(range(8), key=lambda e, v=values: v[e])[:4])))


def test_narrowing_dead_neurons_changes_no_logit(folder):
    def kill(name, tensor):
        tensor = tensor.clone()
        if ".experts." in name and "down_proj" in name:
            tensor[:, ::2] = 0
        return tensor

    rewrite(shutil.copytree(folder / "tuned", folder / "half"), kill)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = runtime.load(folder / "half")(ids).logits
        for settings in ({}, {"scope": "expert"}):
            out, report = compress(folder, "camera_p", model="half", prove=False, **settings)
            torch.testing.assert_close(runtime.load(out)(ids).logits, expected, rtol=1e-4, atol=1e-5)
            assert report["source_parameters"] - report["counts"]["stored"] == 3 * 8 * 12 * 3 * 32


def test_router_norm_compares_with_the_base(folder):
    out, _ = compress(folder, "router_norm", base=str(folder / "before"), prove=False)
    plan = Plan.load(out / "plan.json")
    assert {layer: operation.experts for layer, (operation,) in plan.layers.items()} == GROWN


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"^conf/method/router_norm.yaml: base is not given. Name the model that this one was fine-tuned from"),
        ({"base": "./nowhere"}, r"^./nowhere: no such directory"),
    ],
)
def test_a_base_that_is_not_there_is_refused_and_leaves_nothing(folder, settings, message):
    before = sorted(folder.iterdir())
    with pytest.raises(UserError, match=message):
        compress(folder, "router_norm", **settings)
    assert sorted(folder.iterdir()) == before


def test_camera_ratio_is_of_neurons_and_mone_may_replace_all_but_one(folder):
    _, report = compress(folder, "camera_p", ratio=0.05, prove=False)  # 10 of 192 neurons: less than one expert
    assert report["source_parameters"] - report["counts"]["unique"] == 3 * 10 * 3 * 32
    _, report = compress(folder, "mone", ratio=0.875, prove=False)
    assert report["source_parameters"] - report["counts"]["unique"] == 3 * 7 * (3 * 24 * 32 - 32)
    with pytest.raises(UserError, match=r"mone.yaml: ratio=0.99 leaves none of 8 experts"):
        compress(folder, "mone", ratio=0.99)


@pytest.fixture
def project(folder, tmp_path, monkeypatch):
    """An experiment with the methods that need no data, in a copy of conf/; return its store and overrides."""
    shutil.copytree(conf.directory(), tmp_path / "conf")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder / "before", tmp_path / "before")
    sweep = "[{method: [aimer, stun, random], method.ratio: 0.5}, {method: router_norm, method.base: ./before}]"
    text = f"# @package _global_\nevaluation: {{tasks: [maths_choice], limit: 4}}\nsweep: {sweep}\n"
    (tmp_path / "conf/experiment/mine.yaml").write_text(text)
    return Store(tmp_path / "results"), [f"model.id={folder / 'tuned'}"]


def test_methods_without_probes_make_no_tokens_and_collect_nothing(project):
    store, overrides = project
    experiment = graph.expand("mine", overrides, store)
    graph.save(experiment, store)
    written = Counter(store.read_node(path.stem)["stage"] for path in (store.root / "nodes").iterdir())
    assert (written["plan"], written["apply"], written["fetch"]) == (4, 4, 2)
    assert not {"tokens", "probe", "collect"} & set(written)


def test_the_base_is_a_parent_whose_content_decides_the_plan(project, folder):
    store, overrides = project
    experiment = graph.expand("mine", overrides, store)
    graph.save(experiment, store)
    nodes = {node.id: node for node in experiment.nodes}
    plan = next(node for node in nodes.values() if node.stage == "plan" and node.config["name"] == "router_norm")
    model, base = (nodes[id] for id in plan.parents)
    assert (model.config["id"], base.config["id"]) == (str(folder / "tuned"), "./before")
    for node in (model, base, plan):
        stages.run(node.id, store)
    made = Plan.load(store.path(store.read_node(plan.id)))
    assert {layer: operation.experts for layer, (operation,) in made.layers.items()} == GROWN
    assert made.model["id"] == str(folder / "tuned")  # the plan is for the first
    rewrite(store.root.parent / "before", lambda name, tensor: tensor * 1.25 if "gate.weight" in name else tensor)
    ids = {node.id for node in graph.expand("mine", overrides, Store(store.root)).nodes if node.stage == "plan"}
    assert plan.id not in ids
    assert len(ids & set(nodes)) == 3


def test_an_experiment_without_a_base_is_refused_before_anything_runs(project):
    store, overrides = project
    with pytest.raises(UserError, match=r"^conf/method/router_norm.yaml: base is not given"):
        graph.expand("mine", [*overrides, "sweep=[{method: router_norm}]"], store)
