"""Models run one decoder layer at a time: equal to transformers' own forward, small in memory, resumable."""

import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from espalier.checkpoints.checkpoint import Checkpoint
from espalier.checkpoints.weights import WeightMap
from espalier.collecting.collect import collect, collect_checkpoint
from espalier.errors import UserError
from espalier.models import runtime
from espalier.models.activations import Activations
from espalier.models.running import Running
from espalier.models.stream import Batch, StreamedModel
from espalier.plans.operations import NO_ATTENTION_WEIGHTS
from espalier.probes import PROBES
from killing import killed_until_done, run
from tiny import COMMON, FAMILIES, VOCABULARY, save_tiny

DENSE = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 6},
    "qwen3": {"head_dim": 8},
    "phi": {},
    "phi3": {},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 6},
    "gemma3_text": {"head_dim": 8, "sliding_window": 6},
}
ROUNDED = ("jamba",)  # its Mamba layers give strided outputs; stored ones are contiguous, which rounds otherwise
STREAMED = Running.of(device="cpu", stream="always", collect_batch_size=2)
WHOLE = Running.of(device="cpu", stream="never", collect_batch_size=2)


def tokens(seed=0, rows=5, length=11):
    """Sequences of unequal lengths, one padded on the left, the last without its own batch mate."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    mask[3, :4] = 0
    return ids, mask


def batches(ids, mask):
    return [Batch.of(*part) for part in zip(ids.split(2), mask.split(2), strict=True)]


def streamed_logits(directory, dtype, parts, **options):
    model = StreamedModel(directory, dtype, **options)
    states = model.activations(parts)
    with torch.no_grad():
        for turn in model.turns(parts, states):
            for number in range(len(parts)):
                turn.run(number)
        with model.head(states) as head:
            found = [head.logits(batch, number) for number, batch in enumerate(parts)]
    tensors = [*model.model.named_parameters(), *model.model.named_buffers()]
    assert all(tensor.is_meta for _, tensor in tensors)  # nothing is left in memory
    return found


def aligned(model):
    """The model with its weights copied: mapped ones lie unaligned, for which kernels may round otherwise."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.eval()


def plain_logits(model, parts):
    aligned(model)
    with torch.no_grad():
        return [model(input_ids=b.ids, attention_mask=b.mask, use_cache=False).logits for b in parts]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_moe_logits_are_those_of_the_loaded_model(name, dtype, tied, tmp_path):
    save_tiny(name, tmp_path, dtype, tie_word_embeddings=tied)
    parts = batches(*tokens())
    whole = plain_logits(runtime.load(tmp_path, dtype), parts)
    for found, expected in zip(streamed_logits(tmp_path, dtype, parts), whole, strict=True):
        if name in ROUNDED:
            torch.testing.assert_close(found, expected)
        else:
            assert torch.equal(found, expected)


def test_files_of_another_dtype_in_inference_mode(tmp_path):
    save_tiny("mixtral", tmp_path, torch.bfloat16, num_hidden_layers=6)
    parts = batches(*tokens())
    whole = plain_logits(runtime.load(tmp_path, torch.float32), parts)
    with torch.inference_mode():
        found = streamed_logits(tmp_path, torch.float32, parts)
    for logits, expected in zip(found, whole, strict=True):
        assert torch.equal(logits, expected)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", DENSE)
