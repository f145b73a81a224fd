"""The rank of attention maps against counting singular values one map at a time."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dense_models import save_dense
from depth_plans import depth_plan
from espalier.checkpoints.checkpoint import Checkpoint
from espalier.collecting.collect import collect, collect_checkpoint
from espalier.collecting.reduce import reduce
from espalier.errors import UserError
from espalier.models import runtime
from espalier.models.observe_attention import AttentionTrace
from espalier.models.running import Running
from espalier.models.stream import StreamedModel
from espalier.plans.plan import Plan
from espalier.probes import DENSE_PROBES, LAYER_PROBES
from espalier.probes.attention_rank import AttentionRank
from espalier.surgery.apply import apply
from tiny import VOCABULARY

IDS = np.random.default_rng(0).integers(3, VOCABULARY - 1, (5, 12))
MASK = np.ones_like(IDS)
MASK[1, :5] = MASK[3, 9:] = 0


@pytest.fixture(scope="module")
def model_of(tmp_path_factory, tiny_model):
    llama = save_dense("llama", tmp_path_factory.mktemp("llama") / "model", num_hidden_layers=3)
    return lambda family: llama if family == "llama" else tiny_model(family)


def running(**keys):
    return Running.of(**{"device": "cpu", "stream": "never", "collect_batch_size": 2} | keys)


def collected(directory, probes=("attention_rank",), mask=MASK, **keys):
    return collect_checkpoint(directory, "float32", running(**keys), IDS, mask, probes)


@torch.no_grad()
def slow_ranks(directory):
    """Sums of ranks [layers, H]: each sequence alone, without its padding, each head's singular values counted."""
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32).eval()
    total = 0
    for ids, mask in zip(IDS, MASK, strict=True):
        row = torch.as_tensor(ids[mask.astype(bool)])[None]
        places = torch.as_tensor(np.flatnonzero(mask))[None]
        maps = model(input_ids=row, position_ids=places, output_attentions=True, use_cache=False).attentions
        ranks = []
        for layer in maps:
            heads = []
            for head in layer[0].numpy():
                below = np.array([[head[i, j] if j < i else 0 for j in range(len(head))] for i in range(len(head))])
                values = np.linalg.svd(below.astype(np.float64), compute_uv=False)
                heads.append(int((values > values[0] * len(head) * np.finfo(np.float32).eps).sum()))
            ranks.append(heads)
        total = total + np.array(ranks, np.float64)
    return total


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_ranks_of_a_model(family, model_of):
    stats, expected = collected(model_of(family)), slow_ranks(model_of(family))
    for layer in range(3):
        own = stats.arrays["attention_rank", layer]
        assert own["sequences"].tolist() == [5]
        np.testing.assert_allclose(own["rank_sum"], expected[layer], atol=1)  # a singular value may lie on the edge
    assert expected.min() > 5


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_streamed_is_whole_and_shards_add_up(family, model_of):
    whole = collected(model_of(family))
    streamed = collected(model_of(family), stream="always")
    shards = [
        collect_checkpoint(model_of(family), "float32", running(), IDS, MASK, ("attention_rank",), shard=(n, 2))
        for n in range(2)
    ]
    for found in (streamed, reduce(shards)):
        assert found.arrays.keys() == whole.arrays.keys()
        for key, arrays in whole.arrays.items():
            assert all(np.array_equal(arrays[name], found.arrays[key][name]) for name in arrays)


def test_beside_other_probes(model_of):
    both = collected(model_of("llama"), (*DENSE_PROBES, *LAYER_PROBES))
    alone = collected(model_of("llama"))
    others = collected(model_of("llama"), tuple(DENSE_PROBES))
    assert {probe for probe, _ in both.arrays} == {*DENSE_PROBES, "attention_rank"}
    for stats in (alone, others):
        for key, arrays in stats.arrays.items():
            for name, array in arrays.items():
                np.testing.assert_allclose(both.arrays[key][name], array, rtol=1e-4, atol=1e-5)
    moe = collected(model_of("mixtral"), ("usage", "attention_rank"), stream="always")
    assert {layer for probe, layer in moe.arrays if probe == "attention_rank"} == {0, 1, 2}


