"""What jobs ask a cluster for, against what was measured."""

import json
from collections import Counter
from dataclasses import replace
from graphlib import TopologicalSorter

import pytest

from espalier import conf
from espalier.artefacts.store import Node, Store
from espalier.costs.estimate import Cost
from espalier.inputs import assets
from espalier.machine.hardware import Hardware
from espalier.workflow import forecast, graph
from espalier.workflow.job_requests import Requests
from espalier.workflow.reckon import _longest_choice

HARDWARE = Hardware("test", cores=2, flops=100, memory=1e12, disk=10, startup=3)


@pytest.mark.parametrize(
    ("cost", "resident"),
    [
        # Predicted of the embedded model's and the 4-layer benchmark's stages, and the larger measured resident size.
        ({"memory": 0.566e9}, 0.823e9),
        ({"memory": 1.70e9}, 1.67e9 + 0.24e9),
        ({"memory": 3.20e9, "mapped": 0.24e9 + 2.4e9}, 3.26e9 + 0.24e9 + 2.4e9),
        # A peak that is 15 % above its prediction, with all of its libraries resident.
        ({"memory": 50e9}, 57.5e9 + 0.24e9),
    ],
)
def test_no_job_asks_for_less_than_was_measured(cost, resident, tmp_path):
    requests = Requests(Store(tmp_path), HARDWARE, conf.load("runtime", "default"))
    requests._costs["id"] = Cost(**cost)
    assert requests.of("id")["mem_mb"] * 1e6 > resident


def test_a_mapped_model_is_asked_for(tmp_path):
    requests = Requests(Store(tmp_path), HARDWARE, conf.load("runtime", "default"))
    requests._costs |= {"none": Cost(memory=5e9, mapped=0), "files": Cost(memory=5e9, mapped=7e9)}
    assert requests.of("files")["mem_mb"] - requests.of("none")["mem_mb"] == 7000


def test_the_longest_choice_is_that_of_its_item():
    """Of the first 50 of BoolQ's passages, with the question; a task that is not here by its rounded mean."""
    lines = (assets.task_directory() / "boolq_local.jsonl").read_text().splitlines()[:50]
    longest = max(len(item["passage"]) + len(item["question"]) for item in map(json.loads, lines))
    assert 3 < longest / _longest_choice({"task": "boolq_local", "limit": 50}) < 4  # characters a token
    assert _longest_choice({"task": "boolq"}) > 400
    assert _longest_choice({"task": "unheard_of"}) == 128


def test_each_attempt_asks_for_more(tmp_path):
    requests = Requests(Store(tmp_path), HARDWARE, conf.load("runtime", "default"))
    requests.store.write_node(Node("plan", {"name": "reap"}))
    (id,) = [path.stem for path in (tmp_path / "nodes").iterdir()]
    requests._costs[id] = Cost(memory=9e9, flops=1e15)
    first = requests.of(id)
    for attempt in (2, 3):
        again = requests.of(id, attempt=attempt)
        assert again["mem_mb"] == attempt * first["mem_mb"]
        assert again["runtime"] == attempt * first["runtime"]
    requests.memory = 1.5
    assert requests.of(id)["mem_mb"] == pytest.approx(1.5 * first["mem_mb"], abs=2)


FAST = replace(HARDWARE, flops=1e11, disk=1e9)
PACKS = ("small_plan", "small_apply", "small_score")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The nodes of the demo, none made yet, and the jobs that make them."""
    store = Store(tmp_path_factory.mktemp("demo"), dry=True)
    experiment = graph.expand("demo", ["runtime.checkpoints=temporary"], store)
    graph.save(experiment, store)
    made = [store.read_node(node.id) for node in experiment.nodes]
    return store, experiment, {job["id"]: job for job in (store.read_node(n["made_by"] or n["id"]) for n in made)}


def test_small_jobs_are_packed_and_no_pack_waits_for_itself(demo):
    store, experiment, jobs = demo
    requests = Requests(store, FAST, experiment.run["runtime"], packs=PACKS)
    group = {id: requests.pack(id) or id for id in jobs}
    sizes = Counter(group.values())
    assert sizes["small_score"] == sum(job["stage"] == "score" for job in jobs.values())
    assert sizes["small_plan"] >= 15
    maker = {id: store.read_node(id)["made_by"] or id for job in jobs.values() for id in job["parents"]}
    edges = {(group[maker[parent]], group[id]) for id, job in jobs.items() for parent in job["parents"]}
    order = TopologicalSorter({name: {a for a, b in edges if b == name} for name in sizes})
    list(order.static_order())  # CycleError where packs wait for each other
    assert all(requests.of(id)["runtime"] == 5 for id in jobs if requests.pack(id) == "small_plan")
    none = Requests(store, FAST, experiment.run["runtime"])
    assert not any(map(none.pack, jobs))  # a profile without packs
    slow = Requests(store, HARDWARE, experiment.run["runtime"], packs=PACKS)
    assert not any(slow.pack(id) for id, job in jobs.items() if job["stage"] == "score")  # hours each


def test_a_score_job_asks_for_the_checkpoint_that_it_makes(demo):
    store, experiment, jobs = demo
    kept = Requests(store, FAST, experiment.run["runtime"])
    made = Requests(store, FAST, experiment.run["runtime"], experiment.run["temporary"])
    scores = [id for id, job in jobs.items() if job["stage"] == "score"]
    temporaries = [id for id in scores if made.of(id)["checkpoints"]]
    # All but the full model, and the two that a second method goes on from.
    assert len(temporaries) == len(scores) - 3
    assert not any(kept.of(id)["checkpoints"] for id in scores)
    for id in temporaries:
        apply = jobs[id]["parents"][0]
        assert made.of(id)["disk_mb"] >= kept.of(apply)["disk_mb"]
        assert made.of(id)["mem_mb"] >= max(kept.of(apply)["mem_mb"], kept.of(id)["mem_mb"])


def test_an_estimate_counts_temporary_checkpoints_once(tmp_path):
    kept, made = (
        forecast.forecast("demo", [f"runtime.checkpoints={how}"], tmp_path, FAST) for how in ("keep", "temporary")
    )
    assert made.stages["apply"].jobs == 2  # those that naee_skip goes on from
    assert kept.stages["apply"].jobs - made.stages["apply"].jobs == kept.stages["score"].jobs - 3
    assert made.total.written == pytest.approx(kept.total.written)
    largest = kept.stages["apply"].cost.kept / kept.stages["apply"].jobs
    assert made.total.disk < kept.total.disk - 10 * largest
