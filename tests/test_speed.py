"""Timing against the uncompressed model: ideals by hand, a clock that counts, and a small experiment."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer

from dense_models import EVEN, LAYERS, LINEAR, WIDTH, save_dense, split_plan
from espalier.errors import UserError
from espalier.models.running import Running
from espalier.models.runtime import load
from espalier.plans.split import Split
from espalier.scoring import intervals
from espalier.surgery.apply import apply
from espalier.timing import speed
from espalier.timing.speed_settings import Timing

CPU = Running.of(device="cpu", stream="never")
TIMING = Timing("test", prompt=12, new=4, rounds=3)
HIDDEN = 32
WORDS = [("a", " ".join(f"w{3 + 7 * n % 90}" for n in range(40))), ("b", " ".join(f"w{5 + n % 80}" for n in range(40)))]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_dense("llama", tmp_path_factory.mktemp("dense"))


@pytest.fixture
def half(dense, tmp_path):
    """Two of four blocks for each token."""
    split = Split(**EVEN, router="linear", k=2, tensors_of=LINEAR)
    apply(dense, split_plan(split), tmp_path / "half", prove=False)
    return tmp_path / "half"


@pytest.fixture(autouse=True)
def text(monkeypatch):
    monkeypatch.setattr(speed, "held_out", lambda domain, task: WORDS)


def test_ideals_are_the_arithmetic(dense, half):
    found = speed.measure_speed(half, dense, TIMING, "float32", CPU)
    whole = sum(p.numel() for p in load(dense).parameters())
    saved = LAYERS * (WIDTH // 2 * 3 * HIDDEN - 4 * HIDDEN)  # half of the neurons, less a router of four rows
    assert found["active"] == {"original": whole, "model": whole - saved}
    embedding = load(dense).get_input_embeddings().weight.numel()
    assert found["decode"]["ideal"] == pytest.approx((whole - embedding - saved) / (whole - embedding))
    heads = load(dense).config
    attention = 2 * heads.num_attention_heads * heads.head_dim * 12 / 2  # scores and sums over half of 12 tokens
    flops = 2 * 12 * (whole - 2 * embedding) + 2 * 12 * LAYERS * attention
    assert found["prefill"]["ideal"] == pytest.approx(1 - 2 * 12 * saved / flops, rel=1e-6)
    assert len(found["prefill"]["ratios"]) == len(found["decode"]["ratios"]) == 3


def test_ratios_are_of_what_the_clock_says(dense, half, monkeypatch):
    """A clock that moves by 1 for each token of the uncompressed model, and by 3 for each of the other."""
    now, order = [0.0], []

    def watched(directory, dtype, device, experts):
        model, each = load(directory, dtype, device, experts=experts), 3.0 if directory == half else 1.0

        def see(module, args, kwargs):
            now[0] += each * kwargs["input_ids"].shape[1]
            order.append(each)

        model.register_forward_pre_hook(see, with_kwargs=True)
        return model

    monkeypatch.setattr(speed, "load", watched)
    monkeypatch.setattr(speed, "_clock", lambda device, threads: lambda: now[0])
    found = speed.measure_speed(half, dense, TIMING, "float32", CPU)
    for phase, tokens in (("prefill", 12), ("decode", 4)):
        assert found[phase]["ratios"] == [3.0, 3.0, 3.0]
        assert (found[phase]["original_seconds"], found[phase]["seconds"]) == (tokens, 3 * tokens)
    rounds = order[-3 * 2 * 5 :: 5]  # a prefill and four tokens of each model
    assert rounds == [3.0, 1.0, 1.0, 3.0, 3.0, 1.0]  # neither always comes first


def test_a_round_feeds_what_a_plain_pass_reads(dense):
    model, heard = load(dense, "float32"), []
    model.register_forward_pre_hook(lambda m, args, kwargs: heard.append(kwargs["input_ids"]), with_kwargs=True)
    ids = torch.arange(3, 19)[None]
    speed._round(model, ids, 12, lambda: 0.0)
    assert [part.shape[1] for part in heard] == [12, 1, 1, 1, 1]
    assert torch.equal(torch.cat(heard, dim=1), ids)


def test_every_round_reads_another_text(dense):
    ids = speed._text(dense, TIMING, 96)
    tokenizer = AutoTokenizer.from_pretrained(dense)
    words = [token for _, text in WORDS for token in tokenizer.encode(text)]
    assert ids.flatten().tolist() == words[: 4 * 16]


def test_means_are_geometric():
    value, low, high = intervals.mean_ratio([[0.5, 2.0, 1.0]])
    assert value == pytest.approx(1.0)
    assert low < 1 < high


def test_mistakes_are_one_line(dense, half):
    with pytest.raises(UserError, match=r"conf/speed/test.yaml: 5 rounds of 16 tokens.*Use rounds <= 4"):
        speed.measure_speed(half, dense, replace(TIMING, rounds=5), "float32", CPU)
    with pytest.raises(UserError, match="does not fit into memory, so that it cannot be timed"):
        speed.measure_speed(half, dense, TIMING, "float32", Running.of(device="cpu", stream="always"))
    with pytest.raises(UserError, match=r"conf/speed/x\.yaml: unknown key 'promt'; did you mean prompt"):
        Timing.of({"name": "x", "promt": 3})
    with pytest.raises(UserError, match=r"conf/speed/x\.yaml: rounds=1, expected a whole number >= 2"):
        Timing.of({"name": "x", "rounds": 1})
    with pytest.raises(UserError, match=r"conf/speed/x\.yaml: dtype='float23'; did you mean float32.*, or null"):
        Timing.of({"name": "x", "dtype": "float23"})
