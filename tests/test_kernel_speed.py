"""The benchmark of kernels: settings, draws, floors, what routing shares, and documents that hold no made-up time."""

import itertools
import json
import random
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from espalier.checkpoints.checkpoint import Checkpoint
from espalier.collecting.stats import Stats
from espalier.errors import UserError
from espalier.kernels import chooser, peers, routings
from espalier.kernels.expert_layout import ExpertLayout
from espalier.kernels.targets import TARGETS
from espalier.kernels.tile import GATE_UP, MATMUL
from espalier.kernels.traffic import Floor, padded
from espalier.timing import kernel_table
from espalier.timing.kernel_settings import KernelBench
from espalier.timing.kernel_speed import FORMAT, Traces, measure_kernels
from espalier.timing.routing_facts import routing_facts

pytestmark = pytest.mark.usefixtures("proof_here")

QUICK = {
    "name": "quick", "tokens": [1, 7], "routings": ["hot", "uniform"], "implementations": ["eager", "espalier"],
    "caches": ["warm", "cold"], "rounds": 3, "targets": ["sm_90"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"token": [1]}, "unknown key 'token'"),
        ({"routings": ["real"]}, "routings has 'real'"),
        ({"routings": []}, "routings=()"),
        ({"implementations": ["sglang"]}, "implementations has 'sglang'"),
        ({"targets": ["sm_70"]}, "targets has 'sm_70'"),
        ({"rounds": 2}, "rounds=2, expected a whole number >= 3"),
        ({"tokens": [0]}, "tokens=0"),
        ({"tokens": []}, "tokens=[]"),
        ({"threads": True}, "threads=True"),
        ({"layer": -1}, "layer=-1"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, said):
    with pytest.raises(UserError) as error:
        KernelBench.of(QUICK | change)
    assert said in str(error.value)
    assert "conf/kernel/quick.yaml" in str(error.value)


def test_drawn_picks_are_distinct_and_as_likely_as_they_should_be():
    for routing in ("uniform", "zipf", "hot"):
        picks = routings.draw(routing, 4000, 8, 2)
        assert picks.experts.shape == picks.weights.shape == (4000, 2)
        assert (picks.experts[:, 0] != picks.experts[:, 1]).all()
        assert np.allclose(picks.weights.sum(1), 1)
        assert (picks.weights[:, 0] >= picks.weights[:, 1]).all()
        share = np.bincount(picks.experts[:, 0], minlength=8) / 4000
        first = {
            "uniform": np.full(8, 1 / 8),
            "zipf": 1 / np.arange(1, 9) / sum(1 / np.arange(1, 9)),
            "hot": np.eye(8)[0],
        }
        assert np.allclose(share, first[routing], atol=0.03)
    assert len(np.unique(routings.draw("hot", 50, 8, 3).experts)) == 3


def test_traces_are_read_in_order_and_repeated():
    experts = np.arange(10, dtype=np.int32).reshape(5, 2)
    weights = experts.astype(np.float32)
    picks = routings.traced(experts, weights, 12)
    start = picks.experts[0, 0] // 2
    assert picks.experts.tolist() == [experts[(start + n) % 5].tolist() for n in range(12)]
    assert np.array_equal(picks.weights, picks.experts)
    with pytest.raises(UserError, match="no token"):
        routings.traced(experts[:0], weights[:0], 3)


def test_the_floor_is_what_a_loop_over_rows_counts():
    work = chooser.Work(10, 6, (3, 0, 1), gated=True)
    flops = sum(2 * (10 * 12 + 6 * 10) for _ in range(4))
    floor = Floor.of(work, 5, "bfloat16")
    assert floor.flops == flops
    assert floor.bytes == 2 * (2 * (10 * 12 + 6 * 10) + 2 * 5 * 10)
    assert floor.seconds(flops / 2, floor.bytes) == 2
    assert floor.bound(flops / 2, floor.bytes) == "compute"
    assert floor.bound(flops, floor.bytes / 2) == "memory"
    assert Floor.of(chooser.Work(10, 6, (3,), gated=False), 3, "float32").flops == 2 * 3 * (10 * 6 + 6 * 10)
    assert padded(work, 2) == 4 + 2


