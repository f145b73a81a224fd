"""What a report gathers: what tokens skip, curves of trainings, the jobs of a row and the commands for it."""

import json
import re
import shlex

import numpy as np
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from espalier import conf
from espalier.artefacts.store import Store, write_json
from espalier.collecting.stats import Stats
from espalier.methods import distances_of
from espalier.plans.operations import Merge, Skip
from espalier.plans.plan import Plan
from espalier.report import skipping
from espalier.report.commands import run_command, stage_command, steps
from espalier.report.skipping import experts_run, what_tokens_skip
from espalier.training import curves
from espalier.training.fit import save_fit
from espalier.training.fit_settings import Fitting
from espalier.training.train import Step
from espalier.workflow import graph
from espalier.workflow.sweep import Composer, points
from stats_factory import make_blocks, make_shape, observe
from test_graph import project
from test_skipping_methods import DYNAMIC, experts_kept, make, plan_of, sorted_weights


@pytest.mark.parametrize("name", [*DYNAMIC, "tail", "fixed_k"])
def test_experts_that_tokens_run_are_those_of_a_loop_over_them(name):
    shape = make_shape(top_k=4)
    blocks = make_blocks(shape)
    stats = observe(blocks, shape, None)
    keys = {"rule": "tail"} if name == "tail" else {}
    plan = plan_of("naee_skip" if name == "tail" else name, blocks, shape, **keys)
    for layer in shape.layers:
        (op,) = plan.layers[layer]
        factor = None if op.factor is None else plan.tensors[op.factor].read()
        runs = experts_run(op, plan, [], layer, stats)
        expected = [experts_kept(op, *token, factor) for token in sorted_weights(blocks[layer], shape)]
        spared = np.zeros(len(runs), bool)
        if op.protect is not None:
            spared = runs == shape.top_k  # who is protected is what the method's own tests are about
        assert runs[~spared].tolist() == np.array(expected)[~spared].tolist()
        assert runs.mean() == pytest.approx(plan.evidence[layer]["experts_per_token"])


def test_a_factor_is_looked_up_for_the_experts_that_picks_became():
    weights = np.array([[0.6, 0.4], [0.6, 0.4]], np.float32)
    arrays = {"weights": weights, "experts": np.array([[0, 1], [0, 2]], np.int32), "probability": weights}
    stats = Stats(make_shape(), (2,), {("routing", 0): arrays})
    factor = np.ones((4, 4), np.float32)
    factor[0, 1] = 2  # stored expert 1 is what 2 and 3 became
    from espalier.plans.plan_tensors import PlanTensor

    plan = Plan({}, {0: (Skip(0.5, factor="f"),)}, tensors={"f": PlanTensor.of(factor)})
    merged = Plan({}, {0: (Merge(((0, 1), (2, 3)), ((0.5, 0.5), (0.5, 0.5))),)})
    assert experts_run(plan.layers[0][0], plan, [merged], 0, stats).tolist() == [2, 1]
    assert experts_run(plan.layers[0][0], plan, [], 0, stats).tolist() == [1, 2]


def test_shares_add_up_and_the_extreme_tokens_are_found():
    runs = np.array([1, 2, 2, 2, 1, 1] * skipping.LEAST)
    weights = np.where(runs[:, None] == 2, [[0.5, 0.5]], [[0.9, 0.1]]).astype(np.float32)
    arrays = {"weights": weights, "experts": np.zeros((len(runs), 2), np.int32), "probability": weights}
    stats = Stats(make_shape(), (len(runs),), {("routing", n): arrays for n in (0, 1)})
    ids = np.array([7, 8, 8, 9, 7, 9] * skipping.LEAST)
    ids[0] = 11  # occurs too rarely to be listed
    found = what_tokens_skip([Plan({}, {0: (Skip(0.5),), 1: (Skip(0.5),)})], stats, ids)
    assert found is not None
    assert found.shares[0].tolist() == [0.5, 0.5]
    assert [(word.id, word.experts) for word in found.fewest] == [(7, 1.0)]
    assert [(word.id, word.experts) for word in found.most] == [(8, 2.0)]
    assert what_tokens_skip([Plan({}, {})], stats, ids) is None


