"""A calibration shared by several jobs gives the statistics of one."""

import json

import numpy as np
import pytest
import torch

from espalier import stages
from espalier.artefacts.store import Store
from espalier.checkpoints.checkpoint import Checkpoint
from espalier.collecting.collect import collect_checkpoint
from espalier.collecting.reduce import reduce
from espalier.collecting.stats import Stats
from espalier.errors import UserError
from espalier.models.running import Running
from espalier.probes import PROBES
from espalier.workflow import graph
from test_workflow import jobs, project, write_experiment
from tiny import VOCABULARY, save_tiny

__all__ = ["project"]


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    directory = save_tiny("qwen2_moe", tmp_path_factory.mktemp("model"))
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(3, VOCABULARY, (7, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[2, 5:] = 0
    mask[6, :3] = 0
    return directory, ids, mask


@pytest.mark.parametrize("stream", ["never", "always"])
@pytest.mark.parametrize("shards", [1, 2, 3, 7])
def test_reduced_shards_are_the_whole(case, shards, stream, tmp_path):
    directory, ids, mask = case
    running = Running.of(device="cpu", stream=stream, collect_batch_size=1)
    whole = collect_checkpoint(directory, "float32", running, ids, mask, list(PROBES))
    parts = []
    for number in range(shards):
        part = collect_checkpoint(directory, "float32", running, ids, mask, list(PROBES), shard=(number, shards))
        part.save(tmp_path / f"{number}.safetensors")
        parts.append(Stats.load(tmp_path / f"{number}.safetensors"))
    assert sum(len(part.sequence_tokens) for part in parts) == 7
    joined = reduce(parts)
    assert joined.sequence_tokens == whole.sequence_tokens
    assert set(joined.arrays) == set(whole.arrays)
    for key, arrays in whole.arrays.items():
        assert set(joined.arrays[key]) == set(arrays)
        for name, array in arrays.items():
            found = joined.arrays[key][name]
            assert found.dtype == array.dtype
            np.testing.assert_allclose(found, array, rtol=1e-11, atol=1e-13, err_msg=f"{key} {name}")


def test_the_gram_of_many_experts_strides_over_the_whole_calibration(case, monkeypatch):
    """More than 16 experts observe every n-th token of all, whatever the shard that it is in."""
    monkeypatch.setattr("espalier.collecting.sampling.GRAM_ALL_TOKENS_EXPERTS", 4)
    monkeypatch.setattr("espalier.collecting.sampling.GRAM_TOKENS", 20)
    directory, ids, mask = case
    running = Running.of(device="cpu", stream="never", collect_batch_size=1)
    parts = [
        collect_checkpoint(directory, "float32", running, ids, mask, ["residual_gram"], shard=(n, 3)) for n in range(3)
    ]
    tokens = reduce(parts).arrays["residual_gram", 0]["token"]
    assert tokens.tolist() == list(range(0, int(mask.sum()), -(-int(mask.sum()) // 20)))


def test_shards_of_different_models_and_too_many_are_refused(case):
    directory, ids, mask = case
    running = Running.of(device="cpu", stream="never")
    usage, norms = (
        collect_checkpoint(directory, "float32", running, ids, mask, [name], shard=(0, 2))
        for name in ("usage", "output_norm")
    )
    with pytest.raises(UserError, match="different models or probes"):
        reduce([usage, norms])
    with pytest.raises(UserError, match=r"calibration\.shards=8: there are 7 sequences"):
        collect_checkpoint(directory, "float32", running, ids, mask, ["usage"], shard=(0, 8))


def test_sharding_schedules_jobs_and_changes_no_id(project):
    write_experiment(project, "{method: [reap, frequency], method.ratio: [0.25]}")
    whole = graph.expand("mine", [], Store(project / "results"))
    sharded = graph.expand("mine", ["calibration.shards=3"], Store(project / "results"))
    assert [node.id for node in whole.nodes] == [node.id for node in sharded.nodes]
    assert jobs(project)["collect"] == 1
    counts = jobs(project, "calibration.shards=3")
    assert (counts["collect"], counts["reduce"], counts["plan"]) == (3, 1, 2)
    with pytest.raises(UserError, match="shards=0 is not a number of jobs"):
        graph.expand("mine", ["calibration.shards=0"], Store(project / "results"))


def test_the_stages_make_a_sharded_statistic(project):
    write_experiment(project, "{method: frequency, method.ratio: [0.25]}")
    store = Store(project / "results")
    experiment = graph.expand("mine", ["calibration.shards=2", "calibration.samples=1"], store)
    graph.save(experiment, store)
    probe = next(node for node in experiment.nodes if node.stage == "probe")
    maker = store.read_node(store.read_node(probe.id)["made_by"])
    assert maker["stage"] == "reduce"
    shards = [store.read_node(parent) for parent in maker["parents"]]
    assert [shard["config"]["shard"] for shard in shards] == [[0, 2], [1, 2]]
    for node in experiment.nodes:
        if node.stage in ("fetch", "tokens"):
            stages.run(node.id, store)
    for shard in shards:
        stages.run(shard["id"], store)
    artefact = stages.run(maker["id"], store)
    assert artefact == store.path(probe.id)
    plan = next(node for node in experiment.nodes if node.stage == "plan")
    kept = json.loads(stages.run(plan.id, store).read_text())["layers"]["0"][0]["experts"]
    counts = Stats.load(artefact).arrays["usage", 0]["counts"]
    assert kept == sorted(np.argsort(-counts, kind="stable")[:12].tolist())
    assert counts.sum() == Stats.load(artefact).tokens * Checkpoint(stages.weights(shards[0], store)).shape().top_k
