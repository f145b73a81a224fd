"""Checkpoints as plans make them: file by file against the source, and as models against the live plan."""

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from espalier.checkpoints.checkpoint import Checkpoint
from espalier.errors import UserError
from espalier.families import family_of
from espalier.models import runtime
from espalier.plans.operations import Keep, Merge, Skip
from espalier.plans.plan import Plan
from espalier.surgery.apply import apply
from espalier.surgery.prove import TOLERANCE, prove
from espalier.surgery.prove import main as prove_main
from example_plans import GROUPS, KINDS, WEIGHTS, example_plan, examples, moe_layers, needs_code
from plain_block import NAMES, tensors_of
from tiny import FAMILIES, VOCABULARY, save_tiny

IDS = torch.arange(2 * 12).reshape(2, 12) * 7 % VOCABULARY


def logits(model):
    with torch.inference_mode():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


def plan_of(family_name, *operations):
    return Plan({"name": "example"}, dict.fromkeys(moe_layers(family_name), operations))


def names_around(path):
    return sorted(p.name for p in path.iterdir())


@pytest.mark.parametrize(("family_name", "kind"), examples())
def test_written_model_computes_the_live_plan(family_name, kind, applied):
    source, out, plan = applied(family_name, kind)
    family = family_of(Checkpoint(source).config)
    expected = logits(runtime.live(runtime.load(source), plan, family))
    model, loading = runtime.load_with_info(out)
    assert loading == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=2e-5 * expected.abs().max().item())
    assert ("espalier" in Checkpoint(out).config) == needs_code(family_name, kind)


@pytest.mark.parametrize("kind", ["keep", "remap_skip"])
def test_written_model_computes_the_live_plan_in_bfloat16(kind, applied):
    source, out, plan = applied("qwen2_moe", kind, "bfloat16")
    assert {entry.dtype for entry in Checkpoint(out).entries.values()} <= {"BF16", "I64"}
    assert runtime.load(out).dtype == torch.bfloat16
    for streamed in (False, True):  # compares in fp32: rounding of activations cannot hide a wrong tensor
        report = prove(source, out, plan, streamed)
        assert "error" not in report
        assert report["max_abs_diff"] <= TOLERANCE * report["max_abs_logit"]
    with torch.inference_mode():
        assert runtime.load(out)(input_ids=IDS).logits.isfinite().all()


@pytest.mark.parametrize(("family_name", "kind"), examples("keep", "remap", "keep_skip"))
def test_the_streamed_proof_holds(family_name, kind, applied):
    source, out, plan = applied(family_name, kind)
    report = prove(source, out, plan, streamed=True)
    assert "error" not in report
    assert report["max_abs_diff"] <= TOLERANCE * report["max_abs_logit"]


@pytest.mark.parametrize("kind", ["uneven_keep", "uneven_remap"])
@pytest.mark.parametrize("family_name", FAMILIES)
def test_layers_may_keep_different_numbers_of_experts(family_name, kind, applied):
    source, out, plan = applied(family_name, kind)
    family = family_of(Checkpoint(source).config)
    counts = dict.fromkeys(moe_layers(family_name), 4) | {2: 6}
    assert Checkpoint(out).expert_counts == counts
    expected = logits(runtime.live(runtime.load(source), plan, family))
    torch.testing.assert_close(logits(runtime.load(out)), expected, rtol=0, atol=2e-5 * expected.abs().max().item())


@pytest.mark.parametrize("family_name", FAMILIES)
def test_keep_copies_survivors_and_slices_the_router(family_name, applied):
    source, out, _ = applied(family_name, "keep")
    before, after = tensors_of(source), tensors_of(out)
    survivors = list(KINDS["keep"][0].experts)
    block, parts, router = NAMES[family_name]
    expected = dict(before)  # shared experts, dense layers and attention as they were
    for layer in moe_layers(family_name):
        prefix = block.format(layer)
        for part in parts:
            if "{}" not in part:
                expected[f"{prefix}.{part}"] = before[f"{prefix}.{part}"][survivors]
                continue
            for expert in range(8):
                del expected[f"{prefix}.{part.format(expert)}"]
            for new, old in enumerate(survivors):
                expected[f"{prefix}.{part.format(new)}"] = before[f"{prefix}.{part.format(old)}"]
        for part in router:
            rows = before[f"{prefix}.{part}"]
            expected[f"{prefix}.{part}"] = rows[:, survivors] if len(rows) == 1 else rows[survivors]
    assert set(after) == set(expected)
    for name, tensor in expected.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor), name