@pytest.mark.parametrize("name", ["hc_smoe", "kmeans", "m_smoe", "sub_moe", "ream"])
def test_distances_of_merging_methods_are_symmetric_and_follow_the_experts(name):
    shape = make_shape()
    blocks = make_blocks(shape)
    found = distances_of(make(name, ratio=0.5), observe(blocks, shape, None), shape)
    assert list(found) == list(shape.layers)
    for apart in found.values():
        assert apart.shape == (shape.experts, shape.experts)
        assert np.array_equal(apart, apart.T)
        assert (np.diag(apart) <= 1e-12).all()
        assert (apart[~np.eye(shape.experts, dtype=bool)] > 0).all()


def test_methods_without_groups_have_no_distances():
    shape = make_shape()
    assert distances_of(make("reap", ratio=0.5), Stats.empty(shape), shape) == {}
    assert distances_of(make("hc_smoe", ratio=0.5, similarity="weight"), Stats.empty(shape), shape) == {}


def test_curves_of_tunings_and_fits_are_read(tmp_path):
    rows = [{"step": n, "tokens": 64 * n, "seconds": 1.0, "loss": 3 / n, "terms": {"lm": 3 / n}} for n in (1, 2)]
    record = {"format": "espalier.tuning/1", "tuning": {"name": "router_lm"}, "curve": rows}
    write_json(tmp_path / "tuned/tuning.json", record)
    (curve,) = curves.of_tuning(tmp_path / "tuned", "a")
    assert (curve.kind, curve.unit, curve.places, curve.layer) == ("router_lm", "tokens", (64, 128), None)
    assert curve.terms == {"lm": (3.0, 1.5)}
    layered = [row | {"layer": layer} for layer in (2, 5) for row in rows]
    write_json(tmp_path / "tuned/tuning.json", record | {"curve": layered})
    assert [curve.layer for curve in curves.of_tuning(tmp_path / "tuned", "a")] == [2, 5]
    assert curves.of_tuning(tmp_path / "gone", "a") == []

    steps_of_fit = [Step(1, {"distill": 2.0, "budget": 1.0}, 0.1), Step(2, {"distill": 1.0, "budget": 0.5}, 0.2)]
    save_fit(tmp_path / "fit.safetensors", Stats.empty(make_shape()), Fitting("tomoe", 0.1, 1, 1), steps_of_fit)
    fit = curves.of_fit(tmp_path / "fit.safetensors", "b")
    assert fit is not None
    assert (fit.kind, fit.unit, fit.places) == ("tomoe", "steps", (1, 2))
    assert fit.terms == {"distill": (2.0, 1.0), "budget": (1.0, 0.5)}
    assert curves.of_fit(tmp_path / "gone", "b") is None


def test_the_command_of_a_row_makes_that_row_and_the_full_model(tmp_path, monkeypatch):
    sweep = [
        "method: none",
        "{method: [reap, random], method.ratio: [0.25, 0.5], zip: {method.seed: [0, 1]}}",
        '{as: it\'s "new", method: hc_smoe, method.ratio: 0.5, method@then: naee_skip}',
    ]
    sweep[1] = "{method: random, method.ratio: [0.25, 0.5], method.seed: [0, 1]}"
    store = project(tmp_path, monkeypatch, sweep)
    overrides = ["evaluation.tasks=[perplexity_maths]", "calibration.samples=2"]
    whole = graph.expand("mine", overrides, store)
    how, rows = whole.target.config["_run"], whole.nodes[-2].config["rows"]
    assert len(rows) == len(how["points"]) == 6
    for number in (1, 4, 5):
        words = shlex.split(run_command("mine", how, store.root, [0, number]))
        assert words[:3] == ["espalier", "run", "mine"]
        assert words[-2:] == ["--results", str(store.root)]
        alone = graph.expand(words[2], words[3:-2], store)
        assert alone.nodes[-2].config["rows"] == [rows[0], rows[number]]
    again = shlex.split(run_command("mine", how, store.root))
    assert graph.expand(again[2], again[3:-2], store).target.id == whole.target.id


