"""What apply refuses, and that nothing half-written stays behind."""

import json
import os
import shutil
import subprocess
from collections import namedtuple
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from espalier.errors import UserError
from espalier.plans.operations import Keep, Skip
from espalier.plans.plan import Plan
from espalier.surgery.apply import apply
from example_plans import example_plan, moe_layers
from tiny import save_tiny


def plan_of(family_name, *operations):
    return Plan({"name": "example"}, dict.fromkeys(moe_layers(family_name), operations))


def names_around(path):
    return sorted(p.name for p in path.iterdir())


def test_refuses_nan_by_name_and_leaves_nothing(tmp_path):
    source = save_tiny("mixtral", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    tensors[name][3, 4] = float("nan")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"{name} holds 1 NaN or infinite numbers of 768"):
        apply(source, example_plan("mixtral", "remap"), tmp_path / "out")
    assert names_around(tmp_path) == ["source"]


def test_refuses_what_it_cannot_do(tmp_path, tiny_model):
    source = tiny_model("mixtral")
    plan = example_plan("mixtral", "keep")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("precious")
    with pytest.raises(UserError, match="exists already"):
        apply(source, plan, tmp_path / "taken")
    assert (tmp_path / "taken" / "file").read_text() == "precious"
    with pytest.raises(UserError, match="is the source itself"):
        apply(source, plan, source, replace=True)
    with pytest.raises(UserError, match=r"layer 0: keep leaves 1 of 8 experts, but the router picks top_k=2"):
        apply(source, plan_of("mixtral", Keep((3,))), tmp_path / "out")
    with pytest.raises(UserError, match="keep cannot follow skip"):
        apply(source, plan_of("mixtral", Skip(0.5), Keep((0, 1, 2))), tmp_path / "out")
    with pytest.raises(UserError, match="layer 7 has no MoE block"):
        apply(source, Plan({"name": "x"}, {7: plan.layers[0]}), tmp_path / "out")
    assert names_around(tmp_path) == ["taken"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
         r"\(fp8\)\. Run `espalier dequantise .*quantised OUT` and use OUT\."),
        ({"quantization_config": {"quant_method": "mxfp4"}}, r"\(mxfp4\)\. Run `espalier dequantise"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"\(gptq\)\. .*unquantised .*GPTQModel"),
        ({"quantization_config": {"quant_method": "awq"}}, r"\(awq\)\. .*unquantised .*GPTQModel"),
        ({"quantization_config": {"load_in_4bit": True}}, r"\(bitsandbytes\)\. .*\.dequantize\(\)\.save_pretrained"),
        ({"quantization_config": {"quant_method": "gguf"}}, r"\(gguf\)\. .*gguf_file=FILE"),
        ({"compression_config": {"format": "pack-quantized"}}, r"\(compressed-tensors\)\. .*CompressedTensorsDeq"),
        ({"text_config": {"quantization_config": {"quant_method": "hqq"}}}, r"\(hqq\)\. Use the unquantised model"),
        ({"quantization_config": {}}, r"\(unknown\)\. Use the unquantised model"),
    ],
)  # fmt: skip
def test_refuses_quantised_weights_by_name_and_says_what_helps(settings, expected, tmp_path):
    source = save_tiny("mixtral", tmp_path / "quantised")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | settings))
    with pytest.raises(UserError, match=f"config.json: quantization_config: the weights are quantised {expected}") as e:
        apply(source, example_plan("mixtral", "keep"), tmp_path / "out")
    assert "\n" not in str(e.value)
    assert names_around(tmp_path) == ["quantised"]


def test_replace_overwrites(tmp_path, tiny_model):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("")
    apply(tiny_model("mixtral"), example_plan("mixtral", "keep"), out, replace=True, prove=False)
    assert "old" not in names_around(out)
    assert names_around(tmp_path) == ["out"]


Usage = namedtuple("Usage", "total used free")


def test_checks_the_disk_before_it_starts(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(UserError, match=r"needs 0\.\d+ GB, but .* has 0\.000 GB free"):
        apply(tiny_model("mixtral"), example_plan("mixtral", "keep"), tmp_path / "new" / "out")
    assert names_around(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 kB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    argv = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mount)]
    if os.geteuid() != 0 or subprocess.run(argv, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)


def test_a_disk_that_fills_up_leaves_nothing(small_disk: Path, tiny_model, monkeypatch):
    source = tiny_model("mixtral")
    with pytest.raises(UserError, match="Free some space"):
        apply(source, example_plan("mixtral", "tie"), small_disk / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, 10**9))
    with pytest.raises(UserError, match="no space left on the disk"):
        apply(source, example_plan("mixtral", "tie"), small_disk / "out")
    assert names_around(small_disk) == []


def test_a_full_disk_that_grows_is_written_on(small_disk: Path, tiny_model, tmp_path, monkeypatch):
    source, plan = tiny_model("mixtral", max_shard_size="20KB"), example_plan("mixtral", "tie")
    apply(source, plan, tmp_path / "whole", prove=False)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, 10**9))
        with pytest.raises(
            UserError, match=r"no space left .* \d+ finished shards stay in .*; free some space"
        ) as error:
            apply(source, plan, small_disk / "out", prove=False)
    assert "\n" not in str(error.value)
    kept = {p.name: p.stat().st_mtime_ns for p in (small_disk / ".out.partial" / "files").iterdir()}
    assert kept
    needed = sum(p.stat().st_size for p in (tmp_path / "whole").iterdir())
    remount(small_disk, f"size={needed + 200_000}")  # what is there already needs no second place
    apply(source, plan, small_disk / "out", prove=False)
    assert {name: (small_disk / "out" / name).stat().st_mtime_ns for name in kept} == kept
    for path in (tmp_path / "whole").iterdir():
        assert (small_disk / "out" / path.name).read_bytes() == path.read_bytes()
    assert names_around(small_disk) == ["out"]


def test_a_mount_point_is_refused_before_anything_is_written(small_disk: Path, tiny_model):
    remount(small_disk, "size=4m")
    with pytest.raises(
        UserError, match=r"disk: is a mount point, which cannot be replaced\. Write to a directory in it"
    ):
        apply(tiny_model("mixtral"), example_plan("mixtral", "keep"), small_disk, prove=False)
    assert names_around(small_disk.parent) == ["disk"]
    assert names_around(small_disk) == []


def test_a_folder_that_cannot_be_written_is_one_line(small_disk: Path, tiny_model):
    source, plan = tiny_model("mixtral"), example_plan("mixtral", "keep")
    remount(small_disk, "ro,size=4m")
    with pytest.raises(UserError, match=r"out: cannot be written, .*Read-only file system\. Choose another") as error:
        apply(source, plan, small_disk / "out")
    assert "\n" not in str(error.value)
    remount(small_disk, "rw")
    (small_disk / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written, .*(Not a directory|File exists)\. Choose another"):
        apply(source, plan, small_disk / "file" / "out")
    assert names_around(small_disk) == ["file"]