@pytest.mark.parametrize("kind", ["remap", "slice", "tie"])
def test_merge_writes_weighted_sums(kind, applied):
    source, out, _ = applied("mixtral", kind)
    before, after = tensors_of(source), tensors_of(out)
    block = "model.layers.2.block_sparse_moe"
    group_of = [next(g for g, group in enumerate(GROUPS) if e in group) for e in range(8)]
    stored = range(8) if kind == "tie" else range(4)
    for expert in stored:
        group = group_of[expert] if kind == "tie" else expert
        for part in ("w1", "w2", "w3"):
            expected = sum(
                before[f"{block}.experts.{e}.{part}.weight"].double() * w
                for e, w in zip(GROUPS[group], WEIGHTS[group], strict=True)
            )
            assert torch.equal(after[f"{block}.experts.{expert}.{part}.weight"], expected.float())
    assert not any(f"{block}.experts.{len(stored)}." in name for name in after)
    rows = before[f"{block}.gate.weight"]
    assert torch.equal(after[f"{block}.gate.weight"], rows[[0, 1, 4, 5]] if kind == "slice" else rows)
    if kind == "remap":
        assert after[f"{block}.expert_map"].tolist() == group_of
    else:
        assert not any(name.endswith("expert_map") for name in after)


@pytest.mark.parametrize("kind", [*KINDS, "uneven_keep", "uneven_remap"])
def test_parameters_on_disk_are_the_plans(kind, applied):
    source, out, plan = applied("qwen2_moe", kind)
    shape = Checkpoint(source).shape()
    counts = plan.parameter_counts(shape)
    stored = sum(t.numel() for name, t in tensors_of(out).items() if not name.endswith(("expert_map", "skip_factor")))
    assert stored == counts["stored"]
    assert json.loads((out / "plan.json").read_text())["counts"] == counts


def test_identity_plans_leave_the_logits_bit_equal(tmp_path, tiny_model):
    source = tiny_model("qwen3_moe")
    expected = logits(runtime.load(source))
    singletons = tuple((e,) for e in range(8))
    apply(source, plan_of("qwen3_moe", Keep(tuple(range(8)))), tmp_path / "keep", prove=False)
    for router in ("remap", "slice", "tie"):
        merge = Merge(singletons, ((1.0,),) * 8, router)
        apply(source, plan_of("qwen3_moe", merge), tmp_path / router, prove=False)
    apply(source, plan_of("qwen3_moe", Skip(0.0)), tmp_path / "skip", prove=False)
    for name in ("keep", "slice", "tie", "remap", "skip"):
        assert torch.equal(logits(runtime.load(tmp_path / name)), expected), name
    before = tensors_of(source)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(tmp_path / "keep").items())


def test_merging_identical_experts_changes_nothing(tmp_path):
    source = save_tiny("mixtral", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    for name in list(tensors):
        if ".experts.3." in name:
            tensors[name] = tensors[name.replace(".experts.3.", ".experts.0.")].clone()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    expected = logits(runtime.load(source))
    groups = ((0, 3), (1,), (2,), (4,), (5,), (6,), (7,))
    for router in ("remap", "tie"):
        merge = Merge(groups, ((0.3, 0.7), *(((1.0,),) * 6)), router)
        apply(source, plan_of("mixtral", merge), tmp_path / router, prove=False)
        found = logits(runtime.load(tmp_path / router))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * expected.abs().max().item())


