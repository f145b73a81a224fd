"""Parameters and neurons that tokens run, against what each plan says."""

import pytest
import torch

from dense_models import KINDS, LAYERS, WIDTH, save_dense, split_plan
from espalier.checkpoints.checkpoint import Checkpoint
from espalier.models.active import count_parameters
from espalier.models.runtime import load
from espalier.surgery.apply import apply
from tiny import VOCABULARY, save_tiny

IDS = torch.arange(2 * 9).reshape(2, 9) * 5 % VOCABULARY
NEURON = 3 * 32  # parameters
# Neurons of a layer that a token runs on average, and stored ones.
RUN = {
    "similarity": (24, WIDTH), "mlp": (24, WIDTH), "dsmoe_none_fires": (12, WIDTH), "oracle": (36, WIDTH),
    "oracle_neurons": (24, WIDTH), "narrower": (20, 20),
}  # fmt: skip


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_dense("llama", tmp_path_factory.mktemp("dense"))


def counted(directory):
    model, checkpoint = load(directory, "float32"), Checkpoint(directory)
    with count_parameters(model, checkpoint) as active, torch.no_grad():
        model(input_ids=IDS)
    return active, sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", RUN)
def test_split_models_run_what_their_plan_says(kind, dense, tmp_path):
    apply(dense, split_plan(KINDS[kind]), tmp_path / "out", prove=False)
    active, stored = counted(tmp_path / "out")
    run, kept = RUN[kind]
    expected = LAYERS * (run if kind != "oracle" else 10 + 2 * (14 + 12 + 12) / 3)
    assert active["neurons"] == pytest.approx(expected)
    assert active["parameters"] == pytest.approx(stored - (LAYERS * kept - expected) * NEURON)


def test_a_dense_model_runs_all(dense):
    active, stored = counted(dense)
    assert (active["neurons"], active["parameters"]) == (LAYERS * WIDTH, stored)


def test_experts_are_counted_in_their_place(tmp_path):
    active, _ = counted(save_tiny("olmoe", tmp_path))
    assert "neurons" not in active
    assert set(active["experts_per_token"].values()) == {2.0}
