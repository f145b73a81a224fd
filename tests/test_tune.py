"""Router tuning: only routers change, in every family, for every objective; interrupted or not, the same bytes."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from espalier import conf
from espalier.checkpoints.checkpoint import Checkpoint
from espalier.errors import InterruptedWork, UserError
from espalier.inputs.assets import model_directory, task_directory, text_directory
from espalier.inputs.documents import read_jsonl
from espalier.inputs.tokens import make_tokens
from espalier.models import runtime
from espalier.models.running import Running
from espalier.training.teacher import make_teacher, save_teacher
from espalier.training.tune import Text, tune
from espalier.training.tune_layerwise import Part
from espalier.training.tune_losses import divergence, entropy, next_token, top_and_tail
from espalier.training.tune_names import tuned_names
from espalier.training.tune_settings import Tuning
from tiny import FAMILIES

CPU = Running.of(device="cpu", stream="never", collect_batch_size=2)
OBJECTIVES = ("lm", "distill", "layerwise")


def settings(objective="lm", **changes):
    base = {"name": f"router_{objective}", "objective": objective, "rate": 0.02, "tokens": 96, "batch": 2}
    return Tuning.of(base | changes)


def some_text(sequences=6, length=8, masked=False):
    ids = np.random.default_rng(0).integers(3, 90, (sequences, length)).astype(np.int32)
    mask = np.ones_like(ids, dtype=np.uint8)
    if masked:
        mask[::2, -3:] = 0
    return Text(ids, mask if masked else None, "words")


@pytest.fixture(scope="session")
def teachers(tiny_model, tmp_path_factory):
    """Return make(family, text, top) -> path of the answers of a tiny source model."""

    def make(family, text, top=8):
        path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
        save_teacher(path, make_teacher(tiny_model(family), text.ids, text.mask, top, "float32", CPU), {})
        return path

    return make


def run(applied, teachers, tmp_path, family, kind, objective, text=None, name="out", **changes):
    """Tune a compressed tiny model and return the directories before and after."""
    source, compressed, _ = applied(family, kind)
    text = text or some_text()
    given = {"teacher": teachers(family, text)} if objective == "distill" else {"original": source}
    tuning = settings(objective, **changes)
    tune(compressed, tmp_path / name, tuning, text, CPU, tmp_path / f"{name}.state", **given)
    return compressed, tmp_path / name


def weights_of(directory):
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


def changed(before, after):
    first, second = weights_of(before), weights_of(after)
    assert list(first) == list(second)
    return {name for name in first if not torch.equal(first[name], second[name])}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["keep", "remap"])
def test_only_routers_change_in_every_family(family, kind, applied, teachers, tmp_path):
    found = {}
    for objective in ("lm", "layerwise"):
        before, after = run(applied, teachers, tmp_path, family, kind, objective, name=objective)
        found[objective] = changed(before, after)
    checkpoint = Checkpoint(before)
    routers = {name for layer in checkpoint.expert_counts for name in checkpoint.family.router_tensors(layer)}
    wanted = {name for name in routers if "correction_bias" not in name}
    assert found == {"lm": wanted, "layerwise": wanted}
    model, loading = runtime.load_with_info(after)
    assert not any(loading.values())
    assert torch.isfinite(model(input_ids=torch.tensor([[3, 4, 5]])).logits).all()


@pytest.mark.parametrize("kind", ["skip", "remap_skip"])
def test_gradients_reach_the_routers_of_models_that_skip(kind, applied, teachers, tmp_path):
    before, after = run(applied, teachers, tmp_path, "mixtral", kind, "lm")
    assert len(changed(before, after)) == 3


@pytest.mark.parametrize("objective", ["lm", "distill"])
def test_norms_are_tuned_when_asked(objective, applied, teachers, tmp_path):
    before, after = run(applied, teachers, tmp_path, "qwen3_moe", "keep", objective, norms=True)
    found = changed(before, after)
    assert {name.split(".")[-2] for name in found} == {
        "gate", "norm", "q_norm", "k_norm", "input_layernorm", "post_attention_layernorm",
    }  # fmt: skip
    assert not [name for name in found if "proj" in name or "expert" in name or "embed" in name]


@pytest.mark.parametrize("family", FAMILIES)
def test_layerwise_tuning_finds_the_norm_before_each_block(family, applied, teachers, tmp_path):
    before, after = run(applied, teachers, tmp_path, family, "keep", "layerwise", norms=True)
    checkpoint = Checkpoint(before)
    found = {layer: [name for name in changed(before, after) if f".{layer}." in name and "norm" in name]
             for layer in range(3)}  # fmt: skip
    for layer, names in found.items():
        assert len({name.rpartition(".")[0] for name in names}) == (layer in checkpoint.expert_counts), names
        assert all(re.search(r"post_attention|pre_ff|ffn|feedforward|post_attn", name) for name in names), names


def test_everything_else_is_the_source_s(applied, teachers, tmp_path):
    before, after = run(applied, teachers, tmp_path, "mixtral", "remap", "lm")
    for name in ("config.json", "plan.json", "modeling_espalier.py", "tokenizer.json"):
        assert (before / name).read_bytes() == (after / name).read_bytes()
    card = (after / "README.md").read_text()
    assert card.startswith((before / "README.md").read_text().rstrip())
    assert "## Router tuning" in card
    assert "words: 6 sequences of 8 tokens, 6 steps" in card
    record = json.loads((after / "tuning.json").read_text())
    assert record["format"] == "espalier.tuning/1"
    assert [(row["step"], row["tokens"]) for row in record["curve"]] == [(n, 16 * n) for n in range(1, 7)]
    assert all(row["loss"] == row["terms"]["lm"] and row["seconds"] >= 0 for row in record["curve"])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_tuning_lowers_its_own_loss(objective, applied, teachers, tmp_path):
    _, after = run(applied, teachers, tmp_path, "mixtral", "keep", objective, tokens=16 * 60, rate=0.01)
    curve = json.loads((after / "tuning.json").read_text())["curve"]
    last = max(row.get("layer", 0) for row in curve)
    for layer in range(last + 1):
        losses = [row["loss"] for row in curve if row.get("layer", 0) == layer]
        assert sum(losses[-9:]) < sum(losses[:9])


class StopError(Exception):
    pass


def interrupt_after(monkeypatch, steps, how):
    """Let training stop after so many steps in all: `signal` as SIGTERM does, `kill` in the middle of a step."""
    from espalier.training import train

    plain, seen = train._update, []

    def update(*arguments):
        seen.append(1)
        if how == "kill" and len(seen) > steps:
            raise StopError
        plain(*arguments)
        if how == "signal" and len(seen) == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train, "_update", update)
    return lambda: monkeypatch.setattr(train, "_update", plain)


@pytest.mark.parametrize("how", ["signal", "kill"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_interrupted_tuning_ends_with_the_same_bytes(objective, how, applied, teachers, tmp_path, monkeypatch):
    from espalier.training import train

    text = some_text(masked=True)
    changes = {"text": text, "tokens": 16 * 5, "entropy": 0.1, "accumulation": 1}
    _, whole = run(applied, teachers, tmp_path, "mixtral", "keep", objective, name="whole", **changes)
    monkeypatch.setattr(train, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(train.TrainingState, "due", lambda state: True)
    restore = interrupt_after(monkeypatch, 7 if objective == "layerwise" else 3, how)
    with pytest.raises(InterruptedWork if how == "signal" else StopError) as stopped:
        run(applied, teachers, tmp_path, "mixtral", "keep", objective, name="parts", **changes)
    if how == "signal":
        assert re.search(r"stopped by SIGTERM after step \d of 5; the same command goes on", str(stopped.value))
    restore()
    assert not (tmp_path / "parts").exists()
    done = sum(file.stat().st_size > 0 for file in (tmp_path / "parts.state").glob("*.safetensors"))
    assert done == (2 if objective == "layerwise" else 1)
    _, parts = run(applied, teachers, tmp_path, "mixtral", "keep", objective, name="parts", **changes)
    assert changed(whole, parts) == set()
    curves = [json.loads((folder / "tuning.json").read_text())["curve"] for folder in (whole, parts)]
    for row in (*curves[0], *curves[1]):
        del row["seconds"]
    assert curves[0] == curves[1]


def test_the_state_of_another_tuning_is_not_used(applied, teachers, tmp_path):
    one = run(applied, teachers, tmp_path, "mixtral", "keep", "lm", name="one", rate=0.01)[1]
    (tmp_path / "one.state").rename(tmp_path / "two.state")
    two = run(applied, teachers, tmp_path, "mixtral", "keep", "lm", name="two", rate=0.03)[1]
    three = run(applied, teachers, tmp_path, "mixtral", "keep", "lm", name="three", rate=0.03)[1]
    assert changed(two, three) == set()
    assert changed(one, two)


def test_next_token_loss_equals_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    logits, ids = torch.randn(2, 5, 7, generator=generator), torch.randint(0, 7, (2, 5), generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    for given in (None, mask):
        losses = []
        for b in range(2):
            for n in range(4):
                if given is None or (given[b, n] and given[b, n + 1]):
                    row = logits[b, n].double().exp()
                    losses.append(-math.log(row[ids[b, n + 1]] / row.sum()))
        assert next_token(logits, ids, given).item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def test_divergence_over_the_whole_vocabulary_is_the_full_one():
    generator = torch.Generator().manual_seed(1)
    original, logits = (torch.randn(2, 3, 12, generator=generator) for _ in range(2))
    indices = original.topk(12).indices
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    each = [[kl(original[b, n].softmax(-1).tolist(), logits[b, n].softmax(-1).tolist()) for n in range(3)]
            for b in range(2)]  # fmt: skip
    found = divergence(logits, top_and_tail(original, indices), indices, None)
    assert found.item() == pytest.approx(sum(map(sum, each)) / 6, rel=1e-5)
    found = divergence(logits, top_and_tail(original, indices), indices, mask)
    assert found.item() == pytest.approx((sum(each[0]) + each[1][0]) / 4, rel=1e-5)


def test_divergence_with_a_tail_equals_a_plain_computation_and_has_its_gradient():
    generator = torch.Generator().manual_seed(2)
    original = torch.randn(1, 4, 20, generator=generator)
    logits = torch.randn(1, 4, 20, generator=generator, dtype=torch.float32).requires_grad_()
    indices = original.topk(5).indices

    def slow(values):
        total = 0.0
        for n in range(4):
            p, q = original[0, n].double().softmax(-1).tolist(), values[0, n].double().softmax(-1).tolist()
            top = indices[0, n].tolist()
            classes = [[r[i] for i in top] + [1 - sum(r[i] for i in top)] for r in (p, q)]
            total += kl(*classes) / 4
        return total

    loss = divergence(logits, top_and_tail(original, indices), indices, None)
    assert loss.item() == pytest.approx(slow(logits.detach()), rel=1e-4)
    loss.backward()
    for place in ((0, 0, 3), (0, 1, int(indices[0, 1, 0])), (0, 3, 19)):
        shift = torch.zeros_like(logits)
        shift[place] = 1e-3
        slope = (slow(logits.detach() + shift) - slow(logits.detach() - shift)) / 2e-3
        assert logits.grad[place].item() == pytest.approx(slope, abs=2e-4)


def test_entropy_equals_a_plain_loop():
    generator = torch.Generator().manual_seed(3)
    logits = [torch.randn(6, 4, generator=generator) for _ in range(2)]
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    for given in (None, mask):
        rows = range(6) if given is None else (0, 1, 3)
        each = [-sum(p * math.log(p) for p in layer[row].softmax(-1).tolist()) for layer in logits for row in rows]
        assert entropy(logits, given).item() == pytest.approx(sum(each) / len(each), rel=1e-5)
    assert entropy([torch.zeros(3, 8)], None).item() == pytest.approx(math.log(8), rel=1e-6)


def test_the_entropy_term_makes_routing_peaked(applied, teachers, tmp_path):
    means = []
    for weight in (0.0, 5.0):
        changes = {"tokens": 16 * 20, "entropy": weight, "name": f"e{weight}"}
        _, out = run(applied, teachers, tmp_path, "mixtral", "keep", "lm", **changes)
        model = runtime.load(out)
        outputs = model(input_ids=torch.tensor(some_text().ids).long(), output_router_logits=True).router_logits
        means.append(entropy(list(outputs), None).item())
    assert means[1] < 0.9 * means[0]


@pytest.mark.parametrize("inputs", ["original", "compressed"])
@pytest.mark.parametrize("family", ["mixtral", "granitemoe", "minimax", "llama4_text"])
def test_the_first_layerwise_loss_is_what_hooks_on_whole_models_give(
    inputs, family, applied, teachers, tmp_path, monkeypatch
):
    """Layer 0 before its first step, and layer 2 of a tuning that changes nothing, from two whole models."""
    from espalier.training import train

    monkeypatch.setattr(train, "_update", lambda masters, trained, optimizer, clip: optimizer.zero_grad())
    source, compressed, _ = applied(family, "remap")
    text = some_text(masked=family == "mixtral")
    _, out = run(
        applied, teachers, tmp_path, family, "remap", "layerwise", text=text, inputs=inputs, tokens=48, batch=6
    )
    first = {row["layer"]: row["loss"] for row in json.loads((out / "tuning.json").read_text())["curve"]}
    models = [runtime.load(directory) for directory in (source, compressed)]
    ids = torch.tensor(text.ids).long()
    mask = None if text.mask is None else torch.tensor(text.mask).long()
    kept = slice(None) if mask is None else mask.flatten().bool()
    given = [watched(model, ids, mask) for model in models]
    factor = {"granitemoe": "residual_multiplier", "minimax": "mlp_beta_factor"}.get(family)
    times = float(getattr(models[1].config, factor)) if factor else 1.0
    for layer in first:
        (x, z, out_original), (_, _, out_compressed) = given[0][layer], given[1][layer]
        if inputs == "original":
            part = Part(models[1].model.layers[layer], Checkpoint(compressed).family, None)
            with torch.no_grad(), part.calls() as calls:
                part(x)
            wrong = calls[0][1] - z
        else:
            wrong = (out_compressed - out_original).flatten(0, 1) / times
        weights = 1 / out_original.flatten(0, 1)[kept].square().sum(-1)
        expected = (wrong[kept].square().sum(-1) * weights).sum() / weights.mean() / z[kept].square().sum()
        assert first[layer] == pytest.approx(expected.item(), rel=2e-3), layer


@torch.no_grad()
def watched(model, ids, mask):
    """(block input, routed output, layer output) of each MoE layer of a whole model."""
    from espalier.families import family_of

    family, found, handles = family_of(model.config.to_dict()), {}, []
    for index, layer in enumerate(model.model.layers):
        block = getattr(layer, family.module)
        if not hasattr(block, "experts"):
            continue

        def keep(module, args, output, index=index):
            found[index] = (*found.pop(index), (output[0] if isinstance(output, tuple) else output).clone())

        def keep_block(module, args, index=index):
            found[index] = (args[0].clone(),)

        def keep_experts(module, args, output, index=index):
            if family.scales_input:
                output = output.view(module.num_experts, -1, output.shape[-1]).sum(0)
            found[index] = (*found[index], output.clone())

        handles += [block.register_forward_pre_hook(keep_block), layer.register_forward_hook(keep)]
        handles.append(block.experts.register_forward_hook(keep_experts))
    model(input_ids=ids, attention_mask=mask, use_cache=False)
    return found


def test_streamed_and_whole_teachers_agree(tiny_model):
    text = some_text(masked=True)
    whole = make_teacher(tiny_model("mixtral"), text.ids, text.mask, 10, "float32", CPU)
    streamed = make_teacher(tiny_model("mixtral"), text.ids, text.mask, 10, "float32", replace(CPU, stream="always"))
    model = runtime.load(tiny_model("mixtral"))
    logits = model(input_ids=torch.tensor(text.ids).long(), attention_mask=torch.tensor(text.mask).long()).logits
    expected = logits.double().log_softmax(-1)[:2]  # the first batch has the padding of both
    for found in (whole, streamed):
        assert {name: tuple(t.shape) for name, t in found.items()} == {
            "log_probs": (6, 8, 10), "indices": (6, 8, 10), "log_tail": (6, 8),
        }  # fmt: skip
        top = expected.topk(10)
        assert torch.equal(found["indices"][:2][torch.tensor(text.mask[:2]).bool()].long(),
                           top.indices[torch.tensor(text.mask[:2]).bool()])  # fmt: skip
        kept = torch.tensor(text.mask[:2]).bool()
        torch.testing.assert_close(found["log_probs"][:2][kept].double(), top.values[kept], rtol=2e-3, atol=2e-3)
        tail = (1 - top.values.exp().sum(-1)).log()
        torch.testing.assert_close(found["log_tail"][:2][kept].double(), tail[kept], rtol=2e-3, atol=2e-3)


def test_what_is_refused(applied, teachers, tiny_model, tmp_path):
    compressed, text = applied("mixtral", "keep")[1], some_text()

    def refused(match, tuning, running=CPU, model=compressed, **given):
        with pytest.raises(UserError, match=match) as error:
            tune(model, tmp_path / "out", tuning, text, running, tmp_path / "state", **given)
        assert len(str(error.value).splitlines()) == 1
        assert not (tmp_path / "out").exists()

    refused("tokens=5 is less than one step of 16", settings(tokens=5))
    refused("does not fit into memory.*tuning=router_layerwise", settings(), replace(CPU, stream="always"))
    refused("needs the original's answers", settings("distill"))
    refused("needs the original model", settings("layerwise"))
    other = teachers("mixtral", some_text(sequences=3))
    refused(r"answers to \[3, 8\] tokens, but the tuning text has \[6, 8\]", settings("distill"), teacher=other)
    broken = tmp_path / "broken.safetensors"
    save_file({"indices": torch.zeros(1)}, broken)
    refused("format is None, expected espalier.teacher/1", settings("distill"), teacher=broken)
    refused("the loss is nan at step", settings(rate=1e30, norms=True))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"objective": "lms"}, r"conf/tuning/router_lms.yaml: objective='lms'; did you mean lm"),
        ({"rate": 0}, "rate=0, expected a number above 0"),
        ({"tokens": 1.5}, "tokens=1.5, expected a whole number >= 1"),
        ({"clip": -1}, "clip=-1, expected a number above 0 or null"),
        ({"norms": "yes"}, "norms='yes', expected true or false"),
        ({"raet": 1}, "unknown key 'raet'; did you mean rate"),
        ({"tokens": None}, "key 'tokens' has no value"),
        ({"schedule": "cosin"}, "schedule='cosin'; did you mean cosine"),
    ],
)
def test_wrong_settings_are_told_in_one_line(changes, match):
    with pytest.raises(UserError, match=match):
        settings(**{"objective": "lm", **changes})


def test_every_tuning_file_is_valid():
    for name in conf.names("tuning"):
        config = conf.load("tuning", name)
        assert config["name"] == name
        if name != "none":
            tuning = Tuning.of(config)
            assert tuning.objective in name or name in ("dsmoe", "depth")


def test_dense_models_have_no_router(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes)).save_pretrained(tmp_path / "dense")
    for norms in (False, True):
        tuning = Tuning("router_lm", "lm", rate=1e-3, tokens=64, norms=norms)
        with pytest.raises(UserError, match=r"has no router to tune. Split the model first .* or use train=ffn"):
            tuned_names(tmp_path / "dense", "float32", tuning)


def test_no_tuning_text_is_test_text():
    """No window of the tuning text occurs in a held-out document or a task's items, nor lies in one's file."""
    from transformers import AutoTokenizer

    config = conf.load("calibration", "embedded_tuning")
    ids, _, _ = make_tokens(config, model_directory())
    assert ids.shape == (1024, 256)
    tokenizer = AutoTokenizer.from_pretrained(model_directory())
    for domain in config["domains"]:
        own = read_jsonl(text_directory() / domain / "calibration.jsonl")
        held_out = read_jsonl(text_directory() / domain / "validation.jsonl")
        assert not {row["id"].partition("#")[0] for row in own} & {row["id"].partition("#")[0] for row in held_out}
        items = read_jsonl(task_directory() / f"cloze_{domain}.jsonl")
        assert not {row["id"] for row in own} & {item["document"] for item in items}
    tests = [
        row["text"]
        for domain in config["domains"]
        for row in read_jsonl(text_directory() / domain / "validation.jsonl")
    ]
    seen = {tuple(n[i : i + 64]) for n in tokenizer(tests)["input_ids"] for i in range(len(n) - 63)}
    windows = [tuple(row[i : i + 64].tolist()) for row in ids for i in range(0, 193, 64)]
    shared = sum(window in seen for window in windows)
    assert shared == 0


@pytest.mark.slow
def test_sigterm_ends_the_command_with_one_line_and_the_same_command_goes_on(tmp_path):
    """The node's command, terminated while it trains, then run again, against one that was left alone."""
    from espalier.artefacts.store import Node, Store

    results = []
    for name in ("whole", "parts"):
        store = Store(tmp_path / name)
        fetch = Node("fetch", {"id": "embedded:moe", "revision": None})
        text = conf.load("calibration", "embedded_tuning") | {"samples": 4, "length": 32}
        tokens = Node("tokens", text, (fetch.id,))
        own = {"name": "router_lm", "objective": "lm", "rate": 0.01, "tokens": 32 * 2 * 30, "batch": 2}
        node = Node("tune", {"tuning": own, "dtype": "float32"}, (fetch.id, tokens.id))
        for one in (fetch, tokens, node):
            store.write_node(one)
        for one in (fetch, tokens):
            assert command(store, one).wait() == 0
        results.append((store, node))
    (whole, node), (parts, _) = results
    assert command(whole, node).wait() == 0
    stopped = command(parts, node, stderr=subprocess.PIPE, wait_for="step 2")
    stopped.send_signal(signal.SIGTERM)
    _, error = stopped.communicate()
    last = error.decode().strip().splitlines()[-1]
    assert stopped.returncode == 128 + signal.SIGTERM
    assert re.search(r"^espalier: stopped by SIGTERM after step \d+ of 30; the same command goes on from ", last)
    state = parts.root / "tuned" / f".{node.id}.training.partial"
    assert state.is_dir()
    assert command(parts, node).wait() == 0
    assert not state.exists()
    assert changed(whole.root / "tuned" / node.id, parts.root / "tuned" / node.id) == set()
    assert (parts.root / "tuned" / f"{node.id}.run.json").exists()


def command(store, node, stderr=None, wait_for=None):
    """Start `espalier STAGE NODE`; with `wait_for`, in a process that says so on its way, and return when it does."""
    program = "from espalier.cli import main; main()"
    if wait_for:
        program = (
            "from espalier.training import train\nplain = train._update\nseen = []\n"
            "def update(*a):\n    plain(*a)\n    seen.append(1)\n    print('step', len(seen), flush=True)\n"
            "    import time; time.sleep(0.1)\n"
            "train._update = update\n" + program
        )
    argv = [sys.executable, "-c", program, node.stage, node.id, "--results", str(store.root)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1] / "src"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, stderr=stderr)
    while wait_for and wait_for not in process.stdout.readline().decode():
        assert process.poll() is None
    return process