def test_shared_picks_are_those_that_a_loop_over_tokens_finds():
    rng = random.Random(0)
    rows, k, expert_map = 6, 3, [0, 1, 1, 2, 0, 1]
    experts = np.array([rng.sample(range(rows), k) for _ in range(40)], dtype=np.int32)
    found = routing_facts(experts, rows, expert_map, [1, 8, 64])
    distinct = [len({expert_map[e] for e in token}) for token in experts.tolist()]
    assert found["stored"] == 3
    assert found["collisions"] == pytest.approx(sum(d < k for d in distinct) / 40)
    assert found["joined"] == pytest.approx(1 - sum(distinct) / (40 * k))
    every = [len({expert_map[e] for e in picks}) for picks in itertools.combinations(range(rows), k)]
    assert found["joined_even"] == pytest.approx(1 - sum(every) / len(every) / k)
    batches = [{expert_map[e] for token in experts[n : n + 8].tolist() for e in token} for n in range(0, 40, 8)]
    assert found["union"] == {"1": pytest.approx(sum(distinct) / 40), "8": pytest.approx(sum(map(len, batches)) / 5)}
    assert found["union_even"]["1"] == pytest.approx(sum(every) / len(every))
    skipped = np.array([[rng.random() < 0.4 for _ in range(k)] for _ in range(40)])
    ran = [
        [expert_map[e] for e, gone in zip(*both, strict=True) if not gone]
        for both in zip(experts.tolist(), skipped.tolist(), strict=True)
    ]
    found = routing_facts(experts, rows, expert_map, [8], skipped)
    assert found["skipped"] == pytest.approx(1 - sum(map(len, ran)) / (40 * k))
    assert found["collisions"] == pytest.approx(sum(len(set(token)) < len(token) for token in ran) / 40)
    assert found["joined"] == pytest.approx(sum(len(token) - len(set(token)) for token in ran) / (40 * k))
    assert found["union"]["8"] == pytest.approx(
        sum(len({e for token in ran[n : n + 8] for e in token}) for n in range(0, 40, 8)) / 5
    )
    plain = routing_facts(experts, rows, None, [1])
    assert (plain["joined"], plain["joined_even"], plain["collisions"]) == (0, pytest.approx(0), 0)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_the_chooser_takes_no_configuration_that_spills_or_does_not_fit(target):
    for tokens in (1, 16, 300, 4096):
        for hidden, width, experts, k in ((4096, 14336, 8, 2), (2048, 768, 128, 8), (512, 1792, 8, 2)):
            ranked = chooser.rank(chooser.Work.expected(hidden, width, tokens, experts, k), target)
            assert 1 <= len(ranked) <= chooser.CANDIDATES
            assert [one.seconds for one in ranked] == sorted(one.seconds for one in ranked)
            for one in ranked:
                assert one.gate_up.block_m == one.down.block_m
                for config, kernel, shipped in (
                    (one.gate_up, "ragged_gate_up", GATE_UP),
                    (one.down, "ragged_matmul", MATMUL),
                ):
                    assert config in shipped[target.name]
                    facts = chooser.facts(config, kernel, target)
                    assert facts is not None
                    assert facts["spilled"] == 0
                    assert facts["shared"] <= target.shared_block
                    assert facts["programs"] >= 1
            floor = Floor.of(chooser.Work.expected(hidden, width, tokens, experts, k), tokens, "bfloat16")
            assert ranked[0].seconds >= floor.seconds(target.flops, target.bandwidth)
    small = chooser.rank(chooser.Work.expected(4096, 14336, 8192, 8, 2), target)[0]
    assert small.down.block_m >= 64
    assert chooser.rank(chooser.Work.expected(4096, 14336, 16, 8, 2), target)[0].down.block_m == 16


def test_expected_work_has_all_rows_on_as_many_experts_as_an_even_draw_gives():
    assert sum(chooser.Work.expected(1, 1, 100, 8, 2).rows) == 200
    assert chooser.Work.expected(1, 1, 1, 8, 2).rows == (1, 1, 0, 0, 0, 0, 0, 0)
    assert chooser.Work.expected(1, 1, 0, 8, 2).rows == (0,) * 8
    drawn = [len(np.unique(routings.draw("uniform", 4, 8, 2, seed).experts)) for seed in range(300)]
    assert sum(n > 0 for n in chooser.Work.expected(1, 1, 4, 8, 2).rows) == round(np.mean(drawn))


def test_occupancy_is_what_the_tightest_resource_allows():
    sm_80 = TARGETS["sm_80"]
    assert sm_80.occupancy(128, 0, 4) == 4  # 65,536 registers, 128 x 128 a program
    assert sm_80.occupancy(32, 50 * 1024, 4) == 3  # 164 KiB, one more a program
    assert sm_80.occupancy(16, 0, 16) == 4  # 64 warps
    assert sm_80.occupancy(255, 164 * 1024, 4) == 0
    assert TARGETS["gfx942"].occupancy(128, 0, 4) == 4  # 512 registers a lane: four waves of 128 on each of four SIMDs