def test_dense_logits_are_those_of_the_loaded_model(name, tied, tmp_path):
    config = COMMON | {"intermediate_size": 48, "tie_word_embeddings": tied} | DENSE[name]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **config)).save_pretrained(tmp_path)
    parts = batches(*tokens())
    whole = plain_logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), parts)
    for found, expected in zip(streamed_logits(tmp_path, "auto", parts, prefetch=False), whole, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_is_filled_as_transformers_loads_it(name, tmp_path):
    save_tiny(name, tmp_path, torch.bfloat16, max_shard_size="20KB")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    skeleton = runtime.skeleton(tmp_path, torch.float32)
    weights = WeightMap(skeleton, Checkpoint(tmp_path))
    assert (weights.missing, weights.unexpected) == ([], [])
    expected = loaded.state_dict()
    tensors = {name: torch.full_like(tensor, 7.0) for name, tensor in expected.items()}
    weights.fill(tensors)
    for key, tensor in tensors.items():
        assert torch.equal(tensor, expected[key]), key


@pytest.mark.parametrize("name", FAMILIES)
def test_statistics_are_those_of_the_loaded_model(name, tmp_path):
    save_tiny(name, tmp_path)
    ids, mask = tokens(1)
    checkpoint = Checkpoint(tmp_path)
    model = aligned(runtime.load(tmp_path))
    probes = [probe for probe in PROBES if probe != "token_importance" or name not in NO_ATTENTION_WEIGHTS]
    whole = collect(model, checkpoint.shape(), checkpoint.family, ids, mask, probes, batch_size=2)
    found = collect_checkpoint(tmp_path, "float32", STREAMED, ids, mask, probes)
    assert found.sequence_tokens == whole.sequence_tokens
    assert set(found.arrays) == set(whole.arrays)
    for key, arrays in whole.arrays.items():
        for array, expected in arrays.items():
            tolerance = {"rtol": 1e-4, "atol": 1e-4} if name in ROUNDED else {"rtol": 0, "atol": 0}
            np.testing.assert_allclose(found.arrays[key][array], expected, err_msg=f"{key} {array}", **tolerance)


def test_activations_may_lie_in_a_file(tmp_path):
    shapes = [(2, 5), (1, 3)]
    held, filed = (Activations(shapes, 4, torch.bfloat16, memory, tmp_path) for memory in (1e9, 8))
    assert held.nbytes == filed.nbytes == 2 * (10 + 3) * 4
    for states in (held, filed):
        states[1] = torch.full((1, 3, 4), 2.5, dtype=torch.bfloat16)
        states[0] = torch.arange(40).view(2, 5, 4).bfloat16()
        assert torch.equal(states[1], torch.full((1, 3, 4), 2.5, dtype=torch.bfloat16))
        assert float(states[0].sum()) == 780
    filed.save(tmp_path / "kept.safetensors", {"layers": "3"})
    held[0] = torch.zeros(2, 5, 4)
    held.load(tmp_path / "kept.safetensors")
    assert torch.equal(held[0], filed[0])
    assert [path.name for path in tmp_path.iterdir()] == ["kept.safetensors"]  # the scratch file has no name


def test_a_scratch_disk_without_room_is_told(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"no room for 0\.00 GB of activations \(No space left"):
        Activations([(2, 5)], 4, torch.float32, 8, tmp_path)


def test_streamed_statistics_with_activations_in_a_file(tmp_path):
    save_tiny("mixtral", tmp_path / "model")
    ids, mask = tokens()
    small = Running.of(device="cpu", stream="always", collect_batch_size=2, activation_memory=64, scratch=str(tmp_path))
    found = collect_checkpoint(tmp_path / "model", "float32", small, ids, mask, ["usage"])
    expected = collect_checkpoint(tmp_path / "model", "float32", WHOLE, ids, mask, ["usage"])
    for key, arrays in expected.arrays.items():
        np.testing.assert_array_equal(found.arrays[key]["gate_sum"], arrays["gate_sum"])


def test_finished_layers_are_not_run_again(tmp_path, monkeypatch):
    save_tiny("deepseek_v3" if "deepseek_v3" in FAMILIES else "qwen2_moe", tmp_path / "model")
    ids, mask = tokens()
    probes = ["usage", "mean_output", "routing"]
    expected = collect_checkpoint(tmp_path / "model", "float32", STREAMED, ids, mask, probes)
    expected.save(tmp_path / "expected.safetensors")
    read = StreamedModel._read_layer
    state = tmp_path / "state"

    class KilledError(Exception):
        pass

    def killed(self, index):
        if index == 2:
            raise KilledError
        return read(self, index)

    monkeypatch.setattr(StreamedModel, "_read_layer", killed)
    with pytest.raises(KilledError):
        collect_checkpoint(tmp_path / "model", "float32", STREAMED, ids, mask, probes, state=state)
    seen = []
    monkeypatch.setattr(StreamedModel, "_read_layer", lambda self, index: seen.append(index) or read(self, index))
    found = collect_checkpoint(tmp_path / "model", "float32", STREAMED, ids, mask, probes, state=state)
    assert seen == [2]
    found.save(tmp_path / "found.safetensors")
    assert (tmp_path / "found.safetensors").read_bytes() == (tmp_path / "expected.safetensors").read_bytes()

    seen.clear()  # other tokens: the state is of no use
    collect_checkpoint(tmp_path / "model", "float32", STREAMED, ids.flip(0), mask.flip(0), probes, state=state)
    assert seen == [0, 1, 2]


def collect_into(model, ids, state, out):
    """What the killed process does."""
    torch.set_num_threads(1)
    running = Running.of(device="cpu", stream="always", collect_batch_size=1)
    collect_checkpoint(model, "float32", running, np.load(ids), None, ["usage", "mean_output"], state=state).save(out)


def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path):
    model = save_tiny("mixtral", tmp_path / "model", num_hidden_layers=12)
    np.save(tmp_path / "ids.npy", tokens(2, rows=24, length=48)[0].numpy())

    def arguments(name):
        return model, tmp_path / "ids.npy", tmp_path / f"{name}.state", tmp_path / f"{name}.safetensors"

    _, seconds = run(collect_into, *arguments("whole"))
    killed_until_done(collect_into, arguments("parts"), 20, seconds)
    assert (tmp_path / "parts.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {
        "ids.npy",
        "model",
        *(f"{n}.{kind}" for n in ("whole", "parts") for kind in ("state", "safetensors")),
    }
    whole = {path.name for path in (tmp_path / "whole.state").iterdir()}
    assert {path.name for path in (tmp_path / "parts.state").iterdir()} == whole


