"""What is predicted of dense models, against what is written and counted."""

import json

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from dense_models import save_dense
from espalier import conf
from espalier.checkpoints.checkpoint import Checkpoint
from espalier.collecting.collect import collect_checkpoint
from espalier.collecting.stats import Stats
from espalier.costs import estimate, sizes
from espalier.machine.hardware import Hardware
from espalier.methods import build, make_plan
from espalier.models.running import Running
from espalier.surgery.apply import apply
from espalier.training.tune_cost import tune_cost
from espalier.training.tune_settings import Tuning

WHOLE = Running.of(device="cpu", stream="never")
HARDWARE = Hardware("test", cores=2, flops=1e12, memory=1e12, disk=1e9, startup=0)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_dense("llama", tmp_path_factory.mktemp("dense"))


@pytest.mark.parametrize("probe", ["ffn_energy", "ffn_inputs"])
def test_statistics_of_dense_models_have_the_predicted_size(probe, dense):
    ids = np.random.default_rng(0).integers(3, 90, (6, 16)).astype(np.int32)
    stats = collect_checkpoint(dense, "float32", WHOLE, ids, None, [probe])
    found = sum(array.nbytes for arrays in stats.arrays.values() for array in arrays.values())
    assert estimate.statistics_bytes(sizes.sizes_of(str(dense)), ids.size, {probe}) == found


def test_static_pruning_makes_the_files_smaller(dense, tmp_path):
    shape = Checkpoint(dense).dense_shape()
    method = build(conf.load("method", "static") | {"score": "magnitude", "ratio": 0.25})
    apply(dense, make_plan(method, Stats.empty(shape), shape, dense), tmp_path / "out", prove=False)
    expected = sizes.sizes_of(str(tmp_path / "out"))
    found = sizes.sizes_of(str(dense)).narrower(0.25)
    assert (found.parameters, found.dense_width) == (expected.parameters, expected.dense_width)


def test_a_head_that_is_tied_by_default_is_multiplied_with(tmp_path):
    source = save_dense("gemma2", tmp_path, tie_word_embeddings=True)
    config = json.loads((source / "config.json").read_text())
    config.pop("tie_word_embeddings", None)  # as Gemma 2 is published
    (source / "config.json").write_text(json.dumps(config))
    every = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(source).parameters())
    found = sizes.sizes_of(str(source))
    attention = 2 * 4 * 16  # layers, heads, width of a head
    assert found.loaded == every
    assert estimate.forward_flops(found, 10, 5) == 10 * (2 * every + 2 * attention * 5)


def test_training_ffns_costs_three_passes_and_their_moments(dense):
    found = sizes.sizes_of(str(dense))
    tunings = [Tuning("x", "lm", 1e-4, 640, train=train) for train in ("routers", "ffn", "all")]
    routers, ffn, every = (tune_cost(found, found, 640, 16, tuning, "float32", WHOLE, HARDWARE) for tuning in tunings)
    assert ffn.flops == every.flops == 1.5 * routers.flops
    neurons = 2 * 48 * 3 * 32
    assert ffn.memory - routers.memory == 3 * 4 * neurons
    assert every.memory - routers.memory == 3 * 4 * found.loaded