@pytest.mark.parametrize("kind", [None, "remap", "skip", "constant"])
def test_a_checkpoint_is_timed_on_real_rows_and_nothing_is_made_up(kind, tiny_model, applied):
    if kind is None:
        original = directory = tiny_model("mixtral")
    else:
        original, directory, _ = applied("mixtral", kind)
    bench = KernelBench.of(QUICK)
    document = measure_kernels(directory, original, bench, "float32", "cpu", Traces())
    assert document["format"] == FORMAT
    json.dumps(document)
    names = ["eager", "espalier"] + ([] if kind is None else ["uncompressed"])
    measured = document["measured"]
    assert len(measured) == 2 * 2 * 2 * len(names)
    for row in measured:
        assert 0 < row["seconds_20"] <= row["seconds"] <= row["seconds_80"]
        assert row["error"] < 1e-4
        assert row["rows"] <= 2 * row["tokens"]
        if row["routing"] == "hot":
            assert row["distinct"] <= 2
    assert all("seconds" not in row for row in document["compiled"])
    assert {row["target"] for row in document["compiled"]} == {"sm_90"}
    text = kernel_table.markdown({"row | name": document})
    assert "not timed here" in text
    assert len(kernel_table.timed_frame({"a": document})) == len(measured)
    assert len(kernel_table.compiled_frame({"a": document})) == 4


def test_real_routing_comes_from_the_trace(tiny_model):
    directory = tiny_model("mixtral")
    shape = Checkpoint(directory).shape()
    rng = np.random.default_rng(0)
    arrays = {}
    for layer in shape.layers:
        experts = np.argsort(rng.random((30, 8)), axis=1)[:, :2].astype(np.int32)
        weights = np.tile(np.float32([0.7, 0.3]), (30, 1))
        arrays["routing", layer] = {"experts": experts, "weights": weights, "probability": weights}
    stats = Stats(shape, (30,), arrays)
    document = measure_kernels(
        directory, directory, KernelBench.of(QUICK | {"routings": ["trace"]}), "float32", "cpu", Traces(stats, stats)
    )
    assert [row["layer"] for row in document["routing"]] == list(shape.layers)
    assert all(row["collisions"] == 0 for row in document["routing"])
    assert {row["rows"] for row in document["measured"]} == {2, 14}


def test_the_trace_is_skipped_as_the_block_skips(tiny_model, applied):
    original, directory, _ = applied("mixtral", "skip")
    shape = Checkpoint(original).shape()
    rng = np.random.default_rng(0)
    arrays = {}
    for layer in shape.layers:
        experts = np.argsort(rng.random((30, 8)), axis=1)[:, :2].astype(np.int32)
        weights = rng.dirichlet([1, 1], 30).astype(np.float32)
        arrays["routing", layer] = {"experts": experts, "weights": weights, "probability": weights}
    stats = Stats(shape, (30,), arrays)
    bench = KernelBench.of(QUICK | {"routings": ["trace"], "tokens": [1, 30]})
    document = measure_kernels(directory, original, bench, "float32", "cpu", Traces(stats, stats))
    (timed,) = {
        row["rows"] for row in document["measured"] if row["implementation"] == "espalier" and row["tokens"] == 30
    }
    facts = next(row for row in document["routing"] if row["layer"] == document["layer"])
    assert 0 < facts["skipped"] < 0.5
    assert timed == round(60 * (1 - facts["skipped"]))


def test_a_wrong_output_is_not_timed(tiny_model, monkeypatch):
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    from espalier import kernels

    kernels.register()
    right = ALL_EXPERTS_FUNCTIONS["espalier"]
    monkeypatch.setattr(kernels, "register", lambda: None)
    ALL_EXPERTS_FUNCTIONS.register("espalier", lambda *a: right(*a) * 1.01)
    try:
        with pytest.raises(UserError, match=r"espalier: its output for 1 tokens is .* away"):
            measure_kernels(
                tiny_model("mixtral"), tiny_model("mixtral"), KernelBench.of(QUICK), "float32", "cpu", Traces()
            )
    finally:
        ALL_EXPERTS_FUNCTIONS.register("espalier", right)


