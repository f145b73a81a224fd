"""Estimates: public parameter counts, models on the meta device, sums written out by hand, what jobs really wrote."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy
import psutil
import pytest
import torch

import tiny
from espalier import conf, stages
from espalier.artefacts.store import Store
from espalier.collecting.collect import collect_checkpoint
from espalier.costs import estimate, parameters, sizes
from espalier.costs.estimate import Cost
from espalier.costs.parameters import Count, Layer
from espalier.costs.sizes import Sizes
from espalier.errors import UserError
from espalier.families import family_of
from espalier.machine import heap, processor
from espalier.machine.hardware import Hardware
from espalier.models import observe
from espalier.models.running import Running
from espalier.probes import PROBES, residual_gram
from espalier.scoring import perplexity
from espalier.surgery.apply import apply
from espalier.workflow import forecast
from espalier.workflow.job_requests import Requests
from example_plans import example_plan
from tiny import save_tiny

KNOWN = {  # billions, as their authors publish them
    "deepseek_v3": 671,
    "gpt_oss_120b": 116.8,
    "kimi_k2": 1026,
    "mixtral_8x7b": 46.7,
    "mixtral_8x7b_instruct": 46.7,
    "qwen1_5_moe_a2_7b": 14.3,
    "qwen1_5_moe_a2_7b_chat": 14.3,
    "qwen3_30b_a3b": 30.5,
    "olmoe_1b_7b": 6.9,
    "smollm2_135m": 0.1345,
    "llama_2_7b": 6.74,
    "llama_2_13b": 13.02,
    "llama_3_2_1b": 1.24,
    "glm_4_5_air": 106.85,  # without the multi-token-prediction layer, with which the hub says 110
    "ernie_4_5_21b": 21.8,
    "llama_4_scout": 107.8,  # its language model
    "qwen3_coder_480b": 480,
}
ACTIVE = {"mixtral_8x7b": 12.9, "qwen1_5_moe_a2_7b": 2.7, "qwen3_30b_a3b": 3.3, "olmoe_1b_7b": 1.3, "deepseek_v3": 37}

# Two MoE layers of 8 experts and a dense one; embedding and head are 10 x 5 each.
BLOCK = Layer(mixer=100, rest=40, attention=4, experts=8, expert=30, router_row=5)
DENSE = Layer(mixer=100, rest=60, attention=4)
SMALL = Sizes(
    count=Count((DENSE, BLOCK, BLOCK), embedding=50, head=50, norm=5, idle=7),
    hidden=5,
    width=2,
    dense_width=4,
    top_k=2,
    heads=1,
    vocabulary=10,
    bytes_per_parameter=4,
)
HARDWARE = Hardware("test", cores=2, flops=100, memory=1e12, disk=10, startup=3)
WHOLE = Running.of(device="cpu", stream="never", collect_batch_size=2, score_batch_size=2, apply_workers=2)
STREAMED = replace(WHOLE, stream="always")


def meta(config):
    """The model that transformers builds, without memory, and its parameters with the routers' correction biases."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return model, numbers(model)


def numbers(module):
    biases = (buffer for name, buffer in module.named_buffers() if name.endswith("e_score_correction_bias"))
    return sum(tensor.numel() for tensor in [*module.parameters(), *biases])


@pytest.mark.parametrize("name", [name for name in conf.names("model") if name != "embedded_moe"])
def test_facts_add_up_to_the_models_transformers_builds(name):
    from transformers import AutoConfig

    facts = conf.load("model", name)["_facts"]
    config = dict(facts["config"])
    _, total = meta(AutoConfig.for_model(config.pop("model_type"), **config))
    assert total == facts["total_parameters"] == parameters.count(facts["config"]).loaded
    assert total / 1e9 == pytest.approx(KNOWN[name], rel=0.005)


CHANGES = (
    {},
    {"attention_bias": True},
    {"use_bias": True},
    {"use_qk_norm": True},
    {"tie_word_embeddings": True},
    {"q_lora_rank": None},
    {"mamba_proj_bias": True, "lm_head_bias": True},
)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_every_layer_counts_what_transformers_builds(family, changes):
    config = tiny.tiny_config(family, **changes)
    model, total = meta(config)
    counted = parameters.count(config.to_dict())
    assert counted.loaded == total
    assert [layer.total for layer in counted.layers] == [numbers(layer) for layer in model.model.layers]


