"""What gc takes of the things that killed runs left: not what the next run goes on with."""

import pytest

from espalier import garbage
from espalier.store import Node, Store


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
