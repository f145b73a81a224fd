"""How often calibration tokens went through a model for the plans of a table; imports no torch."""

from collections.abc import Sequence
from typing import Any

from espalier.artefacts.store import MODELS, Store, read_json, run_record_path
from espalier.inputs.sources import calibration_tokens

Document = dict[str, Any]


def passes(rows: Sequence[Document], store: Store) -> list[Document]:
    """Return one entry a collection: `maker` (node), `model` (node), `compressed`, `passes`, `plans` it serves.

    `rows` are those of a table node. A sharded collection is one pass, its shards being parts of the tokens. A plan
    made while the model was compressed layer by layer (`sequential`) is an entry of its own, with as many passes as
    its record says; what was learnt (`fit`) is one with as many passes as epochs.
    """
    found: dict[str, Document] = {}
    for plan in _plans(rows, store):
        model = store.parent(plan, *MODELS)
        parents = [store.read_node(id) for id in plan["parents"]]
        makers = {parent["made_by"]: 1 for parent in parents if parent["stage"] == "probe"}
        makers |= {parent["id"]: _read(parent, store) for parent in parents if parent["stage"] == "fit"}
        if any(parent["stage"] == "tokens" for parent in parents):
            record = run_record_path(store.path(plan))
            makers[plan["id"]] = read_json(record, "espalier.run/1").get("passes", 1) if record.exists() else 1
        for maker, number in makers.items():
            entry = found.setdefault(
                maker,
                {
                    "maker": maker,
                    "model": model["id"],
                    "compressed": model["stage"] != "fetch",
                    "passes": number,
                    "plans": [],
                },
            )
            entry["plans"].append(plan["id"])
    return list(found.values())


def _read(fit: Document, store: Store) -> int:
    """Return how often a fit reads its calibration; a part of it counts as once."""
    fitting = fit["config"]["fit"]
    all_tokens = calibration_tokens(store.parent(fit, "tokens")["config"])
    if fitting.get("tokens") is None or not all_tokens:
        return int(fitting["epochs"])
    return -(-int(fitting["tokens"]) // all_tokens)


def _plans(rows: Sequence[Document], store: Store) -> list[Document]:
    """Return the distinct plan nodes on the way to the rows' weights, in the order of the rows."""
    plans: dict[str, Document] = {}
    for row in rows:
        node = store.read_node(row["weights"])
        chain = []
        while node["stage"] != "fetch":
            if node["stage"] == "apply":
                chain.append(store.parent(node, "plan"))
            node = store.parent(node, *MODELS)
        plans |= {plan["id"]: plan for plan in reversed(chain)}
    return list(plans.values())


def sentence(entries: Sequence[Document]) -> str:
    """Say in a line how many passes there were and how many plans they served."""
    total = sum(entry["passes"] for entry in entries)
    parts = []
    for compressed, name in ((False, "the uncompressed model"), (True, "compressed models")):
        own = [entry for entry in entries if entry["compressed"] == compressed]
        if own:
            plans = len({plan for entry in own for plan in entry["plans"]})
            parts.append(f"{sum(entry['passes'] for entry in own)} of {name} for {plans} plan{'s' * (plans != 1)}")
    return f"Forward passes over calibration tokens: {total}{': ' if parts else ''}{', '.join(parts)}."