def test_a_prediction_layer_lies_in_the_files_only():
    """DeepSeek publishes 11.5 billion parameters beside copies of embedding and head, 685 billion in all."""
    found = sizes.sizes_of("deepseek_v3")
    copies = 2 * found.count.embedding
    assert (found.count.idle - copies) / 1e9 == pytest.approx(11.6, rel=0.01)
    assert found.parameters / 1e9 == pytest.approx(685, rel=0.001)
    assert found.disk_bytes == 2 * (found.loaded + found.count.idle)


def test_a_directory_needs_no_weights(tmp_path):
    save_tiny("qwen3_moe", tmp_path)
    whole = sizes.sizes_of(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    assert sizes.sizes_of(str(tmp_path)) == whole


@pytest.mark.parametrize("name", ACTIVE)
def test_active_parameters_are_the_published_ones(name):
    assert sizes.sizes_of(name).active / 1e9 == pytest.approx(ACTIVE[name], rel=0.05)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_are_those_of_the_files(family, dtype, tmp_path):
    save_tiny(family, tmp_path, dtype)
    found = sizes.sizes_of(str(tmp_path))
    shard = (tmp_path / "model.safetensors").stat().st_size
    assert 0 < shard - found.disk_bytes < 16384  # the header
    assert (found.experts, found.top_k, found.vocabulary) == (8, 2, 96)
    assert len(found.moe) == 3 - len(tiny.DENSE_LAYERS.get(family, ()))
    assert found.width == 24


def test_a_dense_model_has_sizes():
    found = sizes.sizes_of("smollm2_135m")
    assert (found.experts, found.active, found.count.head) == (0, 134515008, 0)
    # All but the embedding is multiplied, and the embedding as the head.
    assert estimate.forward_flops(found, 1, 0) == 2 * 134515008
    assert estimate.forward_flops(found, 1, 0, head=False) == 2 * (134515008 - 49152 * 576)


def test_flops_by_hand():
    # loaded: 50 + 50 + 5, 160 dense, 2 x (140 + 240); 6 of 8 experts idle in 2 layers
    assert SMALL.loaded == 1025
    assert SMALL.active == 1025 - 2 * 6 * 30
    assert estimate.forward_flops(SMALL, 7, 16) == 7 * (2 * (665 - 50) + 2 * 3 * 4 * 16)
    plain = 7 * (2 * (665 - 100) + 2 * 3 * 4 * 16)
    assert estimate.collect_flops(SMALL, 7, 16, {"usage"}) == plain
    dense = plain + 7 * 2 * 2 * 6 * 30
    assert estimate.collect_flops(SMALL, 7, 16, {"usage", "mean_output"}) == dense
    assert estimate.collect_flops(SMALL, 7, 16, {"residual_gram"}) == dense + 7 * 2 * 2 * 64 * 5


def test_gram_matrices_of_many_experts_are_of_a_stride_of_tokens():
    many = replace(SMALL, count=replace(SMALL.count, layers=(replace(BLOCK, experts=32),)))
    shape = type("Shape", (), {"experts": 32})
    for tokens in (100, 16384, 20000, 100000):
        stride = residual_gram.ResidualGram(shape, tokens).stride
        assert estimate.gram_tokens(many, tokens) == len(range(0, tokens, stride))


def test_forward_flops_agree_with_torchs_own_count(tmp_path):
    """Torch counts the operations of an eager forward pass; attention there is not causal, so it does twice ours."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    save_tiny("mixtral", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager", attn_implementation="eager")
    length, found = 8, sizes.sizes_of(str(tmp_path))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(3, 3 + length)[None])
    norms = 2 * length * 7 * 32  # parameters that are not matrices
    attention = length * 2 * 3 * 32 * length
    ours = estimate.forward_flops(found, length, length) - norms + attention
    assert counter.get_total_flops() == pytest.approx(ours, rel=0.01)


def test_memory_by_hand():
    process = estimate.PROCESS["collect"]
    # 6 tokens in one layer: 4 bytes x (8 x 5 + 2 x (3 x 2 + 4 x 5)), router logits 4 x 8
    working = 4 * 6 * (40 + 52) + 4 * 6 * 8
    kept = 2 * 32 * 8
    whole = estimate.collect_cost(SMALL, 12, 3, {"usage"}, "float32", WHOLE, HARDWARE)
    # In the files' dtype only the experts, 2 x 8 x 30, are copied when they are stacked; the rest stays mapped.
    assert whole.memory == process + 1.5 * kept + 4 * 480 + working
    assert whole.mapped == estimate.MAPPED_LIBRARIES + 4 * (1025 - 480)
    stacked = replace(SMALL, stacked=True)
    assert estimate.collect_cost(stacked, 12, 3, {"usage"}, "float32", WHOLE, HARDWARE).memory < whole.memory
    other = estimate.collect_cost(SMALL, 12, 3, {"usage"}, "bfloat16", WHOLE, HARDWARE)
    # Converted, all of it: in half of the bytes, all experts there twice for a moment, 2 x 5 x 2 x 2 x 8 of a matrix.
    assert other.memory == process + 1.5 * kept + estimate.KERNEL_BYTES + 2 * 1025 + 12 * 92 + 4 * 6 * 8
    assert (whole.read, whole.written, whole.kept, whole.streamed) == (4 * 1032, kept, kept, False)
    # all experts: 6 x 8 x 5 numbers, in float32 and one and a quarter times in float64
    dense = estimate.collect_cost(SMALL, 12, 3, {"mean_output"}, "float32", WHOLE, HARDWARE)
    assert dense.memory - 1.5 * dense.kept - (whole.memory - 1.5 * kept) == 240 * (4 + 10)
    assert dense.kept == 2 * (8 * 8 * 5)

    streamed = estimate.collect_cost(SMALL, 12, 3, {"usage"}, "float32", STREAMED, HARDWARE)
    # two layers' mixers, a dense and two MoE blocks' feed-forward parts, the embedding, the norm; 12 x 5 activations
    room = 4 * (2 * 100 + 60 + 2 * 280 + 50 + 5)
    assert streamed.memory == process + 1.5 * kept + room + working + 4 * 60
    assert streamed.written == 2 * kept + 3 * 4 * 60  # results twice, the activations after each of three layers
    small = replace(STREAMED, activation_memory=100)
    scratch = estimate.collect_cost(SMALL, 12, 3, {"usage"}, "float32", small, HARDWARE)
    assert streamed.memory - scratch.memory == scratch.disk - streamed.disk == 4 * 60


def test_a_gpu_holds_what_computes():
    gpu = replace(HARDWARE, gpu_flops=1e4, gpu_memory=2e9)
    auto = replace(STREAMED, device="auto")
    there = estimate.collect_cost(SMALL, 12, 3, {"usage"}, "float32", auto, gpu)
    here = estimate.collect_cost(SMALL, 12, 3, {"usage"}, "float32", STREAMED, HARDWARE)
    assert there.gpu
    assert not here.gpu
    assert there.gpu_memory > estimate.CUDA_BYTES
    assert there.seconds(gpu) < here.seconds(HARDWARE)
    assert estimate.streams(SMALL, "float32", replace(auto, stream="auto"), replace(gpu, gpu_memory=1.4e9))
    assert not estimate.streams(SMALL, "float32", replace(auto, stream="auto"), gpu)


def test_slots_are_what_streaming_holds(tmp_path):
    """Bytes that the reader allocates for layers, over all of them, and never gives back meanwhile."""
    from espalier.models.stream import Batch, StreamedModel

    for family in ("mixtral", "deepseek_v3", "jamba"):
        save_tiny(family, tmp_path / family)
        model = StreamedModel(tmp_path / family)
        own, read, done = {}, model._read_layer, [threading.Event() for _ in model.layers]

        def watched(index, read=read, own=own, done=done):
            tensors = read(index)
            own.update({tensor.data_ptr(): tensor.numel() for tensor in tensors.values()})
            done[index].set()
            return tensors

        model._read_layer = watched
        batches = [Batch(torch.arange(3, 9)[None])]
        with torch.no_grad():
            for turn in model.turns(batches, model.activations(batches)):
                # On a busy machine so small a layer may have run, and given its room back, before the next is read.
                assert all(event.wait(60) for event in done[: turn.layer + 2])
                turn.run(0)
        found = sizes.sizes_of(str(tmp_path / family))
        assert sum(own.values()) == pytest.approx(found.slots(), rel=0.05), family


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_statistics_have_the_bytes_that_were_said(family, tmp_path):
    save_tiny(family, tmp_path)
    ids = numpy.random.default_rng(0).integers(3, 90, (4, 16))
    names = tuple(PROBES)
    stats = collect_checkpoint(tmp_path, "float32", WHOLE, ids, None, names)
    stored = sum(array.nbytes for arrays in stats.arrays.values() for array in arrays.values())
    assert estimate.statistics_bytes(sizes.sizes_of(str(tmp_path)), 64, set(names)) == stored


@pytest.mark.parametrize("kind", ["keep", "slice"])
def test_a_checkpoint_has_the_bytes_that_were_said(kind, tmp_path):
    save_tiny("mixtral", tmp_path / "source")
    plan = example_plan("mixtral", kind)
    apply(tmp_path / "source", plan, tmp_path / "out", prove=False)
    before, after = (sizes.sizes_of(str(tmp_path / name)) for name in ("source", "out"))
    cost = estimate.apply_cost(before, before.without(8 - after.experts), False, WHOLE, HARDWARE)
    assert cost.written == after.disk_bytes
    # Pruning reads what it keeps, merging everything; the proof both.
    assert cost.read == before.disk_bytes + 2 * after.disk_bytes
    assert estimate.apply_cost(before, after, True, WHOLE, HARDWARE).read == 2 * before.disk_bytes + after.disk_bytes


def test_a_proof_that_does_not_fit_is_streamed_then_left_out():
    whole = estimate.apply_cost(SMALL, SMALL, False, WHOLE, HARDWARE)
    assert whole.memory == estimate.PROCESS["proof"] + 4 * 1025
    # Of the pruned model, once the source is loaded; a merged group's weights stand in each member's place.
    half = SMALL.without(4)
    two = replace(SMALL, bytes_per_parameter=2)
    assert estimate.apply_cost(two, half, False, WHOLE, HARDWARE).memory == estimate.PROCESS["proof"] + 4 * half.loaded
    assert estimate.apply_cost(two, half, True, WHOLE, HARDWARE).memory == estimate.PROCESS["proof"] + 4 * 1025
    less = estimate.apply_cost(SMALL, SMALL, False, WHOLE, replace(HARDWARE, memory=4.8e8))
    assert less.memory == estimate.PROCESS["proof"] + 4 * (3 * 380 + 105)
    none = estimate.apply_cost(SMALL, SMALL, False, WHOLE, replace(HARDWARE, memory=4e8))
    assert none.read == SMALL.disk_bytes


def test_removed_experts_leave_disk_and_rows():
    half = SMALL.without(4)
    assert half.parameters == 1032 - 2 * 4 * 35
    assert half.experts == 4
    assert SMALL.without(4, rows=False).parameters == 1032 - 2 * 4 * 30
    assert half.disk_bytes == 4 * half.parameters


def test_seconds():
    assert HARDWARE.seconds(80, 50) == 80 / 40 + 50 / 10 + 3
    assert HARDWARE.seconds(80, 50, threads=1) == 80 / 20 + 50 / 10 + 3
    gpu = replace(HARDWARE, gpu_flops=1000, gpu_memory=1)
    assert gpu.seconds(80, 50, gpu=True) == 80 / 400 + 50 / 10 + 3


@pytest.mark.parametrize("name", conf.names("hardware"))
def test_every_machine_has_numbers(name):
    found = Hardware.load(name)
    assert found.name == name
    assert found.flops > 1e9
    assert found.memory > 1e8
    assert (found.gpu_memory is None) or found.gpu_flops > found.flops


def test_this_machine_is_measured_and_its_folder_left_as_it_was(tmp_path):
    found = Hardware.load("here").measured(tmp_path / "results")
    assert found.flops > 1e8
    assert found.disk > 1e6
    assert list(tmp_path.iterdir()) == []
    assert found.memory <= psutil.virtual_memory().total
    assert found.cores == len(os.sched_getaffinity(0))


def test_a_machines_mistakes_are_told(tmp_path, monkeypatch):
    experiment(tmp_path, monkeypatch, "method: none")
    (tmp_path / "conf/hardware/mine.yaml").write_text("name: mine\nflopz: 1\n")
    with pytest.raises(UserError, match="unknown key 'flopz'"):
        Hardware.load("mine")
    (tmp_path / "conf/hardware/mine.yaml").write_text("name: mine\nflops: fast\n")
    with pytest.raises(UserError, match="flops='fast' is no number"):
        Hardware.load("mine")


def test_constants_are_those_of_the_code():
    dense = {name for name, probe in PROBES.items() if probe.dense}
    assert dense | {"residual_gram"} == estimate.DENSE_PROBES == set(estimate.FLOAT64_COPIES)
    assert estimate.CHUNK_BYTES == observe.CHUNK_BYTES
    assert estimate.CPU_TOKENS == perplexity.CPU_TOKENS


def test_unknown_sizes_are_told():
    with pytest.raises(UserError, match="sizes are not known without its files"):
        sizes.sizes_of("org/name")


def experiment(tmp_path, monkeypatch, *sweep):
    shutil.copytree(conf.directory(), tmp_path / "conf")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf/experiment/mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /model: mixtral_8x7b\n"
        "  - override /calibration: c4_32x2048\nevaluation: {tasks: [hellaswag, wsc273], limit: 100}\nsweep:\n"
        + "".join(f"  - {line}\n" for line in sweep)
    )


def test_a_forecast_adds_up_and_writes_nothing(tmp_path, monkeypatch):
    experiment(tmp_path, monkeypatch, "method: none", "{method: [reap, hc_smoe], method.ratio: [0.25, 0.5]}")
    hardware = replace(HARDWARE, flops=1e12, disk=1e9)
    before = sorted(tmp_path.rglob("*"))
    found = forecast.forecast("mine", [], tmp_path / "results", hardware)
    assert sorted(tmp_path.rglob("*")) == before
    assert {name: row.jobs for name, row in found.stages.items()} == {
        "fetch": 1, "tokens": 1, "collect": 1, "plan": 4, "apply": 4, "score": 5, "table": 1, "report": 1,
    }  # fmt: skip
    mixtral = sizes.sizes_of("mixtral_8x7b")
    collect = found.stages["collect"].cost
    asked = {"output_norm", "mean_output", "usage"}
    assert collect.flops == estimate.collect_flops(mixtral, 32 * 2048, 2048, asked)
    assert collect.read == 2 * 46702792704
    # reap slices router rows, hc_smoe keeps them: 32 layers, experts of 3 x 4096 x 14336, rows of 4096
    written = sum(
        2 * (46702792704 - 32 * removed * (3 * 4096 * 14336 + row)) for removed in (2, 4) for row in (4096, 0)
    )
    assert found.stages["apply"].cost.written == written
    assert found.stages["score"].cost.flops > 0
    assert any("wsc273" in line for line in found.unknown)
    assert found.seconds == pytest.approx(sum(row.seconds for row in found.stages.values()))


def test_a_forecast_leaves_out_what_is_done(tmp_path, monkeypatch):
    from espalier.artefacts.store import Store
    from espalier.workflow import graph

    experiment(tmp_path, monkeypatch, "{method: reap, method.ratio: 0.25}")
    store = Store(tmp_path / "results")
    planned = graph.expand("mine", [], store)
    graph.save(planned, store)
    for node in planned.nodes:
        if node.stage in ("fetch", "tokens", "probe"):
            path = store.path(node.id)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    found = forecast.forecast("mine", [], tmp_path / "results", replace(HARDWARE, flops=1e12))
    assert [found.stages[name].done for name in ("fetch", "tokens", "collect", "plan")] == [1, 1, 1, 0]
    assert found.stages["collect"].cost.flops == 0


def test_shards_share_the_tokens_and_the_reduce_rule_is_counted(tmp_path, monkeypatch):
    experiment(tmp_path, monkeypatch, "{method: reap, method.ratio: 0.25}")
    one, four = (
        forecast.forecast("mine", [f"calibration.shards={n}"], tmp_path / "results", HARDWARE).stages for n in (1, 4)
    )
    assert (one["collect"].jobs, four["collect"].jobs, four["reduce"].jobs) == (1, 4, 1)
    assert four["collect"].cost.flops == one["collect"].cost.flops
    assert four["collect"].cost.read == 4 * one["collect"].cost.read


def test_jobs_ask_for_what_their_model_needs(tmp_path, monkeypatch):
    from espalier.artefacts.store import Store
    from espalier.workflow import graph

    experiment(tmp_path, monkeypatch, "{model: [olmoe_1b_7b, mixtral_8x7b], method: reap, method.ratio: 0.25}")
    store = Store(tmp_path / "results", dry=True)
    planned = graph.expand("mine", [], store)
    graph.save(planned, store)
    makers = {store.read_node(node.id)["made_by"] or node.id for node in planned.nodes}
    collects = sorted(
        (node for node in map(store.read_node, makers) if node["stage"] == "collect"),
        key=lambda node: Path(str(store.parent(node, "fetch")["config"]["id"])).name,
    )
    server = Requests(store, Hardware.load("cpu_server"), planned.run["runtime"])
    mixtral, olmoe = (server.of(node["id"]) for node in collects)
    for key in ("mem_mb", "runtime"):
        assert mixtral[key] > 2 * olmoe[key]
    assert mixtral["gpu"] == 0
    assert mixtral["mem_mb"] > 93413  # the weights
    assert server.of(collects[0]["id"], attempt=2)["mem_mb"] == 2 * mixtral["mem_mb"]
    assert server.of(collects[0]["id"], threads=16)["runtime"] < mixtral["runtime"] / 4
    with_gpu = Requests(store, Hardware.load("h100"), planned.run["runtime"])
    assert with_gpu.of(collects[0]["id"])["gpu"] == 1
    assert with_gpu.of(collects[0]["id"])["runtime"] < mixtral["runtime"]
    no_gpu = Requests(store, Hardware.load("h100"), planned.run["runtime"] | {"device": "cpu"})
    assert no_gpu.of(collects[0]["id"])["gpu"] == 0


def test_costs_add_up():
    parts = [
        Cost(flops=1, read=2, written=3, kept=4, disk=9, memory=5),
        Cost(flops=1, read=2, written=3, kept=4, disk=7, memory=6),
    ]
    assert forecast.total(parts) == Cost(flops=2, read=4, written=6, kept=8, disk=13, memory=6)


def test_a_dry_run_prints_what_each_job_asks_for(tmp_path, monkeypatch):
    experiment(tmp_path, monkeypatch, "{model: [olmoe_1b_7b, mixtral_8x7b], method: reap, method.ratio: 0.25}")
    root = Path(__file__).resolve().parents[1]
    shutil.copytree(root / "workflow", tmp_path / "workflow")
    for name in ("Snakefile", "environment.yml"):
        shutil.copy(root / name, tmp_path)
    command = [sys.executable, "-m", "espalier", "run", "mine", "--dry-run", "--profile", "slurm"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    found = re.findall(r"^ *Job \d+: (collect|apply|score) .*\((\d+) MB, (\d+) min\)$", run.stdout + run.stderr, re.M)
    for stage in ("collect", "apply", "score"):
        (least, fast), (most, slow) = sorted((int(mb), int(minutes)) for name, mb, minutes in found if name == stage)
        if stage == "apply":  # the smaller model's proof is loaded whole, the larger one's layer by layer
            assert (least, fast) != (most, slow)
        else:
            assert most > 2 * least, stage
            assert slow > fast, stage
    assert dict.fromkeys(name for name, *_ in found).keys() == {"collect", "apply", "score"}


def test_a_machine_that_is_too_small_is_told(capsys):
    from espalier.workflow import forecast_text

    machine = Hardware.load("h100")
    forecast_text.render_model("kimi_k2", machine, Running.of(), 262144, 2048)
    assert re.search(
        r"too large for h100: calibration needs 8\d\.\d of\s80\.0\sGB of GPU\smemory", capsys.readouterr().out
    )
    forecast_text.render_model("mixtral_8x7b", machine, Running.of(), 262144, 2048)
    assert "too large" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("listed", "slow"),
    [
        ("processor : 0\nflags\t\t: fpu sse2 avx2 fma\n", True),
        ("flags\t\t: fpu avx2 avx512f avx512bw\n", False),
        ("flags\t\t: fpu avx2 avx_ne_convert\n", False),
        ("Features\t: fp asimd\n", True),
        ("Features\t: fp asimd bf16\n", False),
        ("", False),
    ],
)
def test_an_experiment_in_a_dtype_that_the_processor_has_no_products_for_is_told(tmp_path, monkeypatch, listed, slow):
    (tmp_path / "cpuinfo").write_text(listed)
    assert processor.lacks_bfloat16(tmp_path / "cpuinfo") == slow
    assert not processor.lacks_bfloat16(tmp_path / "none")
    monkeypatch.setattr(processor, "lacks_bfloat16", lambda: slow)
    experiment(tmp_path, monkeypatch, "method: none")
    here = replace(HARDWARE, name="here", flops=1e12, gpu_memory=None)

    def said(*overrides, hardware=here):
        return forecast.forecast("mine", [*overrides], tmp_path / "results", hardware).slow

    assert bool(said("model.dtype=bfloat16")) == slow
    assert not said("model.dtype=float32")
    assert not said("model.dtype=bfloat16", hardware=replace(here, name="elsewhere"))
    assert not said("model.dtype=bfloat16", hardware=replace(here, gpu_memory=8e10, gpu_flops=1e15))


def test_kimi_k2_is_estimated_by_its_own_name_and_told_what_to_change_elsewhere(tmp_path):
    facts = conf.load("model", "kimi_k2")["_facts"]
    (tmp_path / "config.json").write_text(json.dumps(dict(facts["config"]) | {"model_type": "kimi_k2"}))
    found = sizes.sizes_of(str(tmp_path))
    assert found.loaded == facts["total_parameters"]
    assert found == sizes.sizes_of("kimi_k2")
    with pytest.raises(UserError, match=r'"model_type": "deepseek_v3"'):
        family_of({"model_type": "kimi_k2", "n_routed_experts": 384})


def test_caches_of_compiled_products_are_bounded_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.setattr(os, "environ", {"LRU_CACHE_CAPACITY": "7"})
    Running.of(device="cpu").torch_device()
    assert os.environ == {"LRU_CACHE_CAPACITY": "7", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": heap.PRIMITIVES}
    assert 2 * int(heap.PRIMITIVES) * 2.8e5 == estimate.KERNEL_BYTES


def test_what_is_timed_compiles_no_product_twice(monkeypatch, tmp_path):
    """Under a bound of 64, products of many numbers of rows took twice their time, each being compiled again."""
    monkeypatch.setattr(os, "environ", {"LRU_CACHE_CAPACITY": "7"})
    seen = {}

    def stop(*_):
        seen.update(os.environ)
        raise InterruptedError

    monkeypatch.setattr("espalier.timing.speed.measure_speed", stop)
    monkeypatch.setattr("espalier.stages.weights", lambda *_: tmp_path)
    monkeypatch.setattr("espalier.stages._directory", lambda *_: tmp_path)
    monkeypatch.setattr(Store, "origin", lambda *_: {})
    node = {"config": {"speed": {"name": "quick"}, "dtype": "bfloat16"}}
    with pytest.raises(InterruptedError):
        stages._speed(node, Store(tmp_path), tmp_path / "speed.json", {})
    assert seen == {"LRU_CACHE_CAPACITY": "7", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": heap.USUAL}
    assert 2 * int(heap.USUAL) * 2.8e5 == estimate.TIMED_KERNEL_BYTES