def test_how_a_run_was_asked_for_is_no_part_of_the_report():
    node = graph.Node("report", {"experiment": "mine"}, ("0" * 12,))
    asked = graph.Node("report", {"experiment": "mine", "_run": {"overrides": ["a=1"], "points": []}}, ("0" * 12,))
    assert node.id == asked.id


@pytest.mark.parametrize("experiment", conf.names("experiment"))
def test_points_of_all_experiments_survive_hydras_grammar(experiment):
    found = list(points(Composer(experiment, []).sweep()))
    for number, point in enumerate(found):
        command = run_command(experiment, {"points": found}, Store().root, [number])
        (override,) = OverridesParser.create().parse_overrides([shlex.split(command)[-1]])
        assert list(points(override.value())) == [point]


def test_points_with_named_values_survive_it_too():
    sweep = [
        {"as": "a name", "method.layers": {"early": [0, 1], "late, or so": [4]}, "zip": {"x.y": {"one": {"k": [1]}}}}
    ]
    sweep += [{"method": {"mine": "naee"}, "method.ratio": [0.25, 0.5], "list": [[1, 2]]}]
    found = list(points(sweep))
    assert len(found) == 4
    for number, point in enumerate(found):
        command = run_command("demo", {"points": found}, Store().root, [number])
        (override,) = OverridesParser.create().parse_overrides([shlex.split(command)[-1]])
        assert list(points(override.value())) == [point]


NASTY = [
    "a'b",
    "back\\slash",
    "end\\",
    "it\\'s",
    "true",
    "Null",
    "3",
    "1e3",
    "a b",
    "x,y",
    "{}",
    "[]",
    "${seed}",
    "",
    "ü<>",
    "a:b",
]


@pytest.mark.parametrize("value", [*NASTY, 0, 1.5, 1e-5, True, None, [1, "a'"], []])
def test_values_survive_hydras_grammar(value):
    given = {"label": "n", "method.key": value, "paper.method": "n"}
    command = run_command("x", {"points": [given]}, Store().root, [0])
    (override,) = OverridesParser.create().parse_overrides([shlex.split(command)[-1]])
    (point,) = points(override.value())
    assert json.dumps(point, sort_keys=True) == json.dumps(given)


def test_jobs_of_a_row_stand_after_those_that_they_read(tmp_path, monkeypatch):
    sweep = ["method: none", "{method: naee, method.ratio: 0.5, method@then: naee_skip}"]
    store = project(tmp_path, monkeypatch, sweep)
    whole = graph.expand("mine", [], store)
    graph.save(whole, store)
    row = whole.nodes[-2].config["rows"][1]
    jobs = steps(row, store)
    stages = [step.node["stage"] for step in jobs]
    assert stages.count("collect") == stages.count("plan") == stages.count("apply") == 2
    assert (stages[0], stages[-1]) == ("fetch", "score")
    seen = set()
    for step in jobs:
        made = {parent["made_by"] or parent["id"] for parent in map(store.read_node, step.node["parents"])}
        assert made <= seen
        seen.add(step.node["id"])
        assert step.command == f"espalier {step.node['stage']} {step.node['id']} --results {store.root}"
        assert step.record == {}  # nothing ran
    assert jobs[-1].what == "perplexity_maths, maths_choice"
    assert re.fullmatch(r"espalier plan [0-9a-f]{12}", stage_command(jobs[-1].node | {"stage": "plan"}, Store().root))
