"""Router tuning in the pipeline: nodes, labels, what changes their ids, jobs that run, names that lead to them."""

import json
import shutil
from collections import Counter

import pytest

from espalier import conf, stages
from espalier.artefacts import lineage
from espalier.artefacts.store import Node, Store
from espalier.errors import UserError
from espalier.machine.hardware import Hardware
from espalier.workflow import graph
from espalier.workflow.job_requests import Requests


def project(tmp_path, monkeypatch, sweep, rest="", tasks="[maths_choice]"):
    """A copy of conf/ with one more experiment, as the working directory."""
    if not (tmp_path / "conf").exists():
        shutil.copytree(conf.directory(), tmp_path / "conf")
    monkeypatch.chdir(tmp_path)
    text = f"# @package _global_\nevaluation: {{tasks: {tasks}, limit: 4}}\n{rest}\nsweep:\n"
    (tmp_path / "conf/experiment/mine.yaml").write_text(text + "".join(f"  - {line}\n" for line in sweep))
    return Store(tmp_path / "results")


def expand(store, *overrides):
    return graph.expand("mine", list(overrides), store)


def nodes_of(experiment, stage):
    return [node for node in experiment.nodes if node.stage == stage]


EVERY = "{method: [reap, hc_smoe], method.ratio: 0.5, tuning: [none, router_lm, router_distill, router_layerwise]}"


def test_a_sweep_over_tunings_shares_the_text_and_the_teacher(tmp_path, monkeypatch):
    experiment = expand(project(tmp_path, monkeypatch, ["method: none", EVERY]))
    found = Counter(node.stage for node in experiment.nodes)
    assert (found["tune"], found["teacher"], found["apply"], found["tokens"]) == (6, 1, 2, 2)
    (teacher,) = nodes_of(experiment, "teacher")
    (fetch,) = nodes_of(experiment, "fetch")
    text = next(node for node in nodes_of(experiment, "tokens") if node.config["name"] == "embedded_tuning")
    assert teacher.parents == (fetch.id, text.id)
    applied = {node.id for node in nodes_of(experiment, "apply")}
    for node in nodes_of(experiment, "tune"):
        distils = node.config["tuning"]["objective"] == "distill"
        assert node.parents[0] in applied
        assert node.parents[1:] == ((text.id, teacher.id) if distils else (text.id,))
    tuned = {node.id for node in nodes_of(experiment, "tune")}
    assert sum(node.parents[0] in tuned for node in nodes_of(experiment, "task")) == 6
    labels = [row["label"] for row in nodes_of(experiment, "table")[0].config["rows"]]
    assert labels[:3] == ["full", "reap 50 %", "reap 50 % + router_tuning lm and norms"]
    assert len(set(labels)) == 9


def test_what_a_tuning_s_id_depends_on(tmp_path, monkeypatch):
    store = project(tmp_path, monkeypatch, ["{method: reap, method.ratio: 0.5}"])

    def ids(*overrides):
        nodes = expand(store, "tuning=router_lm", *overrides).nodes
        return {node.stage: node.id for node in nodes if node.label != "calibration"}

    before = ids()
    assert ids("tracking=offline", "runtime.device=cpu") == before
    for override in ("tuning.rate=0.5", "tuning.calibration.seed=9", "calibration@tuning.calibration=embedded_wiki"):
        after = ids(override)
        assert after["tune"] != before["tune"], override
        assert after["apply"] == before["apply"], override
    assert ids("calibration.seed=9")["tune"] != before["tune"]  # the plan is another one
    text = tmp_path / "own.txt"
    text.write_text("some words of my own")
    experiment = expand(store, "tuning=router_lm", f"calibration@tuning.calibration={text}")
    (tokens,) = [node for node in nodes_of(experiment, "tokens") if node.label == "tuning text"]
    assert tokens.config["path"] == str(text)


def test_experiments_without_tuning_keep_their_tables(tmp_path, monkeypatch):
    store = project(tmp_path, monkeypatch, ["{method: reap, method.ratio: 0.5}"])
    (table,) = nodes_of(expand(store), "table")
    assert "tuning" not in table.config["rows"][0]


