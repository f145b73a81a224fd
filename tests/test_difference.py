"""Why two results differ: keys by stage, the furthest upstream first, code and machine, values."""

import json

import pytest

from espalier import cli
from espalier.artefacts.difference import Change, compare, resolve
from espalier.artefacts.store import Store, run_record_path, write_json
from espalier.errors import UserError
from espalier.workflow import graph
from test_graph import project

SWEEP = [
    "method: none",
    "{method: [reap, naee], method.ratio: 0.5}",
    "{method: reap, method.ratio: 0.25}",
    "{method: random, method.ratio: 0.5, method.seed: [0, 1]}",
]


def made(tmp_path, monkeypatch, sweep, name="mine", rest="", commit="a" * 40, score=0.5, only=None):
    """An experiment whose scores, plans and their run records are there: the scores rise from one to the next."""
    project(tmp_path, monkeypatch, sweep, name, rest)
    store = Store(only or tmp_path / "results")
    experiment = graph.expand(name, [], store)
    graph.save(experiment, store)
    facts = {
        "commit": commit,
        "dirty": False,
        "versions": {"torch": "2.13.0"},
        "host": "here",
        "runtime": {"device": "cpu"},
    }
    for node in experiment.nodes:
        path = store.path(node.id)
        if node.stage not in ("task", "plan") or path.exists():
            continue
        if node.stage == "task":
            tasks = store.read_node(store.read_node(node.id)["made_by"])["config"]["tasks"]
            values = {task["task"]: {"value": score + n / 10} for n, task in enumerate(tasks)}
            write_json(path, {"format": "espalier.scores/1", "tasks": values})
            score *= 0.5
        else:
            keep = [{"op": "keep", "experts": [0, 1 + len(node.config["name"])]}]
            write_json(
                path, {"format": "espalier.plan/1", "layers": {"0": [{"op": "keep", "experts": [0]}], "1": keep}}
            )
        write_json(run_record_path(path), {"format": "espalier.run/1"} | facts)
    return store


def between(store, a, b, other=None):
    return compare(resolve(store, a), resolve(other or store, b))


def keys(changes):
    return [(change.stage, change.key, change.a, change.b) for change in changes]


def test_rows_differ_in_a_key_of_their_method(tmp_path, monkeypatch):
    store = made(tmp_path, monkeypatch, SWEEP)
    found = between(store, "mine:reap 50 %", "mine:reap 25 %")
    assert keys(found.changes) == [("plan", "ratio", 0.5, 0.25)]
    assert found.followers == ["apply", "task"]
    assert found.facts == []
    scores = [store.read_node(id) for id in resolve(store, "mine:reap 50 %").nodes.values()]
    documents = {node["config"]["task"]: json.loads(store.path(node).read_text())["tasks"] for node in scores}
    assert {value.name: value.a for value in found.values} == {
        task: tasks[task]["value"] for task, tasks in documents.items()
    }
    assert all(value.b < value.a for value in found.values)


def test_what_lies_furthest_upstream_stands_first(tmp_path, monkeypatch):
    made(tmp_path, monkeypatch, SWEEP)
    rest = "calibration: {samples: 3}\nmodel: {dtype: bfloat16}"
    store = made(tmp_path, monkeypatch, [*SWEEP[:1], "{method: naee, method.ratio: 0.5}"], "other", rest)
    found = between(store, "mine:reap 50 %", "other:naee 50 %")
    stages = [change.stage for change in found.changes]
    assert stages == sorted(stages, key=["fetch", "tokens", "probe", "plan", "apply", "task"].index)
    assert ("tokens", "samples", 16, 3) in keys(found.changes)
    assert ("task", "dtype", "float32", "bfloat16") in keys(found.changes)
    assert ("plan", "name", "reap", "naee") in keys(found.changes)
    assert ("probe", "probe", "output_norm", "residual_gram") in keys(found.changes)
    assert ("plan", "mode", "(none)", "layerwise") in keys(found.changes)
    assert len(found.changes) == len(set(map(str, found.changes)))  # tasks that all differ alike are one line


def test_a_step_that_only_one_has_is_told_by_its_settings(tmp_path, monkeypatch):
    sweep = [*SWEEP, "{method: reap, method.ratio: 0.5, method@then: naee_skip}", "{tuning: router_lm}"]
    store = made(tmp_path, monkeypatch, sweep)
    found = keys(between(store, "mine:full", "mine:reap 50 %").changes)
    assert {("plan", "name", "(none)", "reap"), ("plan", "ratio", "(none)", 0.5)} <= set(found)
    assert {(stage, a) for stage, _, a, _ in found} == {("plan", "(none)")}
    back = keys(between(store, "mine:reap 50 %", "mine:full").changes)
    assert back == [(stage, key, b, a) for stage, key, a, b in found]
    tuned = next(row for row in resolve(store, "mine").nodes if row.startswith("full + router_tuning")).rpartition(":")[
        0
    ]
    stages = [change.stage for change in between(store, "mine:reap 50 %", f"mine:{tuned}").changes]
    assert set(stages) == {"plan", "tune"}
    skipping = keys(between(store, "mine:reap 50 %", "mine:reap 50 % + naee_skip").changes)
    assert ("plan", "name", "reap", "naee_skip") in skipping
    assert ("plan", "name", "(none)", "reap") in skipping


