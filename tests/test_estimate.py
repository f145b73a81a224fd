"""Estimates: public parameter counts, sums written out by hand, and the files of real checkpoints."""

from dataclasses import replace

import pytest
import torch

from espalier import conf, estimate, forecast, probes
from espalier.errors import UserError
from espalier.estimate import Hardware, Sizes
from espalier.probes import PROBES
from tiny import save_tiny

KNOWN = {  # billions, as their authors publish them
    "mixtral_8x7b": 46.7,
    "mixtral_8x7b_instruct": 46.7,
    "qwen1_5_moe_a2_7b": 14.3,
    "qwen1_5_moe_a2_7b_chat": 14.3,
    "qwen3_30b_a3b": 30.5,
    "olmoe_1b_7b": 6.9,
    "smollm2_135m": 0.1345,
}
ACTIVE = {"mixtral_8x7b": 12.9, "qwen1_5_moe_a2_7b": 2.7, "qwen3_30b_a3b": 3.3, "olmoe_1b_7b": 1.3}

SMALL = Sizes(
    parameters=1000,
    expert_parameters=30,
    router_row_parameters=5,
    moe_layers=2,
    experts=8,
    top_k=2,
    hidden=5,
    width=2,
    layers=3,
    attention_width=4,
    vocabulary=10,
    tied=False,
    bytes_per_parameter=2,
)


