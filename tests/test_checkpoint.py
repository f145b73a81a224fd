"""Reading headers and writing shards, against the safetensors library and the models themselves."""

import contextlib
import json
import re
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from espalier.checkpoints.checkpoint import INDEX, Checkpoint
from espalier.checkpoints.shards import OutputTensor, ShardWriter
from espalier.checkpoints.tensor_files import read_header
from espalier.errors import UserError
from espalier.plans.operations import Keep
from espalier.plans.plan import Plan
from espalier.surgery.apply import apply
from example_plans import example_plan
from tiny import FAMILIES, ONE_EXPERT, save_tiny


@pytest.fixture
def sharded(tmp_path, tiny_model):
    """A copy of a tiny Mixtral in many shards."""
    return shutil.copytree(tiny_model("mixtral", max_shard_size="20KB"), tmp_path / "sharded")


@pytest.mark.parametrize("family_name", FAMILIES)
def test_shape_is_the_models(family_name, tiny_model):
    source = tiny_model(family_name)
    checkpoint = Checkpoint(source)
    shape = checkpoint.shape()
    model = AutoModelForCausalLM.from_pretrained(source)
    parts = {n: [*layer.children()] for n, layer in enumerate(model.model.layers)}
    blocks = {n: part for n, children in parts.items() for part in children if hasattr(part, "experts")}
    experts = next(iter(blocks.values())).experts
    held = [*model.parameters(), *(b for name, b in model.named_buffers() if name in model.state_dict())]
    assert shape.family == family_name
    assert shape.layers == tuple(blocks)
    assert (shape.experts, shape.top_k, shape.hidden, shape.width) == (8, 1 if family_name in ONE_EXPERT else 2, 32, 24)
    assert shape.total_parameters == sum(tensor.numel() for tensor in held)
    assert shape.expert_parameters * 8 == sum(p.numel() for p in experts.parameters())
    biased = family_name in ("deepseek_v3", "ernie4_5_moe", "glm4_moe", "gpt_oss", "minimax_m2")
    assert shape.router_row_parameters == 32 + biased
    assert shape.renormalise == (
        family_name not in ("deepseek_v2", "jamba", "llama4_text", "olmoe", "phimoe", "qwen2_moe")
    )
    routed = sum(p.numel() for block in blocks.values() for p in block.experts.parameters())
    assert shape.always_active_parameters == shape.total_parameters - routed == checkpoint.always_active_parameters
    assert checkpoint.expert_counts == dict.fromkeys(blocks, 8)


def test_tied_embeddings_count_once(tmp_path):
    source = save_tiny("mixtral", tmp_path, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(source)
    assert Checkpoint(source).parameters == sum(p.numel() for p in model.parameters())
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()  # as some published checkpoints do
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    assert Checkpoint(source).parameters == sum(p.numel() for p in model.parameters())


def test_always_active_parameters_where_layers_differ(applied):
    for kind in ("uneven_keep", "uneven_remap"):
        out = Checkpoint(applied("mixtral", kind)[1])
        model_parameters = sum(e.size for name, e in out.entries.items() if not name.endswith("expert_map"))
        routed = sum(e.size for name, e in out.entries.items() if ".experts." in name)
        assert out.parameters == model_parameters
        assert out.always_active_parameters == model_parameters - routed
        assert out.expert_counts == {0: 4, 1: 4, 2: 6}
        assert out.shape().experts == 6


def test_headers_and_tensors_equal_the_librarys(sharded):
    checkpoint = Checkpoint(sharded)
    found = 0
    for file in checkpoint.files:
        with safe_open(sharded / file, framework="pt") as shard:
            assert set(checkpoint.tensors_of(file)) == set(shard.keys())
            for name in shard.keys():  # noqa: SIM118  (safe_open is no mapping)
                entry = checkpoint.entries[name]
                tensor = shard.get_tensor(name)
                assert torch.equal(checkpoint.tensor(name), tensor)
                assert (entry.file, entry.shape, entry.dtype) == (file, tuple(tensor.shape), "F32")
                assert (entry.size, entry.nbytes) == (tensor.numel(), tensor.nbytes)
                found += 1
    assert found == len(checkpoint.entries)


def mixed_tensors():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return {
        "odd": (draw(3, 5).bfloat16(), "BF16"),
        "wide": (draw(7).double(), "F64"),
        "map": (torch.arange(9), "I64"),
        "half": (draw(2, 3, 1).half(), "F16"),
        "flag": (torch.tensor([True, False, True]), "BOOL"),
        "scalar": (draw(1)[0], "F32"),
        "empty": (torch.zeros(0, 4), "F32"),
        "strided": (draw(4, 6).T, "F32"),
    }


@pytest.mark.parametrize(("limit", "files"), [(10**6, 2), (100, 4), (1, 8)])
def test_written_shards_are_read_by_the_library(limit, files, tmp_path):
    tensors = mixed_tensors()
    outputs = [OutputTensor(name, dtype, tuple(t.shape), lambda t=t: [t]) for name, (t, dtype) in tensors.items()]
    heard = []
    writer = ShardWriter([outputs[:3], [], outputs[3:]], limit)
    names = writer.write(tmp_path, lambda *report: heard.append(report))
    found = {}
    for name in names:
        found |= load_file(tmp_path / name)
        entries = list(read_header(tmp_path / name).values())
        assert sum(e.nbytes for e in entries) <= limit or len([e for e in entries if e.nbytes]) == 1
    assert set(found) == set(tensors)
    for name, (tensor, _) in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert heard[-1] == (writer.nbytes, writer.nbytes)
    index = json.loads((tmp_path / INDEX).read_text())
    assert set(index["weight_map"]) == set(tensors)
    assert set(index["weight_map"].values()) == set(names)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t, _ in tensors.values())
    if limit != 1:
        assert len(names) == files