def test_what_has_no_experts_or_no_such_layer_is_refused(tiny_model):
    with pytest.raises(UserError, match="layer=9 has no MoE block"):
        measure_kernels(
            tiny_model("mixtral"),
            tiny_model("mixtral"),
            KernelBench.of(QUICK | {"layer": 9}),
            "float32",
            "cpu",
            Traces(),
        )
    with pytest.raises(UserError, match="no MoE block whose kernels"):
        measure_kernels(
            tiny_model("llama4_text"), tiny_model("llama4_text"), KernelBench.of(QUICK), "float32", "cpu", Traces()
        )


def test_torch_is_not_needed_to_choose():
    code = "import sys; import espalier.kernels.chooser, espalier.timing.kernel_settings; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def experts_of_a_mixtral(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model("mixtral"), dtype="float32")
    model.set_experts_implementation("eager")
    experts = model.model.layers[0].mlp.experts
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, experts.hidden_dim, generator=generator)
    indices = torch.stack([torch.randperm(experts.num_experts, generator=generator)[:2] for _ in range(9)])
    indices[3, 1] = indices[5, 0] = experts.num_experts  # of no expert
    weights = torch.rand(9, 2, generator=generator)
    loop = torch.zeros_like(hidden)
    for token, (picks, factors) in enumerate(zip(indices.tolist(), weights, strict=True)):
        for expert, factor in zip(picks, factors, strict=True):
            if expert < experts.num_experts:
                gate, up = (experts.gate_up_proj[expert] @ hidden[token]).chunk(2)
                loop[token] += factor * (experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up))
    return experts, hidden, indices, weights, loop


def test_vllm_is_called_as_its_function_wants(tiny_model, monkeypatch):
    experts, hidden, indices, weights, wanted = experts_of_a_mixtral(tiny_model)

    def fused_experts(hidden_states, w1, w2, topk_weights, topk_ids):
        assert topk_ids.dtype == torch.int32
        assert topk_weights.dtype == torch.float32
        assert topk_ids.max() < len(w1)
        width = w2.shape[2]
        gate_up = torch.einsum("td,tknd->tkn", hidden_states, w1[topk_ids.long()])
        inner = torch.nn.functional.silu(gate_up[..., :width]) * gate_up[..., width:]
        return torch.einsum("tkf,tkdf,tk->td", inner, w2[topk_ids.long()], topk_weights)

    monkeypatch.setitem(sys.modules, peers.MODULES["vllm"], SimpleNamespace(fused_experts=fused_experts))
    torch.testing.assert_close(peers.vllm(experts, hidden, indices, weights), wanted)


def test_scattermoe_is_called_as_its_functions_want(tiny_model, monkeypatch):
    experts, hidden, indices, weights, wanted = experts_of_a_mixtral(tiny_model)

    def flatten_sort_count(index, number):
        order = index.flatten().sort(stable=True)
        return order.values, order.indices, index.flatten().bincount(minlength=number).cumsum(0)

    def parallel_linear(x, w, k, by, place, ends, gates=None, grouped_in=False, grouped_out=False):
        assert ends[-1] == len(by) == len(place)
        rows = x if grouped_in else x[place // k]  # in the order of experts
        y = torch.einsum("rd,rdn->rn", rows, w[by])
        if grouped_out:
            return y
        back = torch.empty_like(y)
        back[place] = y
        return (gates[:, None] @ back.view(*gates.shape, -1))[:, 0]

    fake = SimpleNamespace(flatten_sort_count=flatten_sort_count, parallel_linear=parallel_linear)
    monkeypatch.setitem(sys.modules, peers.MODULES["scattermoe"], fake)
    torch.testing.assert_close(peers.scattermoe(experts, hidden, indices, weights), wanted)


def test_peers_are_left_out_with_a_reason(tiny_model):
    bench = KernelBench.of(QUICK | {"implementations": ["eager", "vllm", "scattermoe", "espalier"]})
    model = tiny_model("mixtral")
    document = measure_kernels(model, model, bench, "float32", "cpu", Traces())
    assert {row["implementation"] for row in document["measured"]} == {"eager", "espalier"}
    assert document["left_out"] == {"vllm": "runs on a GPU only", "scattermoe": "runs on a GPU only"}
    assert "Left out: vllm, which runs on a GPU only." in kernel_table.markdown({"row": document})
    layout, gpu = ExpertLayout(8, 64, 32, True, False, False, False, False, "silu"), torch.device("cuda")
    assert peers.unsupported("vllm", layout, gpu) == "is not installed"
