"""Forward passes over calibration tokens, counted over the nodes of two made-up experiments."""

from espalier.artefacts.store import Node, Store, run_record_path, write_json
from espalier.tables.passes import passes, sentence


class Nodes:
    """Writes nodes and returns their ids."""

    def __init__(self, root):
        self.store = Store(root)
        self.fetch = self.write("fetch", {"id": "m"})
        self.tokens = self.write("tokens", {"name": "c"}, self.fetch)

    def write(self, stage, config, *parents, made_by=""):
        node = Node(stage, config, parents, made_by=made_by)
        self.store.write_node(node)
        return node.id

    def collected(self, model, *names, stage="collect"):
        maker = self.write(stage, {"probes": list(names)}, model, self.tokens)
        return [self.write("probe", {"probe": name}, model, self.tokens, made_by=maker) for name in names]

    def applied(self, model, method, *parents):
        plan = self.write("plan", {"name": method}, model, *parents)
        return plan, self.write("apply", {}, model, plan)


def test_one_collection_serves_all_plans_and_a_compressed_model_needs_its_own(tmp_path):
    nodes = Nodes(tmp_path)
    usage, norms = nodes.collected(nodes.fetch, "usage", "output_norm")
    (late,) = nodes.collected(nodes.fetch, "inputs", stage="reduce")
    _, frequency = nodes.applied(nodes.fetch, "frequency", usage)
    _, reap = nodes.applied(nodes.fetch, "reap", norms)
    _, random = nodes.applied(nodes.fetch, "random")
    _, refit = nodes.applied(nodes.fetch, "refit", usage, late)
    (routing,) = nodes.collected(reap, "routing")
    _, skipped = nodes.applied(reap, "naee_skip", routing)
    tuned = nodes.write("tune", {}, skipped)
    rows = [{"weights": id} for id in (nodes.fetch, frequency, reap, random, refit, tuned, frequency)]
    found = passes(rows, nodes.store)
    assert [(entry["compressed"], entry["passes"], len(entry["plans"])) for entry in found] == [
        (False, 1, 3),  # frequency, reap and refit
        (False, 1, 1),  # what refit asked for later
        (True, 1, 1),
    ]
    assert found[0]["model"] == nodes.fetch
    assert found[2]["model"] == reap
    assert sentence(found) == (
        "Forward passes over calibration tokens: 3: 2 of the uncompressed model for 3 plans, "
        "1 of compressed models for 1 plan."
    )


def test_a_sequential_plan_counts_the_passes_that_its_record_says(tmp_path):
    nodes = Nodes(tmp_path)
    plan, weights = nodes.applied(nodes.fetch, "naee", nodes.tokens)
    record = run_record_path(nodes.store.path(nodes.store.read_node(plan)))
    record.parent.mkdir(parents=True, exist_ok=True)
    write_json(record, {"format": "espalier.run/1", "passes": 3})
    (entry,) = passes([{"weights": weights}], nodes.store)
    assert (entry["maker"], entry["passes"], entry["plans"]) == (plan, 3, [plan])
    assert "3 of the uncompressed model for 1 plan" in sentence([entry])


def test_no_plan_needs_no_pass(tmp_path):
    nodes = Nodes(tmp_path)
    _, random = nodes.applied(nodes.fetch, "random")
    assert passes([{"weights": random}, {"weights": nodes.fetch}], nodes.store) == []
    assert sentence([]) == "Forward passes over calibration tokens: 0."