def test_one_shard_needs_no_index(tmp_path):
    tensor = torch.ones(3)
    assert ShardWriter([[], [OutputTensor("a", "F32", (3,), lambda: [tensor])]]).write(tmp_path) == [
        "model.safetensors"
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    with pytest.raises(ValueError, match="announced F32"):
        ShardWriter([[OutputTensor("a", "F32", (4,), lambda: [tensor])]]).write(tmp_path)


def test_truncated_shard(sharded):
    path = sharded / Checkpoint(sharded).files[3]
    data = path.read_bytes()
    for cut in (len(data) - 1, 100, 4, 0):
        path.write_bytes(data[:cut])
        with pytest.raises(UserError, match=rf"{path.name}: .*truncated shard.*Download it again"):
            Checkpoint(sharded)
    path.write_bytes(data + b"x")
    with pytest.raises(UserError, match=f"longer than its header says, {len(data) + 1} bytes instead of {len(data)}"):
        Checkpoint(sharded)
    path.write_bytes(data.replace(b'"F32"', b'"F4" ', 1))
    with pytest.raises(UserError, match=r"tensor \S+ has \d+ bytes, but F4 \[.*\] means \d+\. Download"):
        Checkpoint(sharded)
    path.write_bytes(data[:8] + b"?" + data[9:])
    with pytest.raises(UserError, match="not a safetensors header"):
        Checkpoint(sharded)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(UserError, match="Git LFS pointer"):
        Checkpoint(sharded)


def test_missing_shard_or_tensor(sharded):
    checkpoint = Checkpoint(sharded)
    (sharded / checkpoint.files[2]).rename(sharded / "elsewhere")
    with pytest.raises(UserError, match=rf"1 of {len(checkpoint.files)} shards are missing: {checkpoint.files[2]}"):
        Checkpoint(sharded)
    (sharded / "elsewhere").rename(sharded / checkpoint.files[2])
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.extra"] = checkpoint.files[0]
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"does not hold tensor model\.extra"):
        Checkpoint(sharded)
    (sharded / INDEX).write_text("[]")
    with pytest.raises(UserError, match="not an index of shards"):
        Checkpoint(sharded)
    (sharded / INDEX).unlink()
    with pytest.raises(UserError, match=f"{len(checkpoint.files)} shards but no {INDEX}"):
        Checkpoint(sharded)


def test_shards_beside_a_single_file_are_refused(sharded):
    """transformers reads the single file, whatever the index says."""
    shutil.copyfile(sharded / Checkpoint(sharded).files[0], sharded / "model.safetensors")
    with pytest.raises(UserError, match=r"holds both model\.safetensors and the \d+ shards of .*Remove what is not"):
        Checkpoint(sharded)


def test_missing_expert(tmp_path):
    source = save_tiny("mixtral", tmp_path)
    tensors = load_file(source / "model.safetensors")
    for part in ("w1", "w2", "w3"):
        del tensors[f"model.layers.1.block_sparse_moe.experts.7.{part}.weight"]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="says 8 experts, but layer 1 holds 7 in its shards"):
        Checkpoint(source).shape()


def test_no_safetensors(tmp_path):
    with pytest.raises(UserError, match=r"config\.json: no such file. Name a Hugging Face model directory"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="no JSON object"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no safetensors weights, no weights"):
        Checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"only pytorch_model\.bin. Convert the model"):
        Checkpoint(tmp_path)