def test_a_killed_pass_goes_on_beyond_layers_without_experts(model_of, tmp_path, monkeypatch):
    probes, read = ("usage", "attention_rank"), StreamedModel._read_layer
    directory = model_of("qwen2_moe")  # layer 1 holds no experts
    collected(directory, probes, stream="always").save(tmp_path / "whole")

    def killed(self, index):
        if index == 2:
            raise KeyboardInterrupt
        return read(self, index)

    def goes_on():
        streamed = running(stream="always")
        return collect_checkpoint(directory, "float32", streamed, IDS, MASK, probes, state=tmp_path / "state")

    monkeypatch.setattr(StreamedModel, "_read_layer", killed)
    with pytest.raises(KeyboardInterrupt):
        goes_on()
    seen = []
    monkeypatch.setattr(StreamedModel, "_read_layer", lambda self, index: seen.append(index) or read(self, index))
    found = goes_on()
    found.save(tmp_path / "found")
    assert seen == [2]
    assert {layer for probe, layer in found.arrays if probe == "usage"} == {0, 2}
    assert {layer for probe, layer in found.arrays if probe == "attention_rank"} == {0, 1, 2}
    assert (tmp_path / "found").read_bytes() == (tmp_path / "whole").read_bytes()


def test_the_model_is_left_as_it_was(model_of):
    directory = model_of("mixtral")
    checkpoint, model = Checkpoint(directory), runtime.load(directory)
    before = model.config._attn_implementation
    assert before != "eager"
    probes = ("token_importance", "attention_rank")  # both ask for eager attention
    collect(model, checkpoint.shape(), checkpoint.family, IDS, MASK, probes)
    assert model.config._attn_implementation == before
    for layer in runtime.decoder(model).layers:
        assert not layer.self_attn._forward_hooks


@pytest.mark.parametrize("kind", ["top_k", "top_k_attention", "drop", "threshold_ffn"])
def test_layers_that_tokens_skip(kind, model_of, tmp_path):
    shape = Checkpoint(model_of("llama")).any_shape()
    own = depth_plan(kind, shape, [1])
    other = depth_plan("threshold_ffn", shape, [2])  # without any a stock model is left
    plan = Plan({"name": "both"}, {**own.layers, **other.layers}, tensors={**own.tensors, **other.tensors})
    apply(model_of("llama"), plan, tmp_path / "out", prove=False)
    if kind == "threshold_ffn":
        assert collected(tmp_path / "out").arrays["attention_rank", 1]["sequences"].tolist() == [5]
    else:
        with pytest.raises(UserError, match="layer 1: tokens skip its attention"):
            collected(tmp_path / "out")


def test_only_layers_with_softmax_attention(model_of):
    shape = Checkpoint(model_of("qwen3_next")).any_shape()
    found = {layer for _, layer in collected(model_of("qwen3_next"), mask=None).arrays}
    assert found == set(shape.decoder.attends) != set(range(3))
    with pytest.raises(UserError, match="softmax attention"):
        collected(model_of("llama4_text"))


@pytest.mark.parametrize("rank", [1, 3])
def test_maps_of_known_rank(rank):
    rng = np.random.default_rng(rank)
    weights = torch.zeros(1, 2, 8, 8)
    for row in range(rank):  # rows below the diagonal, of which so many are independent
        weights[0, 0, 7 - row, : 7 - rank] = torch.as_tensor(rng.random(7 - rank))
    weights[0, 1] = torch.eye(8)  # a diagonal alone
    probe = AttentionRank()
    probe.update(AttentionTrace(0, weights, torch.ones(1, 8).bool()))
    assert probe.result()["rank_sum"].tolist() == [rank, 0]