def test_shards_may_hold_the_members_of_a_group_apart(tmp_path, tiny_model, applied):
    source = tiny_model("mixtral", max_shard_size="20KB")
    files = Checkpoint(source).files
    assert len(files) > 10
    seen = []
    report = apply(
        source, example_plan("mixtral", "remap"), tmp_path / "out", prove=False, progress=lambda *a: seen.append(a)
    )
    assert seen[-1] == (report["bytes"], report["bytes"])
    assert seen == sorted(seen)
    one = tensors_of(applied("mixtral", "remap")[1])
    many = tensors_of(tmp_path / "out")
    assert set(one) == set(many)
    assert all(torch.equal(one[name], many[name]) for name in one)
    tensors = report["tensors"]
    assert tensors["copied"] + tensors["transformed"] + tensors["dropped"] == len(Checkpoint(source).entries)
    assert tensors["written"] == len(many)
    assert report["shards"] == len(list((tmp_path / "out").glob("*.safetensors")))


def test_keep_then_keep_then_skip_composes_to_the_base_models_ids(tmp_path, tiny_model):
    source = tiny_model("olmoe")
    apply(source, plan_of("olmoe", Keep((0, 2, 3, 5, 7))), tmp_path / "first", prove=False)
    apply(tmp_path / "first", plan_of("olmoe", Keep((1, 2, 4))), tmp_path / "second", prove=False)
    step = plan_of("olmoe", Skip(0.4))
    apply(tmp_path / "second", step, tmp_path / "third", prove=False)
    whole = Plan.load(tmp_path / "third" / "plan.json")
    assert whole.layers == {layer: (Keep((2, 3, 7)), Skip(0.4)) for layer in range(3)}
    apply(source, whole, tmp_path / "direct", prove=False)
    direct, chained = tensors_of(tmp_path / "direct"), tensors_of(tmp_path / "third")
    assert set(direct) == set(chained)
    assert all(torch.equal(direct[name], chained[name]) for name in direct)
    assert (tmp_path / "direct" / "config.json").read_text() == (tmp_path / "third" / "config.json").read_text()
    assert "error" not in prove(tmp_path / "second", tmp_path / "third", step)


def test_only_skip_follows_a_remap(tmp_path, applied):
    source, remapped, plan = applied("mixtral", "remap")
    skip = plan_of("mixtral", Skip(0.6))
    apply(remapped, skip, tmp_path / "both", prove=False)
    assert "error" not in prove(remapped, tmp_path / "both", skip)
    at_once = plan_of("mixtral", *plan.layers[0], Skip(0.6))
    assert "error" not in prove(source, tmp_path / "both", at_once)
    with pytest.raises(UserError, match="keep cannot follow merge"):
        apply(remapped, plan_of("mixtral", Keep((0, 1))), tmp_path / "keep", prove=False)
    with pytest.raises(UserError, match="skip cannot follow skip"):
        apply(tmp_path / "both", skip, tmp_path / "twice", prove=False)
    assert names_around(tmp_path) == ["both"]