def test_a_wrong_key_is_told_before_anything_runs(tmp_path, monkeypatch):
    store = project(tmp_path, monkeypatch, ["{method: reap, method.ratio: 0.5}"])
    with pytest.raises(UserError, match=r"conf/tuning/router_lm.yaml: objective='lmm'; did you mean lm"):
        expand(store, "tuning=router_lm", "tuning.objective=lmm")
    with pytest.raises(UserError, match=r"tuning=router_lmm: no conf/tuning/router_lmm.yaml; did you mean router_lm"):
        expand(store, "sweep=[{tuning: router_lmm}]")


def make(experiment, store):
    """Run all jobs of an experiment in this process, parents first."""
    graph.save(experiment, store)
    waiting = [store.read_node(path.stem) for path in sorted((store.root / "nodes").glob("*.json"))]
    waiting = {node["id"]: node for node in waiting if not node["made_by"]}
    while waiting:
        ready = [
            node
            for node in waiting.values()
            if not any((store.read_node(parent)["made_by"] or parent) in waiting for parent in node["parents"])
        ]
        for node in ready:
            stages.run(node["id"], store)
            del waiting[node["id"]]


@pytest.mark.slow
def test_the_pipeline_tunes_scores_and_names_the_result(tmp_path, monkeypatch):
    store = project(tmp_path, monkeypatch, ["method: none"])
    small = ["tuning.tokens", "tuning.calibration.samples", "tuning.calibration.length"]
    sweep = [{"method": "none"}] + [
        {
            "method": "reap",
            "method.ratio": 0.5,
            "tuning": f"router_{name}",
            **dict(zip(small, (2048, 4, 32), strict=True)),
        }
        for name in ("distill", "layerwise")
    ]
    experiment = expand(
        store, f"sweep={json.dumps(sweep)}".replace('"', ""), "calibration.samples=1", "calibration.length=64"
    )
    make(experiment, store)
    table = json.loads(store.path(experiment.target.parents[0]).read_text())
    assert table["model"]["id"] == "embedded:moe"
    labels = [line["label"] for line in table["summary"]]
    assert [label.partition(" and norms")[0] for label in labels] == [
        "full", "reap 50 % + router_tuning distill", "reap 50 % + router_tuning layerwise",
    ]  # fmt: skip
    names = sorted(path.name for path in (store.root / "refs/mine/checkpoints").iterdir())
    assert len(names) == 2
    assert names[0].startswith("reap-50%+router_tuning-distill")
    for node in nodes_of(experiment, "tune"):
        folder = store.path(node.id)
        assert json.loads((folder / "tuning.json").read_text())["curve"]
        assert (folder / "plan.json").exists()
        assert not list(folder.parent.glob(".*.partial"))
        record = json.loads((folder.parent / f"{node.id}.run.json").read_text())
        assert record["tune"]["tensors"]["replaced"] > 4
        assert "artefact" in lineage.show(store, node.id)
    links = {path.resolve() for path in (store.root / "refs/mine/checkpoints").iterdir()}
    assert links == {store.path(node.id).resolve() for node in nodes_of(experiment, "tune")}

    # A later method may follow a tuning: a plan for what was tuned, made and identified as for what was applied.
    tuned = nodes_of(experiment, "tune")[0]
    plan = Node("plan", conf.load("method", "random") | {"ratio": 0.5}, (tuned.id,))
    apply = Node("apply", {}, (tuned.id, plan.id))
    for node in (plan, apply):
        store.write_node(node)
        stages.run(node.id, store)
    written = json.loads((store.path(apply.id) / "plan.json").read_text())
    assert written["model"]["id"] == "embedded:moe"
    assert written["method"]["name"] == "reap"
    assert written["method"]["then"]["name"] == "random"


def test_jobs_ask_for_more_the_more_they_need(tmp_path, monkeypatch):
    store = project(tmp_path, monkeypatch, [EVERY])
    experiment = expand(store)
    graph.save(experiment, store)
    laptop = Hardware.load("laptop")
    requests = Requests(store, laptop, conf.load("runtime", "default"))
    costs = {node.id: requests.reckoner.cost(store.read_node(node.id)) for node in experiment.nodes
             if node.stage in ("tune", "teacher")}  # fmt: skip
    assert all(cost.memory > 5e8 and cost.flops > 1e11 and cost.kept > 1e6 for cost in costs.values())
    (teacher,) = nodes_of(experiment, "teacher")
    assert costs[teacher.id].kept == 262144 * (64 * 6 + 2)
    assert requests.of(teacher.id)["mem_mb"] >= 2000
    assert not requests.reckoner.unknown
