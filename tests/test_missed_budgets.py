"""Tables say which rows were trained at another share than was asked for."""

import pytest

from espalier.artefacts.store import Node, Store, run_record_path, write_json
from espalier.tables.budgets import missed, sentence
from espalier.tables.markup import legend


@pytest.fixture
def rows(tmp_path):
    """Return row(label, share, target, seed) of a table over nodes in tmp_path, and their store."""
    store = Store(tmp_path)
    fetch = Node("fetch", {"id": "m"}, ())
    store.write_node(fetch)

    def row(label, share, target=0.5, seed=0):
        tune = Node("tune", {"tuning": {"target": target, "seed": seed}}, (fetch.id,))
        apply = Node("apply", {"label": label}, (tune.id,))  # one more step after it
        for node in (tune, apply):
            store.write_node(node)
        record = run_record_path(store.path(store.read_node(tune.id)))
        record.parent.mkdir(parents=True, exist_ok=True)
        told = {} if share is None else {"trained_share": share}
        write_json(record, {"format": "espalier.run/1", "tune": told})
        return {"label": label, "weights": apply.id}

    return row, store


def test_rows_far_from_their_target_are_named(rows):
    row, store = rows
    found = missed(
        [
            row("near", 0.45, seed=4),
            row("all ran", 1.0),
            row("all ran", 0.7, seed=1),
            row("none ran", 0.02, seed=2),
            row("no target", 0.9, target=None),
            row("made before this was recorded", None, seed=3),
        ],
        store,
    )
    assert [(entry["label"], entry["share"]) for entry in found] == [
        ("all ran", 1.0),
        ("all ran", 0.7),
        ("none ran", 0.02),
    ]
    said = sentence(found)
    assert said.endswith("all ran (100 % for 50 %), all ran (70 % for 50 %), none ran (2 % for 50 %).")


def test_a_model_that_was_not_trained_is_none_of_them(rows):
    row, store = rows
    whole = row("x", 1.0)
    fetch = store.read_node(store.read_node(whole["weights"])["parents"][0])["parents"][0]
    assert missed([{"label": "full", "weights": fetch}], store) == []


def test_the_table_says_it(rows):
    row, store = rows
    table = {"tasks": {}, "summary": [], "runs": []}
    assert not any("Trained at another share" in line for line in legend(table))
    table["missed_budgets"] = missed([row("all ran", 1.0)], store)
    assert any(line.endswith("all ran (100 % for 50 %).") for line in legend(table))