@pytest.mark.parametrize("name", [name for name in conf.names("model") if name != "embedded_moe"])
def test_facts_add_up_to_the_models_transformers_builds(name):
    from transformers import AutoConfig, AutoModelForCausalLM

    facts = conf.load("model", name)["_facts"]
    config = dict(facts["config"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    assert sum(parameter.numel() for parameter in model.parameters()) == facts["total_parameters"]
    assert facts["total_parameters"] / 1e9 == pytest.approx(KNOWN[name], rel=0.005)


@pytest.mark.parametrize("name", ACTIVE)
def test_active_parameters_are_the_published_ones(name):
    assert estimate.sizes_of(name).active / 1e9 == pytest.approx(ACTIVE[name], rel=0.05)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_are_those_of_the_files(family, dtype, tmp_path):
    save_tiny(family, tmp_path, dtype)
    sizes = estimate.sizes_of(str(tmp_path))
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert sizes.parameters == sum(parameter.numel() for parameter in model.parameters())
    shard = (tmp_path / "model.safetensors").stat().st_size
    assert 0 < shard - sizes.disk_bytes < 16384  # the header
    assert (sizes.layers, sizes.experts, sizes.top_k, sizes.vocabulary) == (3, 8, 2, 96)
    assert sizes.moe_layers == (3 if family == "mixtral" else 2)
    assert sizes.expert_parameters == 3 * 32 * 24


def test_a_dense_model_has_sizes(tmp_path):
    sizes = estimate.sizes_of("smollm2_135m")
    assert (sizes.experts, sizes.active, sizes.tied) == (0, 134515008, True)
    # All but the embedding is multiplied, and the embedding as the head.
    assert estimate.forward_flops(sizes, 1, 0) == 2 * 134515008
    assert estimate.forward_flops(sizes, 1, 0, head=False) == 2 * (134515008 - 49152 * 576)


def test_flops_by_hand():
    # active = 1000 - 2 layers x 6 idle experts x 30 = 640; embedding and head are 10 x 5 each
    assert SMALL.active == 640
    assert estimate.forward_flops(SMALL, 7, 16) == 7 * (2 * (640 - 50) + 2 * 3 * 4 * 16)
    plain = 7 * (2 * (640 - 100) + 2 * 3 * 4 * 16)
    assert estimate.collect_flops(SMALL, 7, 16, {"usage"}) == plain
    dense = plain + 7 * 2 * 2 * 6 * 30
    assert estimate.collect_flops(SMALL, 7, 16, {"usage", "mean_output"}) == dense
    assert estimate.collect_flops(SMALL, 7, 16, {"residual_gram"}) == dense + 7 * 2 * 2 * 64 * 5
    many = replace(SMALL, experts=32)  # more than 16 experts: Gram matrices of at most 16,384 tokens
    plain = estimate.collect_flops(many, 20000, 16, set())
    assert estimate.collect_flops(many, 20000, 16, {"residual_gram"}) == plain + 16384 * 2 * 2 * (30 * 30 + 32 * 32 * 5)


def test_forward_flops_agree_with_torchs_own_count(tmp_path):
    """Torch counts the operations of an eager forward pass; attention there is not causal, so it does twice ours."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    save_tiny("mixtral", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager", attn_implementation="eager")
    length, sizes = 8, estimate.sizes_of(str(tmp_path))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(3, 3 + length)[None])
    norms = 2 * length * (2 * sizes.layers + 1) * sizes.hidden  # parameters that are not matrices
    attention = length * 2 * sizes.layers * sizes.attention_width * length
    ours = estimate.forward_flops(sizes, length, length) - norms + attention
    assert counter.get_total_flops() == pytest.approx(ours, rel=0.01)


def test_memory_by_hand():
    # one layer at a time: 4 bytes x 6 tokens x (8 x 5 + 2 x (3 x 2 + 2 x 5)), router logits 4 x 6 x 8
    activations = 4 * 6 * (40 + 32) + 4 * 6 * 8
    assert estimate.collect_memory(SMALL, 12, 2, 3, "float32", {"usage"}) == 4e8 + 4 * 1000 + activations
    assert estimate.score_memory(SMALL, 2, 3, "float32") == 4e8 + 4 * 1000 + activations + 8 * 6 * 10
    dense = estimate.collect_memory(SMALL, 12, 2, 3, "float32", {"mean_output"})
    assert dense == 4e8 + 4 * 1000 + activations + 16 * 6 * 8 * 5
    # 12 tokens in 2 layers: 36 entries of the triangle, 8 inner products, 8 logits, one norm, one index
    gram = estimate.collect_memory(SMALL, 12, 2, 3, "float32", {"residual_gram"})
    assert gram == dense + 2 * 12 * (4 * (36 + 8 + 8 + 1) + 8)


def test_removed_experts_leave_disk_and_rows():
    half = SMALL.without(4)
    assert half.parameters == 1000 - 2 * 4 * 35
    assert half.experts == 4
    assert SMALL.without(4, rows=False).parameters == 1000 - 2 * 4 * 30
    assert half.disk_bytes == 2 * half.parameters


def test_seconds():
    hardware = Hardware(flops=100, disk=10, startup=3)
    assert hardware.seconds(80, 50) == 80 / 40 + 50 / 10 + 3
    assert Hardware.measured().flops > 1e8


def test_constants_are_those_of_the_probes():
    dense = {name for name, probe in PROBES.items() if probe.dense}
    assert dense | {"residual_gram"} == estimate.DENSE_PROBES
    assert estimate.GRAM_ALL_TOKENS_EXPERTS == probes.GRAM_ALL_TOKENS_EXPERTS
    assert estimate.GRAM_TOKENS == probes.GRAM_TOKENS


def test_unknown_sizes_are_told():
    with pytest.raises(UserError, match="sizes are not known without its files"):
        estimate.sizes_of("org/name")


def experiment(tmp_path, monkeypatch, *sweep):
    import shutil

    shutil.copytree(conf.directory(), tmp_path / "conf")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf/experiment/mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /model: mixtral_8x7b\n"
        "  - override /calibration: c4_32x2048\nevaluation: {tasks: [hellaswag, unheard_of], limit: 100}\nsweep:\n"
        + "".join(f"  - {line}\n" for line in sweep)
    )


def test_a_forecast_adds_up_and_writes_nothing(tmp_path, monkeypatch):
    experiment(tmp_path, monkeypatch, "method: none", "{method: [reap, hc_smoe], method.ratio: [0.25, 0.5]}")
    hardware = Hardware(flops=1e12)
    before = sorted(tmp_path.rglob("*"))
    found = forecast.forecast("mine", [], tmp_path / "results", hardware)
    assert sorted(tmp_path.rglob("*")) == before
    assert {name: row.jobs for name, row in found.stages.items()} == {
        "fetch": 1, "tokens": 1, "collect": 1, "plan": 4, "apply": 4, "score": 5, "table": 1, "report": 1,
    }  # fmt: skip
    mixtral = estimate.sizes_of("mixtral_8x7b")
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
    assert any("unheard_of" in line for line in found.unknown)
    assert found.total.seconds == pytest.approx(sum(row.cost.seconds for row in found.stages.values()))


def test_a_forecast_leaves_out_what_is_done(tmp_path, monkeypatch):
    from espalier import graph
    from espalier.store import Store

    experiment(tmp_path, monkeypatch, "{method: reap, method.ratio: 0.25}")
    store = Store(tmp_path / "results")
    planned = graph.expand("mine", [], store)
    graph.save(planned, store)
    for node in planned.nodes:
        if node.stage in ("fetch", "tokens", "probe"):
            path = store.path(node.id)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    found = forecast.forecast("mine", [], tmp_path / "results", Hardware(flops=1e12))
    assert [found.stages[name].done for name in ("fetch", "tokens", "collect", "plan")] == [1, 1, 1, 0]
    assert found.stages["collect"].cost.flops == 0
