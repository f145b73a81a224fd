"""Dequantised weights, against plain loops and against transformers' own functions, bit for bit."""

import json
import math
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from espalier import cli
from espalier.checkpoints.checkpoint import INDEX, Checkpoint
from espalier.checkpoints.quantised import without_quantisation
from espalier.errors import UserError
from espalier.surgery.apply import apply
from espalier.surgery.dequantise import dequantise
from example_plans import example_plan
from tiny import save_tiny

BLOCK = (16, 8)
MAGNITUDES = (0, 0.5, 1, 1.5, 2, 3, 4, 6)


def with_config(directory, **changes):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


def fp8_tensors(name, weight):
    """Quantise a matrix [N, K] in blocks, the last ones smaller, with scales that no power of two helps."""
    rows, columns = BLOCK
    n, k = weight.shape
    scale = torch.empty(-(-n // rows), -(-k // columns))
    quantised = torch.empty(n, k, dtype=torch.float8_e4m3fn)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            scale[i, j] = weight[block].float().abs().max() / 448
            quantised[block] = (weight[block].float() / scale[i, j]).to(torch.float8_e4m3fn)
    return {name: quantised, f"{name}_scale_inv": scale}


@pytest.fixture(scope="module")
def fp8_source(tmp_path_factory):
    """A tiny Mixtral whose experts and attention are fp8 in blocks of 16 x 8."""
    source = save_tiny("mixtral", tmp_path_factory.mktemp("fp8") / "source", torch.bfloat16)
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if "experts" in name or "_proj" in name:
            tensors |= fp8_tensors(name, tensor)
        else:
            tensors[name] = tensor
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    (source / "README.md").write_text("of the model")
    with_config(source, quantization_config={"quant_method": "fp8", "weight_block_size": list(BLOCK)})
    return source


def slow_fp8(weight, scale, rows, columns):
    """One number at a time; Python's product is rounded to fp32, then to bf16."""
    out = torch.empty(weight.shape, dtype=torch.bfloat16)
    numbers, factors = weight.float().tolist(), scale.tolist()
    for i, row in enumerate(numbers):
        for j, number in enumerate(row):
            out[i, j] = torch.tensor(number * factors[i // rows][j // columns], dtype=torch.float32)
    return out


def test_fp8_equals_a_plain_loop_and_the_rest_is_copied(fp8_source, tmp_path):
    heard = []
    report = dequantise(fp8_source, tmp_path / "out", progress=lambda *line: heard.append(line))
    before, after = load_file(fp8_source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert set(after) == {name for name in before if not name.endswith("_scale_inv")}
    checked = 0
    for name, tensor in after.items():
        assert tensor.dtype == torch.bfloat16, name
        scale = before.get(f"{name}_scale_inv")
        if scale is None:
            assert torch.equal(tensor, before[name]), name
        elif "layers.1." in name and ("experts.0" in name or "k_proj" in name):
            assert torch.equal(tensor, slow_fp8(before[name], scale, *BLOCK)), name
            checked += 1
    assert checked == 4
    assert report["tensors"] == {
        "dequantised": len(before) - len(after),
        "copied": len(after) - (len(before) - len(after)),
        "dropped": len(before) - len(after),
    }
    assert heard[-1] == (report["bytes"], report["bytes"])


def test_fp8_equals_transformers(fp8_source, tmp_path):
    dequantise(fp8_source, tmp_path / "out")
    before, after = load_file(fp8_source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    theirs = Fp8Dequantize(None)
    compared = 0
    for name in after:
        scale = before.get(f"{name}_scale_inv")
        n, k = before[name].shape[-2:] if scale is not None else (1, 1)
        if scale is not None and n % BLOCK[0] == 0 and k % BLOCK[1] == 0:  # theirs knows no smaller last block
            assert torch.equal(after[name], theirs._dequantize_one(before[name], scale, torch.bfloat16)), name
            compared += 1
    assert compared > 20


def test_the_result_is_an_ordinary_model(fp8_source, tmp_path):
    out = tmp_path / "out"
    dequantise(fp8_source, out)
    model, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model(torch.arange(5)[None]).logits.isfinite().all()
    before, after = (json.loads((d / "config.json").read_text()) for d in (fp8_source, out))
    assert after == {key: value for key, value in before.items() if key != "quantization_config"}
    names = {path.name for path in fp8_source.iterdir()}
    assert {path.name for path in out.iterdir()} == names
    assert (out / "README.md").read_text() == "of the model"
    apply(out, example_plan("mixtral", "keep"), tmp_path / "kept", prove=False)


def test_fp8_of_128_by_128_stacked_and_with_one_scale(tmp_path):
    source = save_tiny("mixtral", tmp_path / "source")
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    stack, scales = draw(3, 130, 200).to(torch.float8_e4m3fn), draw(3, 2, 2).abs()
    save_file({"stack": stack, "stack_scale_inv": scales}, source / "model.safetensors", {"format": "pt"})
    with_config(source, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    dequantise(source, tmp_path / "out")
    expected = torch.stack([slow_fp8(w, s, 128, 128) for w, s in zip(stack, scales, strict=True)])
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["stack"], expected)

    weight, scale = stack[0].clone(), scales[0, 0, 0].clone()
    save_file({"w": weight, "w_scale_inv": scale}, source / "model.safetensors", {"format": "pt"})
    with_config(source, quantization_config={"quant_method": "fp8"})
    dequantise(source, tmp_path / "one")
    found = load_file(tmp_path / "one" / "model.safetensors")["w"]
    assert torch.equal(found, slow_fp8(weight, scale.reshape(1, 1), 130, 200))


def slow_mxfp4(blocks, scales):
    """One number at a time: [E, R, G, 16] and [E, R, G] to [E, G * 32, R]."""
    experts, rows, groups, _ = blocks.shape
    out = torch.empty(experts, groups * 32, rows, dtype=torch.bfloat16)
    for e in range(experts):
        for r in range(rows):
            for g in range(groups):
                for n in range(32):
                    byte = int(blocks[e, r, g, n // 2])
                    code = byte >> 4 if n % 2 else byte & 15
                    sign = -1.0 if code >= 8 else 1.0
                    exponent = int(scales[e, r, g]) - 127
                    out[e, g * 32 + n, r] = math.ldexp(sign * MAGNITUDES[code & 7], exponent)
    return out


@pytest.fixture(scope="module")
def mxfp4_source(tmp_path_factory):
    """A tiny GPT-OSS with random mxfp4 experts, whose weights are as large as the plain ones."""
    source = save_tiny("gpt_oss", tmp_path_factory.mktemp("mxfp4") / "source", torch.bfloat16, intermediate_size=32)
    tensors = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, rows = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, rows, inputs // 32, 16), generator=generator, dtype=torch.uint8)
        tensors[f"{name}_blocks"] = blocks
        tensors[f"{name}_scales"] = torch.randint(120, 127, blocks.shape[:3], generator=generator, dtype=torch.uint8)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with_config(source, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return source


def test_mxfp4_equals_a_plain_loop_and_transformers(mxfp4_source, tmp_path):
    report = dequantise(mxfp4_source, tmp_path / "out")
    before, after = load_file(mxfp4_source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert {n.removesuffix("_blocks") for n in before if not n.endswith("_scales")} == set(after)
    packed = [name for name in after if f"{name}_blocks" in before]
    assert report["tensors"]["dequantised"] == report["tensors"]["dropped"] == len(packed) == 6
    for name in packed:
        blocks, scales = before[f"{name}_blocks"], before[f"{name}_scales"]
        assert torch.equal(after[name], convert_moe_packed_tensors(blocks, scales)), name
        if "layers.1." in name:
            assert torch.equal(after[name], slow_mxfp4(blocks, scales)), name
    assert all(torch.equal(after[name], before[name]) for name in set(after) - set(packed))


def test_mxfp4_of_every_byte_and_scale(tmp_path):
    source = save_tiny("gpt_oss", tmp_path / "source")
    blocks = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(1, 252, 1, 1)
    scales = torch.arange(252, dtype=torch.uint8).reshape(1, 252, 1).repeat(1, 1, 16).contiguous()
    save_file({"x_blocks": blocks, "x_scales": scales}, source / "model.safetensors", {"format": "pt"})
    with_config(source, quantization_config={"quant_method": "mxfp4"})
    dequantise(source, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")["x"]
    assert torch.equal(found.view(torch.int16), slow_mxfp4(blocks, scales).view(torch.int16))  # signs of zeros too
    normal = slice(2, 252)  # theirs takes powers of two in fp32, where the two smallest are not normal numbers
    theirs = convert_moe_packed_tensors(blocks[:, normal], scales[:, normal])
    assert torch.equal(found[:, :, normal], theirs)


def test_a_dequantised_gpt_oss_computes_what_transformers_makes_of_the_source(mxfp4_source, tmp_path):
    from transformers import Mxfp4Config

    dequantise(mxfp4_source, tmp_path / "out")
    ids = torch.arange(24).reshape(2, 12)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(
        mxfp4_source, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.bfloat16
    )
    assert plain.dtype == torch.bfloat16
    with torch.inference_mode():
        assert torch.equal(plain(ids).logits, theirs(ids).logits)


def changed(source, tmp_path, change):
    copy = shutil.copytree(source, tmp_path / "changed")
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    return copy


W1 = "model.layers.1.block_sparse_moe.experts.3.w1.weight"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.pop(f"{W1}_scale_inv"), rf"tensor {W1} is F8_E4M3 without {W1}_scale_inv\. Download"),
        (lambda t: t.update({f"{W1}_scale_inv": torch.ones(2, 5)}),
         rf"{W1}_scale_inv is \[2, 5\], but \[24, 32\] in blocks of \[16, 8\] needs \[2, 4\]\. Correct weight_block"),
        (lambda t: t[f"{W1}_scale_inv"].view(-1)[3:4].fill_(math.inf), f"tensor {W1} holds NaN or infinite"),
        (lambda t: t[W1].view(torch.uint8)[20, 9:10].fill_(0x7F), f"tensor {W1} holds NaN or infinite"),
        (lambda t: t["model.norm.weight"].fill_(math.nan), "norm.weight holds 32 NaN"),
        (lambda t: t.update({"v": torch.ones(3).to(torch.float8_e4m3fn), "v_scale_inv": torch.ones(1)}),
         r"tensor v \[3\] of F8_E4M3 is no matrix"),
    ],
)  # fmt: skip
def test_fp8_that_is_damaged(change, expected, fp8_source, tmp_path):
    source = changed(fp8_source, tmp_path, change)
    with pytest.raises(UserError, match=expected) as error:
        dequantise(source, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["changed"]


UP = "model.layers.1.mlp.experts.gate_up_proj"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.pop(f"{UP}_scales"), rf"{UP}_scales is missing, but {UP}_blocks is \["),
        (lambda t: t.update({f"{UP}_scales": t[f"{UP}_scales"][:, 1:].clone()}), rf"{UP}_scales is U8 \["),
        (lambda t: t[f"{UP}_scales"].view(-1)[7:8].fill_(255), f"tensor {UP}_blocks holds NaN or infinite"),
    ],
)
def test_mxfp4_that_is_damaged(change, expected, mxfp4_source, tmp_path):
    source = changed(mxfp4_source, tmp_path, change)
    with pytest.raises(UserError, match=expected):
        dequantise(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["changed"]


def test_scales_in_another_shard_and_an_interrupted_run(fp8_source, tmp_path):
    source = shutil.copytree(fp8_source, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    names = sorted(tensors, key=lambda name: (name.endswith("_scale_inv"), name))
    shards = {f"model-{n}.safetensors": names[n::8] for n in range(8)}
    for file, share in shards.items():
        save_file({name: tensors[name] for name in share}, source / file, {"format": "pt"})
    weight_map = {name: file for file, share in shards.items() for name in share}
    (source / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    dequantise(fp8_source, tmp_path / "one")
    dequantise(source, tmp_path / "whole")
    one = load_file(tmp_path / "one" / "model.safetensors")
    many = [load_file(tmp_path / "whole" / file) for file in Checkpoint(tmp_path / "whole").files]
    assert sum(map(len, many)) == len(one)
    assert all(torch.equal(tensor, one[name]) for share in many for name, tensor in share.items())

    def progress(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dequantise(source, tmp_path / "out", progress=progress)
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / ".out.partial" / "files").iterdir()}
    assert kept
    dequantise(source, tmp_path / "out")
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in kept} == kept
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "no quantization_config: nothing to dequantise"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantised \(gptq\)\. .*GPTQModel"),
        ({"quantization_config": {"quant_method": "awq"}}, r"quantised \(awq\)\. .*GPTQModel"),
        ({"quantization_config": {"quant_method": "gguf"}}, r"quantised \(gguf\)\. .*gguf_file"),
        ({"quantization_config": {"quant_method": "torchao"}}, r"quantised \(torchao\)\. Use the unquantised model"),
    ],
)
def test_other_kinds_are_refused(settings, expected, tmp_path, capsys):
    source = save_tiny("mixtral", tmp_path / "source")
    with_config(source, **settings)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.main(["dequantise", str(source), str(tmp_path / "out")])
    assert end.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert re.search(expected, line)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_command(fp8_source, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["dequantise", str(fp8_source), str(tmp_path / "out"), "--workers", "2"])
    assert not end.value.code
    assert "tensors of fp8 now bf16" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        cli.main(["dequantise", str(fp8_source), str(tmp_path / "out")])
    assert end.value.code == 2
    assert "exists already" in capsys.readouterr().err


def test_a_text_model_inside_another_is_declared_plain_too():
    config = {"text_config": {"quantization_config": {"quant_method": "fp8"}, "hidden_size": 8}, "dtype": "bfloat16"}
    assert without_quantisation(config) == {"text_config": {"hidden_size": 8}, "dtype": "bfloat16"}