def test_proof_runs_in_a_fresh_process_and_catches_a_wrong_tensor(tmp_path, applied, monkeypatch):
    source, first, _ = applied("qwen2_moe", "keep")
    step = plan_of("qwen2_moe", Skip(0.6))
    report = apply(first, step, tmp_path / "out", card={"calibration": "some text"})
    assert report["proof"]["max_abs_diff"] <= TOLERANCE * report["proof"]["max_abs_logit"]
    assert report["loads_in"] == "transformers with trust_remote_code"

    wrong = tmp_path / "wrong"
    shutil.copytree(tmp_path / "out", wrong)
    tensors = load_file(wrong / "model.safetensors")
    name = "model.layers.2.mlp.experts.1.up_proj.weight"
    tensors[name] = tensors[name] * 1.02
    save_file(tensors, wrong / "model.safetensors", {"format": "pt"})
    for streamed in (False, True):
        assert "logits differ" in prove(first, wrong, step, streamed)["error"]
    tensors[f"{name}.extra"] = torch.ones(1)
    save_file(tensors, wrong / "model.safetensors", {"format": "pt"})
    for streamed in (False, True):
        assert "unexpected keys" in prove(first, wrong, step, streamed)["error"]

    # A failed proof keeps nothing.
    failed = subprocess.CompletedProcess([], 1, json.dumps({"error": "logits differ by 2 of 3"}) + "\n", "")
    monkeypatch.setattr(subprocess, "run", lambda *args, **settings: failed)
    with pytest.raises(UserError, match=r"failed its proof: logits differ by 2 of 3\. Nothing was kept"):
        apply(source, example_plan("qwen2_moe", "keep"), tmp_path / "bad")
    crashed = subprocess.CompletedProcess([], 1, "", "Traceback\nKeyError: 'x'\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **settings: crashed)
    with pytest.raises(UserError, match="failed its proof: KeyError: 'x'"):
        apply(source, example_plan("qwen2_moe", "keep"), tmp_path / "bad")
    assert names_around(tmp_path) == ["out", "wrong"]


def test_a_proof_that_the_system_ended_keeps_the_shards(tmp_path, tiny_model, monkeypatch, capsys):
    source, plan, out = tiny_model("mixtral"), example_plan("mixtral", "keep"), tmp_path / "out"
    # As the kernel ends a process that takes more memory than there is.
    program, run = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)", subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda argv, **settings: run([sys.executable, "-c", program], **settings))
    with pytest.raises(UserError, match=r"its proof was ended by signal 9, .* 1 finished shards stay in ") as error:
        apply(source, plan, out)
    assert "\n" not in str(error.value)
    assert names_around(tmp_path) == [".out.partial"]

    # The fresh process itself, without the memory, or the disk, that it needs.
    plan.save(tmp_path / "plan.json")
    for short in (lambda *_: torch.empty(10**15), lambda *_: Path("/dev/full").write_text("x")):
        monkeypatch.setattr("espalier.surgery.prove.prove", short)
        assert prove_main([str(source), str(out), str(tmp_path / "plan.json")]) == 1
        told = capsys.readouterr().out
        assert json.loads(told)["short"] is True
        monkeypatch.setattr(subprocess, "run", lambda argv, **_: subprocess.CompletedProcess(argv, 1, told, ""))  # noqa: B023
        with pytest.raises(UserError, match=r"its proof was ended by (Runtime|OS)Error: .* 1 finished shards stay in "):
            apply(source, plan, out)
    (before,) = (tmp_path / ".out.partial/files").glob("*.safetensors")
    number = before.stat().st_ino
    apply(source, plan, out, prove=False)
    assert (out / before.name).stat().st_ino == number


def test_several_chat_templates_go_along(tmp_path, tiny_model):
    source = shutil.copytree(tiny_model("mixtral"), tmp_path / "source")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = {"default": "plain", "tool_use": "tools"}
    tokenizer.save_pretrained(source)
    apply(source, example_plan("mixtral", "keep"), tmp_path / "out", prove=False)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == {"default": "plain", "tool_use": "tools"}


PROGRAM = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for directory, trust in json.loads(sys.argv[1]):
    model, loading = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=trust, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading
    ids = torch.arange(24).reshape(2, 12) * 7 % 96
    with torch.inference_mode():
        logits = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert AutoTokenizer.from_pretrained(directory)("w5 w6")["input_ids"] == [5, 6]
    print(json.dumps(logits[:, -1, :4].tolist()))
