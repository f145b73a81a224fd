"""Ids follow the rules of content addressing: what determines an artefact is in its id, nothing else is."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from espalier.artefacts.store import VERSION, Node, Store, atomic_file, canonical, content_revision, digest, identity
from espalier.errors import UserError


def chain(ratio=0.5, label="", made_by=""):
    fetch = Node("fetch", {"id": "org/model", "revision": "c0ffee"}, label=label)
    tokens = Node("tokens", {"samples": 4, "length": 16}, (fetch.id,), label)
    probe = Node("probe", {"probe": "usage", "dtype": "float32"}, (fetch.id, tokens.id), label, made_by)
    plan = Node("plan", {"name": "frequency", "ratio": ratio}, (fetch.id, probe.id), label)
    apply = Node("apply", {}, (fetch.id, plan.id), label)
    task = Node("task", {"task": "piqa", "limit": None}, (apply.id,), label, made_by)
    return [fetch, tokens, probe, plan, apply, task]


def ids(nodes):
    return {node.stage: node.id for node in nodes}


def test_an_id_is_the_documented_hash():
    node = chain()[0]
    import hashlib

    text = f'["fetch",{VERSION["fetch"]},{{"id":"org/model","revision":"c0ffee"}},[]]'
    assert node.id == hashlib.sha256(text.encode()).hexdigest()[:12]


def test_equal_in_every_process():
    here = Path(__file__).parent
    program = f"import json, sys; sys.path.insert(0, {str(here)!r}); import test_ids as t; "
    program += "print(json.dumps(t.ids(t.chain())))"
    found = []
    for seed in ("0", "1"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        found.append(subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True))
    assert [json.loads(run.stdout) for run in found] == [ids(chain()), ids(chain())]


def test_order_of_keys_labels_and_private_keys_are_not_part():
    one = Node("tokens", {"a": 1, "b": {"c": 2, "_note": "x"}}, label="one")
    two = Node("tokens", {"b": {"c": 2}, "a": 1, "_facts": 3}, label="two", made_by="abc")
    assert one.id == two.id
    assert ids(chain(label="a", made_by="b")) == ids(chain())


def test_order_of_lists_and_of_parents_is_part():
    assert Node("tokens", {"a": [1, 2]}).id != Node("tokens", {"a": [2, 1]}).id
    assert Node("plan", {}, ("x", "y")).id != Node("plan", {}, ("y", "x")).id


def test_a_ratio_changes_the_plan_and_what_follows_only():
    half, quarter = ids(chain(0.5)), ids(chain(0.25))
    assert {stage for stage in half if half[stage] != quarter[stage]} == {"plan", "apply", "task"}


def test_a_raised_version_changes_the_stage_and_what_follows(monkeypatch):
    before = ids(chain())
    monkeypatch.setitem(VERSION, "plan", VERSION["plan"] + 1)
    after = ids(chain())
    assert {stage for stage in before if before[stage] != after[stage]} == {"plan", "apply", "task"}


def test_canonical_json():
    assert canonical({"b": 0.1, "a": [True, None, "é"]}) == '{"a":[true,null,"é"],"b":0.1}'
    assert digest(0.1) != digest(0.1 + 1e-16 * 100)
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical(float("nan"))
    assert identity({"_a": 1, "b": [{"_c": 1, "d": 2}]}) == {"b": [{"d": 2}]}


def test_a_node_file_never_changes(tmp_path):
    store = Store(tmp_path)
    first = Node("probe", {"probe": "usage"}, label="first", made_by="a" * 12)
    second = Node("probe", {"probe": "usage"}, label="second", made_by="b" * 12)
    store.write_node(first)
    before = store.node_path(first.id).read_bytes()
    assert store.write_node(second)["made_by"] == "a" * 12
    assert store.node_path(first.id).read_bytes() == before
    assert sorted(path.name for path in (tmp_path / "nodes").iterdir()) == [f"{first.id}.json"]


def test_a_dry_store_writes_nothing(tmp_path):
    store = Store(tmp_path / "results", dry=True)
    node = Node("tokens", {"samples": 1})
    assert store.write_node(node)["id"] == node.id
    assert store.read_node(node.id)["config"] == {"samples": 1}
    assert not (tmp_path / "results").exists()


def test_an_unknown_format_is_refused(tmp_path):
    store = Store(tmp_path)
    node = Node("tokens", {})
    store.write_node(node)
    path = store.node_path(node.id)
    path.write_text(path.read_text().replace("espalier.node/1", "espalier.node/9"))
    with pytest.raises(UserError, match=r"espalier\.node/9.*expected espalier\.node/1"):
        Store(tmp_path).read_node(node.id)


def test_a_model_directory_is_known_by_its_content(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    cache = tmp_path / "cache" / "hashes.json"
    first = content_revision(tmp_path, cache)
    (tmp_path / "README.md").write_text("a card is no part of the model")
    assert content_revision(tmp_path, cache) == first
    (tmp_path / "model.safetensors").write_bytes(b"abd")
    assert content_revision(tmp_path, cache) != first


def test_no_torch_before_a_stage_runs():
    program = (
        "import sys, espalier, espalier.artefacts.store, espalier.plans.plan, espalier.workflow.graph, espalier.stages,"
        " espalier.costs.estimate, espalier.collecting.stats, espalier.cli, espalier.families;"
        " sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    path = tmp_path / "stats[1].json"
    host = socket.gethostname()
    mine, abandoned = f".{path.name}.{host}.{os.getppid()}.tmp", f".{path.name}.{host}.{dead.pid}.tmp"
    elsewhere, others = f".{path.name}.other-machine.{dead.pid}.tmp", f".stats.json.{host}.{dead.pid}.tmp"
    for name in (mine, abandoned, elsewhere, others):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".tmpAbCdEf").write_text("half")  # a library's own temporary name
    with atomic_file(path) as temporary:
        temporary.write_text("whole")
    assert {p.name for p in tmp_path.iterdir()} == {path.name, mine, elsewhere, others}