def test_a_missing_tensor_and_a_wrong_shape_are_told(tmp_path):
    directory = save_tiny("mixtral", tmp_path)
    path = directory / "model.safetensors"
    whole = load_file(path)
    name = "model.layers.1.self_attn.q_proj.weight"
    save_file({key: value for key, value in whole.items() if key != name}, path, {"format": "pt"})
    with pytest.raises(UserError, match=rf"1 tensors of the model are missing in its shards, first {name}"):
        StreamedModel(directory)
    save_file(whole | {name: torch.zeros(32, 16)}, path, {"format": "pt"})
    with pytest.raises(UserError, match=rf"{name} makes \[32, 16\] where config\.json means \[32, 32\]"):
        streamed_logits(directory, "auto", batches(*tokens()))
    save_file(whole | {name: torch.full((32, 32), float("nan"))}, path, {"format": "pt"})
    with pytest.raises(UserError, match=rf"{name} holds 1024 NaN"):
        streamed_logits(directory, "auto", batches(*tokens()))
    gone = "model.layers.1.block_sparse_moe.experts.7.w2.weight"
    save_file({key: value for key, value in whole.items() if key != gone}, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"7 tensors match .* config\.json says 8 experts"):
        streamed_logits(directory, "auto", batches(*tokens()))


def test_it_streams_what_does_not_fit(tmp_path, monkeypatch):
    checkpoint = Checkpoint(save_tiny("mixtral", tmp_path))
    auto = Running.of(device="cpu")
    for free, streams in ((1e12, False), (1e6, True)):
        monkeypatch.setattr("espalier.models.running.free_bytes", lambda device, free=free: free)
        assert auto.streams(checkpoint, "float32") is streams
        assert STREAMED.streams(checkpoint, "float32")
        assert not WHOLE.streams(checkpoint, "float32")
    with pytest.raises(UserError, match="conf/runtime: stream='sometimes'"):
        Running.of(stream="sometimes")
    with pytest.raises(UserError, match="activation_memory='much' is no number of bytes"):
        Running.of(activation_memory="much")
    assert Running.of(activation_memory="1.5GB").activation_memory == 1.5e9