def test_equal_results_of_other_code_are_told_apart(tmp_path, monkeypatch):
    store = made(tmp_path, monkeypatch, SWEEP)
    theirs = made(tmp_path, monkeypatch, SWEEP, commit="b" * 40, score=0.75, only=tmp_path / "theirs")
    found = between(store, "mine:naee 50 %", "mine:naee 50 %", theirs)
    assert found.changes == []
    assert found.facts == [Change("task, plan", "commit", "a" * 40, "b" * 40, 0)]
    assert [value.b > value.a for value in found.values] == [True, True]
    same = between(store, "mine:naee 50 %", "mine:naee 50 %")
    assert (same.changes, same.facts) == ([], [])
    assert all(value.a == value.b for value in same.values)
    assert same.same == 2


def test_whole_tables_and_single_nodes(tmp_path, monkeypatch):
    made(tmp_path, monkeypatch, SWEEP)
    store = made(tmp_path, monkeypatch, SWEEP[1:3], "fewer", "calibration: {seed: 9}")
    found = between(store, "mine", "fewer")
    assert keys(found.changes)[0] == ("tokens", "seed", 0, 9)
    assert {change.stage for change in found.changes} == {"tokens"}
    assert {value.name.split(":")[0] for value in found.values if value.b is None} == {
        "full",
        "random 50 % seed 0",
        "random 50 % seed 1",
    }
    plans = [
        next(
            node.id
            for node in graph.expand(name, [], store).nodes
            if node.label == "reap 50 %" and node.stage == "plan"
        )
        for name in ("mine", "fewer")
    ]
    one = between(store, *plans)
    assert keys(one.changes) == [("tokens", "seed", 0, 9)]
    assert one.followers == ["probe", "plan"]
    assert {value.name for value in one.values} == {"plan layer 0", "plan layer 1"}
    by_path = between(store, str(store.path(plans[0])), plans[1][:8])
    assert by_path.a.nodes == {"plan": plans[0]}


def test_seeds_have_names_and_mistakes_one_line(tmp_path, monkeypatch):
    store = made(tmp_path, monkeypatch, SWEEP)
    assert resolve(store, "mine:random 50 %").name == "mine: random 50 % seed 0"
    found = between(store, "mine:random 50 %", "mine:random 50 % seed 1")
    assert keys(found.changes) == [("plan", "seed", 0, 1)]
    for text, message in (
        ("mine:reap 51 %", "no such row in the table of mine; did you mean reap 50 %"),
        ("mime:reap 50 %", "no table of 'mime'.*; did you mean mine"),
        ("zzz", "no node in .* starts with this"),
    ):
        with pytest.raises(UserError, match=message):
            resolve(store, text)


def test_files_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    store = made(tmp_path, monkeypatch, SWEEP)
    row = resolve(store, "mine:naee 50 %")
    task = next(iter(row.nodes.values()))
    plan = store.read_node(store.read_node(store.read_node(task)["parents"][0])["parents"][1])["id"]
    for path, a in (
        (store.path(task), "mine:naee 50 %"),
        (run_record_path(store.path(task)), "mine:naee 50 %"),
        (store.path(plan), plan),
    ):
        whole = path.read_text()
        path.write_text(whole[: len(whole) // 2])
        with pytest.raises(UserError, match=rf"{path.name}: not JSON"):
            between(store, a, "mine:reap 50 %")
        path.write_text(whole)


def test_the_command_prints_tables(tmp_path, monkeypatch, capsys):
    store = made(tmp_path, monkeypatch, [*SWEEP, "{as: '[bold]odd[/bold]', method: reap, method.ratio: 0.75}"])
    with pytest.raises(SystemExit) as stop:
        cli.main(["diff", "mine:reap 50 %", "mine:[bold]odd[/bold]", "--results", str(store.root)])
    assert not stop.value.code
    out = capsys.readouterr().out
    assert "B  mine: [bold]odd[/bold]" in out
    for words in ("configuration, the furthest upstream first", "They part at plan.", "from: apply, task."):
        assert words in " ".join(out.split())
    row = next(line for line in out.splitlines() if " ratio " in line)
    assert row.split("│")[1:5] == [" plan  ", " ratio ", " 0.5 ", " 0.75 "]