assert not any(name.split(".")[0] == "espalier" for name in sys.modules)
"""


def test_loads_without_espalier_in_processes_side_by_side(tmp_path, applied):
    kinds = examples("remap", "keep_skip")
    made = [applied(*key) for key in [("mixtral", "keep"), ("olmoe", "remap_skip"), *kinds]]
    expected = {out: logits(runtime.load(out))[:, -1, :4] for _, out, _ in made}
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    # -I: no PYTHONPATH and no current folder; -S would lose torch, so an editable install is blocked by name.
    block = "import sys; sys.modules['espalier'] = None\n"
    jobs = []
    for share in (made, made[::-1]):  # every checkpoint in both processes, met from both ends
        listed = json.dumps([[str(out), "espalier" in Checkpoint(out).config] for _, out, _ in share])
        program = block + PROGRAM.replace("assert not any(name", "del sys.modules['espalier']\nassert not any(name")
        argv = [sys.executable, "-I", "-c", program, listed]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        jobs.append((share, subprocess.Popen(argv, cwd=tmp_path, env=environment, text=True, **pipes)))
    for share, job in jobs:
        stdout, stderr = job.communicate(timeout=600)
        assert job.returncode == 0, stderr[-2000:]
        for (_, out, _), line in zip(share, stdout.splitlines(), strict=True):
            torch.testing.assert_close(torch.tensor(json.loads(line)), expected[out], rtol=1e-4, atol=1e-5)


def test_checkpoints_of_one_name_and_different_code_do_not_clash(tmp_path, tiny_model):
    models = {}
    for family_name in ("mixtral", "olmoe"):
        out = tmp_path / family_name / "model"
        apply(tiny_model(family_name), example_plan(family_name, "skip"), out, prove=False)
        models[family_name] = runtime.load(out)
    assert [base.__name__ for base in (type(model).__mro__[1] for model in models.values())] == [
        "MixtralForCausalLM",
        "OlmoeForCausalLM",
    ]
    assert type(models["mixtral"]).__module__ != type(models["olmoe"]).__module__


def test_side_files_and_card(tmp_path):
    source = save_tiny("olmoe", tmp_path / "source")
    (source / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# A model\n")
    (source / "LICENSE").write_text("text")
    (source / "pytorch_model.bin").write_bytes(b"old")
    plan = Plan(
        {"name": "reap", "ratio": 0.5, "seed": 0},
        example_plan("olmoe", "keep").layers,
        model={"id": "org/base", "revision": "abc"},
    )
    out = tmp_path / "out"
    apply(source, plan, out, prove=False, card={"calibration": "embedded (128 x 512)", "node": "0123"})
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"} <= set(names_around(out))
    assert not {"pytorch_model.bin", "modeling_espalier.py"} & set(names_around(out))
    card = (out / "README.md").read_text()
    for expected in (
        "base_model: org/base\nlicense: apache-2.0",
        "abc",
        "`reap` (seed=0)",
        "0.5",
        "embedded (128 x 512)",
        "Stock transformers",
        "not tried",
    ):
        assert expected in card
    assert "language" not in card
    apply(out, plan_of("olmoe", Skip(0.5)), tmp_path / "skip", prove=False)
    card = (tmp_path / "skip" / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "`reap` (seed=0), then `example`" in card
    assert "trust_remote_code=True" in card
    (source / "README.md").unlink()
    apply(source, plan, tmp_path / "unknown", prove=False)
    assert "see the base model" in (tmp_path / "unknown" / "README.md").read_text()


def test_a_proof_takes_no_more_than_its_job_may(tmp_path, tiny_model, monkeypatch):
    """What the machine has beside is not the job's: a control group's limit, or Slurm's, counts."""
    source = tiny_model("mixtral")
    whole = 8 * Checkpoint(source).parameters + 5e8
    monkeypatch.setattr("psutil.virtual_memory", lambda: namedtuple("Memory", "available")(10**15))
    monkeypatch.setattr("espalier.surgery.apply._prove", lambda *given: {"options": given[-1]})
    found = []
    for left in (whole + 1, whole - 1):
        monkeypatch.setattr("espalier.machine.limits.group_bounds", lambda root, left=left: iter([left]))
        out = tmp_path / str(len(found))
        found.append(apply(source, example_plan("mixtral", "keep"), out)["proof"].get("options", "none"))
    assert found[0] == []
    assert found[1] != []


def test_proof_is_streamed_or_left_out_where_memory_does_not_suffice(tmp_path, monkeypatch):
    source = save_tiny("mixtral", tmp_path / "source", num_hidden_layers=12)
    checkpoint = Checkpoint(source)
    keep = Plan({"name": "test"}, {layer: (Keep((0, 2, 5, 7)),) for layer in range(12)})

    def proof(free, name):
        monkeypatch.setattr("psutil.virtual_memory", lambda: namedtuple("Memory", "available")(free))
        return apply(source, keep, tmp_path / name)["proof"]

    whole = 8 * checkpoint.parameters + 5e8
    assert proof(whole + 1, "whole")["streamed"] is False
    streamed = proof(whole - 1, "streamed")
    assert streamed["streamed"] is True
    assert streamed["max_abs_diff"] <= TOLERANCE * streamed["max_abs_logit"]
    assert proof(1e6, "none") == {"skipped": "needs about 0.5 GB of memory, 0.0 GB available"}
