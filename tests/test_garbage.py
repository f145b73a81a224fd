"""What gc takes, and why: not what the next run goes on with, nor what any experiment's table needs."""

import os
import re

import pytest

from espalier import cli
from espalier.artefacts.store import Node, Store, write_json
from espalier.errors import UserError
from espalier.workflow import garbage
from espalier.workflow.launch import run_lock


@pytest.fixture
def store(tmp_path):
    """An experiment of which nothing is made yet, and a statistic that no experiment needs."""
    store = Store(tmp_path / "results")
    fetch = Node("fetch", {"id": "embedded:moe", "revision": "sha256:0"})
    needed, other = (Node("collect", {"probes": [probe]}, (fetch.id,)) for probe in ("usage", "scores"))
    report = Node("report", {"experiment": "mine"}, (needed.id,))
    for node in (fetch, needed, other, report):
        store.write_node(node)
    store.path(needed.id).parent.mkdir()
    return store, needed.id, other.id


def unfinished(store, id):
    """A folder as an interrupted pass leaves it."""
    folder = store.path(id).with_name(f".{id}.partial")
    folder.mkdir()
    (folder / "activations.safetensors").write_bytes(b"0" * 100)
    return folder


def found(store):
    return {item.path: item.size for item in garbage.find(store)}


def test_what_the_next_run_goes_on_with_stays(store):
    store, needed, other = store
    mine, others = unfinished(store, needed), unfinished(store, other)
    half = store.path(needed).with_name(f".{needed}.safetensors.7.tmp")
    half.write_bytes(b"half")
    assert found(store).keys() & {mine, others, half} == {others, half}
    assert found(store)[others] == 100
    garbage.delete(store)
    assert mine.exists()
    assert not others.exists()


def test_beside_its_artefact_it_is_of_no_use(store):
    store, needed, _ = store
    mine = unfinished(store, needed)
    store.path(needed).write_bytes(b"whole")
    assert mine in found(store)


@pytest.fixture
def three(tmp_path):
    """Experiments `kept` and `dead`, each of a statistic of its own and a shared one, and an older report of `kept`."""
    store = Store(tmp_path / "results")
    fetch = Node("fetch", {"id": "embedded:moe", "revision": "sha256:0"})
    own = {name: Node("collect", {"probes": [name]}, (fetch.id,), name) for name in ("shared", "kept", "dead", "old")}
    reports = {
        "old": Node("report", {"experiment": "kept", "n": 0}, (own["old"].id, own["shared"].id)),
        "kept": Node("report", {"experiment": "kept", "n": 1}, (own["kept"].id, own["shared"].id)),
        "dead": Node("report", {"experiment": "dead"}, (own["dead"].id, own["shared"].id)),
    }
    for n, node in enumerate([fetch, *own.values(), *reports.values()]):
        store.write_node(node)
        os.utime(store.node_path(node.id), (86400 * (n + 1),) * 2)
        path = store.path(node.id)
        path.parent.mkdir(exist_ok=True)
        if node.stage == "fetch":
            write_json(path, {"format": "espalier.model/1", "path": str(tmp_path)})
        else:
            path.write_bytes(b"0" * 1000)
    for name in ("kept", "dead"):
        link = store.root / "refs" / name / "report.html"
        link.parent.mkdir(parents=True)
        link.symlink_to(f"../../reports/{reports[name].id}.html")
    return store, own, reports


def test_it_is_said_why_nothing_needs_a_thing(three):
    store, own, reports = three
    why = {item.path: item.why for item in garbage.find(store)}
    of = {store.path(own["old"].id), store.path(reports["old"].id)}
    assert {path for path in why if path.parent.name in ("stats", "reports")} == of
    assert all(re.fullmatch(r"only an older table of kept needs it, of 1970-01-0\d", why[path]) for path in of)
    lonely = Node("collect", {"probes": ["lonely"]}, ())
    store.write_node(lonely)
    store.path(lonely.id).write_bytes(b"0")
    assert {item.path: item.why for item in garbage.find(store)}[store.path(lonely.id)] == "no table needs it"


def test_an_experiment_can_be_forgotten_with_its_names(three, capsys):
    store, own, _ = three
    assert garbage.kept_for(store).keys() == {"dead", "kept"}
    with pytest.raises(UserError, match=r"forget=deed: no table of it in .*; did you mean dead"):
        garbage.find(store, ["deed"])
    with pytest.raises(SystemExit):
        cli.main(["gc", "--forget", "dead", "--delete", "--results", str(store.root)])
    out = capsys.readouterr().out
    assert "collect dead: only dead needs it, which is forgotten" in out
    assert "kept for kept, which conf/experiment has no more: --forget kept" in out
    left = {name: store.path(node).exists() for name, node in ((n, node.document()) for n, node in own.items())}
    assert left == {"shared": True, "kept": True, "dead": False, "old": False}
    assert not (store.root / "refs/dead").exists()
    assert (store.root / "refs/kept/report.html").exists()
    assert garbage.find(Store(store.root)) == []


def test_a_name_without_its_artefact_and_settings_of_ended_runs_go(three):
    store, _, reports = three
    store.path(reports["dead"].id).unlink()
    for n, name in enumerate(("runtime-000000000000", "runtime-111111111111")):
        path = store.root / "nodes" / f"{name}.json"
        path.write_text("{}")
        os.utime(path, (n + 1, n + 1))
    found = {item.path: item.why for item in garbage.find(store)}
    assert found[store.root / "refs/dead/report.html"] == "its artefact is gone"
    assert store.root / "nodes/runtime-000000000000.json" in found
    assert store.root / "nodes/runtime-111111111111.json" not in found


def test_nothing_is_deleted_while_a_run_is_at_work_and_a_listing_changes_nothing(three, capsys):
    store, own, _ = three
    before = sorted(store.root.rglob("*"))
    with run_lock(store.root, "kept"), pytest.raises(SystemExit) as stop:
        cli.main(["gc", "--delete", "--results", str(store.root)])
    assert stop.value.code == 2
    assert "another run is at work" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["gc", "--results", str(store.root)])
    assert str(store.path(own["old"].id)) in capsys.readouterr().out
    assert sorted(path for path in store.root.rglob("*") if path.name != ".run.lock") == before
