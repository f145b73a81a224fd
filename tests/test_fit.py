"""The stage fit: what it writes, that interruptions change no byte, what it refuses; its nodes, jobs and costs."""

import json
import os
import re
import shutil
import signal
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors import safe_open

from espalier import compress, conf, stages
from espalier.artefacts import lineage
from espalier.artefacts.store import Store
from espalier.checkpoints.checkpoint import Checkpoint
from espalier.collecting.stats import Stats
from espalier.costs.estimate import forward_flops
from espalier.costs.sizes import sizes_of_directory
from espalier.errors import InterruptedWork, UserError
from espalier.fits import fit_class, names
from espalier.machine.hardware import Hardware
from espalier.methods import evidence_of
from espalier.methods.diep import Diep
from espalier.models.running import Running
from espalier.plans.plan import Plan
from espalier.probes import PROBES
from espalier.training import train
from espalier.training.fit import fit, save_fit
from espalier.training.fit_settings import Fitting
from espalier.workflow import garbage, graph
from espalier.workflow.job_requests import Requests
from tiny import FAMILIES

CPU = Running.of(device="cpu", stream="never")
IDS = np.random.default_rng(0).integers(3, 90, (6, 8)).astype(np.int32)
MASK = np.ones_like(IDS)
MASK[::2, -3:] = 0
SMALL = Diep(0.5, epochs=1, batch=6, rate=0.01).fit


def learn(directory, path, fitting=SMALL, mask=None, state=None, ids=IDS, **more):
    """Run the stage into `path` as a job does and return the statistics."""
    stats, curve = fit(directory, fitting, ids, mask, CPU, state or path.with_suffix(".state"), **more)
    save_fit(path, stats, fitting, curve)
    return stats


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns(family, tiny_model, tmp_path):
    found = learn(tiny_model(family), tmp_path / "fit", Diep(0.5, epochs=4, batch=6, rate=0.01).fit, MASK)
    shape = Checkpoint(tiny_model(family)).shape()
    read = Stats.load(tmp_path / "fit")
    assert (read.shape, read.sequence_tokens) == (shape, tuple(MASK.sum(1).tolist()))
    for layer, learnt in read.layers("diep"):
        assert learnt["alpha"].shape == (shape.experts,)
        assert learnt["alpha"].any()
        assert learnt["beta"].shape == (1,)
        assert learnt["beta"] != 1
        assert np.array_equal(found.layer("diep", layer)["alpha"], learnt["alpha"])


def test_the_file_says_how_it_was_learnt(tiny_model, tmp_path):
    learn(tiny_model("mixtral"), tmp_path / "fit")
    with safe_open(tmp_path / "fit", "numpy") as file:
        header = file.metadata()
        assert sorted(file.keys()) == [f"diep.{layer}.{name}" for layer in range(3) for name in ("alpha", "beta")]
    assert Fitting(**json.loads(header["fit"])) == SMALL
    (terms,) = json.loads(header["curve"])
    assert sorted(terms) == ["lm", "output"]


def test_a_half_precision_model_learns_in_full(tiny_model, tmp_path):
    learnt = learn(tiny_model("qwen3_moe", "bfloat16"), tmp_path / "fit", dtype="auto").layer("diep", 0)
    assert learnt["alpha"].dtype == np.float32
    assert np.isfinite(learnt["alpha"]).all()


def test_masked_tokens_do_not_count(tiny_model, tmp_path):
    texts = {"one": IDS, "two": np.where(MASK, IDS, 50)}
    stats = [learn(tiny_model("mixtral"), tmp_path / name, mask=MASK, ids=ids) for name, ids in texts.items()]
    for layer in range(3):
        one, two = (each.layer("diep", layer)["alpha"] for each in stats)
        assert one == pytest.approx(two, rel=1e-4, abs=1e-7)


class StopError(Exception):
    pass


def interrupt_after(monkeypatch, steps, how):
    """Let training stop after so many steps: `signal` as SIGTERM does, `kill` in the middle of a step."""
    plain, seen = train._update, []

    def update(*arguments):
        seen.append(1)
        if how == "kill" and len(seen) > steps:
            raise StopError
        plain(*arguments)
        if how == "signal" and len(seen) == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train, "_update", update)
    return lambda: monkeypatch.setattr(train, "_update", plain)


