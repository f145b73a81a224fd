"""What jobs ask a cluster for, against what was measured."""

import json

import pytest

from espalier import conf, sources
from espalier.estimate import Cost
from espalier.hardware import Hardware
from espalier.job_requests import Requests
from espalier.reckon import _longest_choice
from espalier.store import Store

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
    lines = (sources.ASSETS / "tasks/boolq_local.jsonl").read_text().splitlines()[:50]
    longest = max(len(item["passage"]) + len(item["question"]) for item in map(json.loads, lines))
    assert 3 < longest / _longest_choice({"task": "boolq_local", "limit": 50}) < 4  # characters a token
    assert _longest_choice({"task": "boolq"}) > 400
    assert _longest_choice({"task": "unheard_of"}) == 128