def test_dense_and_unknown_models_open_but_have_no_shape(tmp_path):
    config = AutoConfig.for_model(
        "llama", vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.parameters > 0
    with pytest.raises(UserError, match="model_type='llama' is a dense model without experts"):
        checkpoint.shape()
    document = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(document | {"model_type": "newmoe", "num_experts": 4}))
    with pytest.raises(UserError, match="a Mixture-of-Experts family that Espalier does not know"):
        Checkpoint(tmp_path).shape()


QUANTISED = {  # dtypes that torch only stores: bytes of three rows of 32 numbers
    "F8_E4M3": 96, "F8_E4M3FNUZ": 96, "F8_E5M2": 96, "F8_E5M2FNUZ": 96, "F8_E8M0": 96, "F4": 48,
}  # fmt: skip


def with_raw_tensor(source, name, dtype, shape, raw):
    """Add a tensor of any dtype to a directory's one file, in the place of an old one of its name."""
    path = source / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    header.pop("__metadata__", None)
    kept = {key: entry for key, entry in header.items() if key != name}
    body = b""
    for entry in kept.values():
        start, stop = entry["data_offsets"]
        entry["data_offsets"] = [len(body), len(body) + stop - start]
        body += data[start:stop]
    kept[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(raw)]}
    text = json.dumps({"__metadata__": {"format": "pt"}} | kept).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + body + raw)


def raw_tensor(source, name):
    """Return dtype, shape and bytes of a tensor of a directory's one file."""
    content = (source / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    entry = json.loads(content[8 : 8 + length])[name]
    start, stop = (8 + length + edge for edge in entry["data_offsets"])
    return entry["dtype"], entry["shape"], content[start:stop]


@pytest.mark.parametrize("dtype", QUANTISED)
def test_a_tensor_that_torch_only_stores_is_copied_by_its_bytes(dtype, tmp_path, tiny_model):
    source = shutil.copytree(tiny_model("mixtral"), tmp_path / "source")
    raw = bytes(n % 0x70 for n in range(QUANTISED[dtype]))  # none of them a NaN or an infinity
    with_raw_tensor(source, "model.extra.weight", dtype, [3, 32], raw)
    assert Checkpoint(source).parameters == Checkpoint(tiny_model("mixtral")).parameters + 96
    apply(source, example_plan("mixtral", "keep"), tmp_path / "out", prove=False)
    assert raw_tensor(tmp_path / "out", "model.extra.weight") == (dtype, [3, 32], raw)


@pytest.mark.parametrize("dtype", QUANTISED)
def test_a_tensor_that_torch_only_stores_is_not_computed_with(dtype, tmp_path, tiny_model):
    source = shutil.copytree(tiny_model("mixtral"), tmp_path / "source")
    checkpoint = Checkpoint(source)
    name = checkpoint.family.expert_tensors(1, 3)[2]
    raw = bytes(checkpoint.entries[name].size * QUANTISED[dtype] // 96)
    with_raw_tensor(source, name, dtype, list(checkpoint.entries[name].shape), raw)
    assert raw_tensor(source, name) == (dtype, [32, 24], raw)
    message = rf"tensor {re.escape(name)} has dtype {dtype}, which is quantised: it can only be copied\. Use"
    with pytest.raises(UserError, match=message):
        apply(source, example_plan("mixtral", "remap"), tmp_path / "out", prove=False)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=message) if dtype == "F4" else contextlib.nullcontext():
        Checkpoint(source).read_into(name, torch.empty(32, 24))  # as a streamed model does; float8 is converted
    others = tuple(e for e in range(8) if e != 3)  # without that expert nothing needs it
    apply(source, Plan({"name": "x"}, {1: (Keep(others),)}), tmp_path / "out", prove=False)


@pytest.mark.parametrize(
    ("dtype", "byte"), [("F8_E4M3", 0x7F), ("F8_E5M2", 0x7C), ("F8_E5M2", 0x7E), ("F8_E8M0", 0xFF)]
)
def test_a_nan_or_infinity_of_one_byte_is_found(dtype, byte, tmp_path, tiny_model):
    source = shutil.copytree(tiny_model("mixtral"), tmp_path / "source")
    with_raw_tensor(source, "model.extra.weight", dtype, [4, 8], bytes(31) + bytes([byte]))
    with pytest.raises(UserError, match=r"tensor model\.extra\.weight holds 1 NaN or infinite numbers of 32"):
        apply(source, example_plan("mixtral", "keep"), tmp_path / "out", prove=False)


def test_a_dtype_that_torch_has_not_is_named(tmp_path, tiny_model):
    source = shutil.copytree(tiny_model("mixtral"), tmp_path / "source")
    with_raw_tensor(source, "model.extra.weight", "F6_E2M3", [4, 8], bytes(24))
    with pytest.raises(UserError, match=r"tensor model\.extra\.weight has dtype F6_E2M3, which is quantised"):
        Checkpoint(source)