@pytest.mark.parametrize("steps", [2, 4, 5])  # before the first update of beta, after it, and later
@pytest.mark.parametrize("how", ["signal", "kill"])
def test_an_interrupted_fit_ends_with_the_same_bytes(how, steps, tiny_model, tmp_path, monkeypatch):
    directory, fitting = tiny_model("mixtral"), Diep(0.5, epochs=3, batch=2, rate=0.02).fit
    learn(directory, tmp_path / "whole", fitting, MASK)
    monkeypatch.setattr(train.TrainingState, "due", lambda state: True)
    restore = interrupt_after(monkeypatch, steps, how)
    with pytest.raises(InterruptedWork if how == "signal" else StopError) as stopped:
        learn(directory, tmp_path / "parts", fitting, MASK)
    if how == "signal":
        assert re.search(rf"stopped by SIGTERM after step {steps} of 9; the same command goes on", str(stopped.value))
    restore()
    assert not (tmp_path / "parts").exists()
    done = []
    monkeypatch.setattr(train, "_update", lambda *a, plain=train._update: (done.append(1), plain(*a)))
    learn(directory, tmp_path / "parts", fitting, MASK)
    assert len(done) == 9 - steps
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()


def test_the_state_of_another_fit_is_not_used(tiny_model, tmp_path):
    directory, state = tiny_model("mixtral"), tmp_path / "state"
    for number, seed in enumerate((0, 1)):
        learn(directory, tmp_path / f"fit{number}", Diep(0.5, epochs=1, batch=2, seed=seed).fit, state=state)
    learn(directory, tmp_path / "fit2", Diep(0.5, epochs=1, batch=2, seed=1).fit)
    files = [(tmp_path / f"fit{number}").read_bytes() for number in range(3)]
    assert files[1] == files[2] != files[0]


def test_a_model_that_does_not_fit_is_refused_in_a_line(tiny_model, tmp_path):
    running = Running.of(device="cpu", stream="always")
    with pytest.raises(UserError, match=r"^conf/method/diep.yaml: learns by running the whole model, and .* Use a"):
        fit(tiny_model("mixtral"), SMALL, IDS, None, running, tmp_path / "state")
    assert not (tmp_path / "state").exists()


def test_fits_have_names_of_their_own_and_settings_that_are_checked():
    assert not set(names()) & set(PROBES)
    assert all(issubclass(fit_class(name), torch.nn.Module) for name in names())
    assert evidence_of(Diep(0.5)) == ("diep",)
    for key, value in (("schedule", "step"), ("accumulation", 0), ("clip", 0), ("epochs", True), ("rate", "fast")):
        with pytest.raises(UserError, match=f"^conf/method/tomoe.yaml: {key}="):
            Fitting(**({"name": "tomoe", "rate": 0.1, "epochs": 1} | {key: value}))
    assert Fitting("tomoe", 0.1, epochs=3, batch=4).steps(6, 16) == 5  # 18 sequences, four a step


def project(tmp_path, monkeypatch, sweep):
    """A copy of conf/ with one more experiment, as the working directory."""
    shutil.copytree(conf.directory(), tmp_path / "conf")
    monkeypatch.chdir(tmp_path)
    text = "# @package _global_\nevaluation: {tasks: [maths_choice], limit: 4}\nsweep:\n"
    (tmp_path / "conf/experiment/mine.yaml").write_text(text + "".join(f"  - {line}\n" for line in sweep))
    return Store(tmp_path / "results")


def nodes_of(experiment, stage):
    return [node for node in experiment.nodes if node.stage == stage]


EVERY = "{method: diep, method.ratio: [0.25, 0.5], method.budget: [global, uniform]}"


def test_one_fit_serves_all_ratios_and_budgets(tmp_path, monkeypatch):
    store = project(tmp_path, monkeypatch, [EVERY, "{method: reap, method.ratio: 0.5}"])
    experiment = graph.expand("mine", [], store)
    found = Counter(node.stage for node in experiment.nodes)
    assert (found["fit"], found["plan"], found["tokens"], found["fetch"]) == (1, 5, 1, 1)
    (learnt,), (fetch,), (tokens,) = (nodes_of(experiment, stage) for stage in ("fit", "fetch", "tokens"))
    assert learnt.parents == (fetch.id, tokens.id)
    assert [plan.parents for plan in nodes_of(experiment, "plan")][:4] == [(fetch.id, learnt.id)] * 4

    def fit_ids(*overrides):
        return {node.id for node in nodes_of(graph.expand("mine", list(overrides), store), "fit")}

    def again(settings):
        return fit_ids(f"sweep=[{{method: diep, method.ratio: 0.5, {settings}}}]")

    assert again("method.budget: global") == {learnt.id}
    assert fit_ids("tracking=offline", "runtime.device=cpu") == {learnt.id}
    for change in ("method.epochs: 3", "method.rate: 0.5", "method.seed: 7", "calibration.seed: 9"):
        assert again(change).isdisjoint({learnt.id}), change
    (second,) = again("method: reap, method@then: diep")
    assert second != learnt.id  # of the model that the first method leaves


def test_the_pipeline_learns_plans_and_applies(tmp_path, monkeypatch):
    store = project(tmp_path, monkeypatch, ["{method: diep, method.ratio: [0.25, 0.5], method.epochs: 1}"])
    experiment = graph.expand("mine", ["calibration.samples=1", "calibration.length=32"], store)
    graph.save(experiment, store)
    for node in experiment.nodes:
        if node.stage in ("fetch", "tokens", "fit", "plan", "apply"):
            stages.run(node.id, store)
    (learnt,) = nodes_of(experiment, "fit")
    (tokens,) = nodes_of(experiment, "tokens")
    lefts = []
    for plan, applied in zip(nodes_of(experiment, "plan"), nodes_of(experiment, "apply"), strict=True):
        found = Plan.load(store.path(plan.id))
        lefts.append(sum(len(operation.experts) for (operation,) in found.layers.values()))
        assert tokens.config["name"] in (store.path(applied.id) / "README.md").read_text()
    assert lefts == [48, 32]
    record = json.loads(store.path(learnt.id).with_name(f"{learnt.id}.run.json").read_text())
    assert record["fit"]["steps"] == 1
    assert store.path(learnt.id).parent.name == "fits"
    assert not list(store.path(learnt.id).parent.glob(".*"))
    assert "fit" in lineage.show(store, learnt.id)
    assert learnt.id not in str(garbage.find(store))


def test_jobs_ask_for_more_the_more_they_need(tmp_path, monkeypatch):
    store = project(tmp_path, monkeypatch, ["{method: diep, method.ratio: 0.5, method.epochs: [1, 4]}"])
    experiment = graph.expand("mine", [], store)
    graph.save(experiment, store)
    requests = Requests(store, Hardware.load("laptop"), conf.load("runtime", "default"))
    one, four = (requests.reckoner.cost(store.read_node(node.id)) for node in nodes_of(experiment, "fit"))
    sizes = sizes_of_directory(conf_model())
    assert one.flops == 2 * forward_flops(sizes, 16384, 256)
    assert four.flops == 4 * one.flops
    assert four.memory == one.memory > 5e8
    assert not requests.reckoner.unknown
    assert requests.of(nodes_of(experiment, "fit")[0].id)["mem_mb"] >= 2000


def conf_model():
    from espalier.inputs.assets import model_directory

    return model_directory()


def test_one_call_compresses_and_goes_on_after_a_signal(tiny_model, tmp_path, monkeypatch):
    ids = torch.from_numpy(np.tile(IDS, (2, 1)).astype(np.int64))
    from safetensors.torch import save_file

    save_file({"input_ids": ids}, tmp_path / "tokens.safetensors")
    given = {"ratio": 0.25, "epochs": 1, "batch": 2, "prove": False, "results": tmp_path / "results"}

    def run(out):
        return compress(tiny_model("mixtral"), "diep", tmp_path / "tokens.safetensors", tmp_path / out, **given)

    run("whole")
    plan = Plan.load(tmp_path / "whole" / "plan.json")
    assert sum(len(operation.experts) for (operation,) in plan.layers.values()) == 18
    restore = interrupt_after(monkeypatch, 4, "signal")
    with pytest.raises(InterruptedWork):
        run("parts")
    restore()
    done = []
    monkeypatch.setattr(train, "_update", lambda *a, plain=train._update: (done.append(1), plain(*a)))
    run("parts")
    assert len(done) == 2
    for name in ("plan.json", "model.safetensors", "config.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("kind", ["keep", "remap", "skip"])
def test_a_compressed_model_can_be_learnt_from(kind, applied, tmp_path):
    _, compressed, _ = applied("mixtral", kind)
    for _, learnt in learn(compressed, tmp_path / "fit").layers("diep"):
        assert learnt["alpha"].any()
