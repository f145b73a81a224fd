"""Scores of a checkpoint: against plain loops, lm-eval's own model, and the sizes of tiny models."""

import json
import shutil
from pathlib import Path

import lm_eval.evaluator
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from espalier.errors import UserError
from espalier.inputs import tokens, windows
from espalier.models.running import Running
from espalier.scoring import score as scoring
from espalier.training.teacher import make_teacher, save_teacher
from tiny import save_tiny, save_tokenizer

DOMAINS = ("wiki", "code")
ITEMS = 12
CPU = Running.of(device="cpu", stream="never", score_batch_size=8)


def words(count: int, generator: torch.Generator) -> str:
    return " ".join(f"w{n}" for n in torch.randint(3, 95, (count,), generator=generator).tolist())


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of two domains, a choice task `picks` of four choices corrected by PMI, and `plain` without."""
    root = tmp_path_factory.mktemp("assets")
    generator = torch.Generator().manual_seed(1)
    for domain in DOMAINS:
        (root / "text" / domain).mkdir(parents=True)
        rows = [{"id": f"{domain}/{n}", "text": words(20 + n, generator)} for n in range(10)]
        (root / "text" / domain / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "tasks").mkdir()
    pool = [" " + words(length, generator) for length in (1, 3, 4, 6, 6, 2)]
    items = [
        {
            "id": f"item/{n}",
            "context": words(12 + n % 2, generator),
            "choices": [pool[(n + k) % len(pool)] for k in range(4)],
            "gold": n % 4,
        }
        for n in range(ITEMS)
    ]
    (root / "tasks" / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    for name, metrics in (("picks", ("acc_mutual_info", "acc")), ("plain", ("acc", "acc_norm"))):
        metric_list = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in metrics]
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"validation": "items.jsonl"}},
            "validation_split": "validation",
            "output_type": "multiple_choice",
            "num_fewshot": 0,
            "doc_to_text": "context",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "target_delimiter": "",
            "metric_list": metric_list,
        }
        (root / "tasks" / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
    return root


@pytest.fixture(autouse=True)
def local_assets(assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from espalier.scoring import tasks

    for module in (scoring, windows):
        monkeypatch.setattr(module, "text_directory", lambda: assets / "text")
    monkeypatch.setattr(tasks, "task_directory", lambda: assets / "tasks")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("olmoe", tmp_path_factory.mktemp("moe"))


TASKS = [{"task": name, "limit": None, "length": 16} for name in ("perplexity_wiki", "picks", "plain")]


def log_likelihood(model: torch.nn.Module, context: list[int], continuation: list[int]) -> float:
    total = 0.0
    for n, token in enumerate(continuation):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([context + continuation[:n]])).logits[0, -1].double()
        total += float(torch.log_softmax(logits, 0)[token])
    return total


def test_choices_equal_a_plain_loop(assets: Path, moe: Path) -> None:
    document, samples = scoring.score(moe, TASKS, CPU, dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(moe).eval()
    items = [json.loads(line) for line in (assets / "tasks" / "items.jsonl").read_text().splitlines()]
    picks = samples[samples.task == "picks"].set_index("item")
    plain = samples[samples.task == "plain"].set_index("item")
    assert list(picks.index) == [item["id"] for item in items]
    for item in items:
        context = [int(word[1:]) for word in item["context"].split()]
        choices = [[int(word[1:]) for word in choice.split()] for choice in item["choices"]]
        conditional = torch.tensor([log_likelihood(model, context, choice) for choice in choices])
        alone = torch.tensor([log_likelihood(model, [1], choice) for choice in choices])
        lengths = torch.tensor([len(choice) for choice in item["choices"]])  # lm-eval's acc_norm: characters
        row = picks.loc[item["id"]]
        assert row.acc_mutual_info == row.correct == float((conditional - alone).argmax() == item["gold"])
        assert row.acc == float(conditional.argmax() == item["gold"])
        assert plain.loc[item["id"]].acc_norm == float((conditional / lengths).argmax() == item["gold"])
        assert plain.loc[item["id"]].correct == row.acc
    result = document["tasks"]["picks"]
    assert (result["kind"], result["metric"], result["items"]) == ("choice", "acc_mutual_info", ITEMS)
    assert result["value"] == pytest.approx(picks.correct.mean())
    assert document["tasks"]["plain"]["metric"] == "acc"


def test_a_tasks_examples_metric_and_documents_are_its_own(moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, int] = {}
    evaluate = lm_eval.evaluator.evaluate

    def watched(lm, tasks, **options):  # type: ignore[no-untyped-def]
        seen.update({name: task.get_config("num_fewshot") for name, task in tasks["tasks"].items()})
        return evaluate(lm, tasks, **options)

    monkeypatch.setattr(lm_eval.evaluator, "evaluate", watched)
    tasks = [
        {"task": "perplexity_wiki", "length": 16, "documents": 3},
        {"task": "picks", "length": 16, "documents": 3, "metric": "acc"},
        {"task": "plain", "length": 16, "num_fewshot": 2, "metric": "acc_norm"},
    ]
    document, samples = scoring.score(moe, tasks, CPU, dtype="float32")
    assert seen == {"picks": 0, "plain": 2}
    usual, plain = scoring.score(moe, TASKS, CPU, dtype="float32")
    text = plain[plain.task == "perplexity_wiki"].iloc[:3]
    assert document["tasks"]["perplexity_wiki"]["items"] == 3
    assert samples[samples.task == "perplexity_wiki"].nll.tolist() == pytest.approx(text.nll.tolist())
    assert document["tasks"]["picks"]["metric"] == "acc"
    assert document["tasks"]["picks"]["value"] == usual["tasks"]["picks"]["metrics"]["acc"]
    assert document["tasks"]["plain"]["metric"] == "acc_norm"
    own = samples[samples.task == "plain"]
    assert (own.correct == own.acc_norm).all()
    with pytest.raises(UserError, match="metrics: task 'plain' has no 'exact'; known: "):
        scoring.score(moe, [{"task": "plain", "length": 16, "metric": "exact"}], CPU, dtype="float32")


def test_shared_contexts_give_the_log_likelihoods_of_lm_evals_own_model(moe: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from espalier.scoring.harness import SharedContextLM

    generator = torch.Generator().manual_seed(7)
    contexts = [words(n, generator) for n in (10, 10, 11, 3, 300)]
    choices = [" " + words(n, generator) for n in (1, 1, 4, 9)]
    pairs = [(context, choice) for context in contexts for choice in choices] + [("", choice) for choice in choices]
    pairs.append(pairs[0])  # an equal request again
    pairs.append((words(20, generator), choices[0]))  # a context of its own
    requests = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(moe).eval(), AutoTokenizer.from_pretrained(moe)
    stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4).loglikelihood(requests, disable_tqdm=True)
    for batch_size in (1, 4, 64):
        heard: list[tuple[int, int]] = []
        lm = SharedContextLM(model, tokenizer, batch_size, lambda *p, heard=heard: heard.append(p))
        found = lm.loglikelihood(requests)
        assert [value for value, _ in found] == pytest.approx([value for value, _ in stock], abs=1e-4)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in stock]
        assert heard[-1] == (len(set(pairs)), len(set(pairs)))


@pytest.mark.parametrize("family", ["qwen3_next", "jamba", "minimax", "gpt_oss", "llama4_text"])
def test_contexts_are_shared_where_keys_are_all_that_a_model_keeps_of_them(family: str, tmp_path: Path) -> None:
    """Linear attention and Mamba keep a state; windows, here of 6 tokens, keep the last keys."""
    from espalier.scoring.harness import SharedContextLM

    model = AutoModelForCausalLM.from_pretrained(save_tiny(family, tmp_path)).eval()
    generator = torch.Generator().manual_seed(7)
    texts = [torch.randint(3, 95, (n,), generator=generator).tolist() for n in (12, 12, 17, 2, 3, 5)]
    pairs = [(context, continuation) for context in texts[:3] for continuation in texts[3:]]
    expected = [log_likelihood(model, *pair) for pair in pairs]
    for batch_size in (1, 9):
        lm = SharedContextLM(model, AutoTokenizer.from_pretrained(tmp_path), batch_size)
        shared = lm._worth_sharing(tuple(texts[0]), {tuple(text): (("", ""), [], text) for text in texts[3:]})
        assert shared == (family in ("gpt_oss", "llama4_text"))
        found = lm._loglikelihood_tokens([(("", ""), context, rest) for context, rest in pairs])
        assert [value for value, _ in found] == pytest.approx(expected, abs=1e-4)


def test_perplexity_result_is_the_exponential_of_nll_over_tokens(moe: Path) -> None:
    document, samples = scoring.score(moe, TASKS[:1], CPU, dtype="float32")
    rows = samples[samples.task == "perplexity_wiki"]
    assert len(rows) == 10
    assert rows.tokens.tolist() == [20 + n for n in range(10)]
    result = document["tasks"]["perplexity_wiki"]
    assert result["value"] == pytest.approx(2.718281828459045 ** (rows.nll.sum() / rows.tokens.sum()))
    assert result["bits_per_byte"] == pytest.approx(rows.nll.sum() / 0.6931471805599453 / rows.bytes.sum())
    assert result["items"] == 10


def test_active_parameters_of_a_stock_model_are_top_k_experts_a_layer(moe: Path) -> None:
    document, _ = scoring.score(moe, TASKS[:1], CPU, dtype="float32")
    expert = 3 * 32 * 24
    total = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(moe).parameters())
    assert document["active"]["experts_per_token"] == {"0": 2.0, "1": 2.0, "2": 2.0}
    assert document["active"]["parameters"] == total - 3 * 8 * expert + 3 * 2 * expert
    assert document["parameters"] == {"stored": total, "unique": total, "experts": 8}


def test_active_is_measured_without_a_perplexity_task_too(moe: Path) -> None:
    document, samples = scoring.score(moe, [TASKS[1] | {"limit": 5}], CPU, dtype="float32")
    assert document["active"]["tokens"] == 2 * sum(20 + n for n in range(8))
    assert list(document["tasks"]) == ["picks"]
    assert document["tasks"]["picks"]["items"] == len(samples) == 5


def test_a_dense_model_uses_all_parameters(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=96, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    document, _ = scoring.score(tmp_path, TASKS[:2], CPU, dtype="float32")
    total = sum(p.numel() for p in model.parameters())
    assert document["active"]["parameters"] == document["parameters"]["stored"] == total
    assert document["parameters"]["experts"] is None


def test_scores_and_samples_come_back_from_disk(moe: Path, tmp_path: Path) -> None:
    document, samples = scoring.score(moe, TASKS, CPU, dtype="float32")
    path = tmp_path / "scores" / "abc.json"
    scoring.save_scores(path, document | {"node": "abc"}, samples)
    assert scoring.load_scores(path)["tasks"] == document["tasks"]
    pd.testing.assert_frame_equal(scoring.load_samples(path), samples)
    path.with_suffix(".parquet").unlink()
    with pytest.raises(UserError, match=r"abc\.parquet: no such file"):
        scoring.load_samples(path)


@pytest.mark.parametrize("stream", ["never", "always"])
def test_logits_that_are_no_numbers_are_told(stream: str, moe: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(moe)
    model.model.norm.weight.data.fill_(60000.0)  # a number in fp16, but what it multiplies is none
    model.half().save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    running = Running.of(device="cpu", stream=stream, score_batch_size=8)
    for task in ("picks", "perplexity_wiki"):
        with pytest.raises(UserError, match=r"no finite numbers: the model overflows in float16\. Set model\.dtype"):
            scoring.score(tmp_path, [{"task": task, "length": 16}], running)


def test_a_model_without_a_tokenizer_is_told(moe: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(moe / name, tmp_path / name)
    with pytest.raises(UserError, match=r"cannot load a tokenizer .*Put its tokenizer\.json there"):
        scoring.score(tmp_path, [{"task": "perplexity_wiki", "length": 16}], CPU)


def test_of_several_answer_filters_the_first_counts() -> None:
    """As in the items of a task (GSM8K: strict-match, then flexible-extract)."""
    found = {"exact_match,strict": 0.25, "exact_match_stderr,strict": 0.1, "exact_match,flexible": 0.75}
    frame = pd.DataFrame({"task": "gsm", "item": list("abcd"), "exact_match": [1.0, 0.0, 0.0, 0.0]})
    assert scoring._task_result("gsm", found, frame)["value"] == 0.25
    assert scoring._task_result("gsm", found, frame.copy(), "exact_match")["value"] == 0.25


def test_an_unknown_perplexity_is_named_with_the_nearest(moe: Path) -> None:
    with pytest.raises(UserError, match="did you mean perplexity_wiki"):
        scoring.score(moe, [{"task": "perplexity_wikki"}], CPU, dtype="float32")


def test_an_unknown_task_is_named_with_lm_evals_nearest(moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Manager:  # indexing lm-eval's own 14,000 files takes 10 s
        all_tasks = ("arc_challenge", "boolq")

        def __init__(self, include_defaults: bool) -> None:
            assert include_defaults

    monkeypatch.setattr("lm_eval.tasks.TaskManager", Manager)
    with pytest.raises(
        UserError, match="'arc_chalenge' is neither embedded nor lm-eval's nor in conf/task; did you mean arc_challenge"
    ):
        scoring.score(moe, [{"task": "arc_chalenge"}], CPU, dtype="float32")


def test_streamed_scores_are_those_of_the_loaded_model(moe):
    streamed = Running.of(device="cpu", stream="always", score_batch_size=8, activation_memory=1000)
    document, samples = scoring.score(moe, TASKS, streamed, dtype="float32")
    expected, whole = scoring.score(moe, TASKS, CPU, dtype="float32")
    assert document["active"]["experts_per_token"] == expected["active"]["experts_per_token"]
    assert list(document["tasks"]) == list(expected["tasks"])
    for name, result in expected["tasks"].items():
        assert document["tasks"][name]["value"] == pytest.approx(result["value"], rel=1e-5), name
    columns = ["task", "item", "correct", "tokens"]
    pd.testing.assert_frame_equal(samples[columns], whole[columns])
    assert samples["nll"].dropna().tolist() == pytest.approx(whole["nll"].dropna().tolist(), rel=1e-5)


KL = {"task": "kl_wiki", "limit": None, "length": 16}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model with the same tokens."""
    return save_tiny("mixtral", tmp_path_factory.mktemp("teacher"), seed=5)


def answers_of(directory: Path, folder: Path) -> Path:
    """What a model answers to the windows of the task, as the jobs of an experiment make it."""
    config = {"name": "kl_wiki", "source": "windows", "domains": ["wiki"], "length": 16, "content": "x"}
    ids, mask, facts = tokens.make_tokens(config, directory)
    assert facts["tokens"] == sum(20 + n for n in range(10))
    save_teacher(folder / "answers", make_teacher(directory, ids, mask, 128, "float32", CPU), {})
    return folder / "answers"


def test_divergence_is_the_kl_of_one_token_after_another(moe: Path, teacher: Path, tmp_path: Path) -> None:
    answers = {"kl_wiki": answers_of(teacher, tmp_path)}
    both = [KL, {"task": "perplexity_wiki", "limit": None, "length": 16}]
    document, samples = scoring.score(moe, both, CPU, dtype="float32", answers=answers)
    student, other = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (moe, teacher))
    rows = samples[samples.task == "kl_wiki"].set_index("item")
    texts = dict(windows.held_out("wiki", "kl_wiki"))
    for item, text in texts.items():
        ids = [1, *(int(word[1:]) for word in text.split())]
        total = 0.0
        for position in range(1, len(ids)):
            start = (position - 1) // 16 * 16
            with torch.no_grad():
                p, q = (model(torch.tensor([ids[start:position]])).logits[0, -1] for model in (other, student))
            p, q = p.double().log_softmax(0), q.double().log_softmax(0)
            total += float((p.exp() * (p - q)).sum())
        assert rows.loc[item, "kl"] == pytest.approx(total, rel=2e-3)
        assert rows.loc[item, "tokens"] == len(ids) - 1
    result = document["tasks"]["kl_wiki"]
    assert result["value"] == pytest.approx(rows.kl.sum() / rows.tokens.sum())
    assert (result["kind"], result["metric"], result["items"]) == ("divergence", "kl", 10)
    alone, _ = scoring.score(moe, both[1:], CPU, dtype="float32")
    assert alone["tasks"]["perplexity_wiki"] == document["tasks"]["perplexity_wiki"]


def test_a_model_does_not_diverge_from_itself(moe: Path, tmp_path: Path) -> None:
    streamed = Running.of(device="cpu", stream="always", score_batch_size=8, activation_memory=1000)
    for running in (CPU, streamed):
        document, _ = scoring.score(moe, [KL], running, dtype="float32", answers={"kl_wiki": answers_of(moe, tmp_path)})
        assert 0 <= document["tasks"]["kl_wiki"]["value"] < 1e-5


def test_a_divergence_without_answers_is_refused(moe: Path) -> None:
    with pytest.raises(UserError, match="'kl_wiki' needs the original's answers"):
        scoring.score(moe, [KL], CPU, dtype="float32")
    with pytest.raises(UserError, match="'kl_wikki' is unknown; did you mean kl_wiki"):
        scoring.score(moe, [KL | {"task": "kl_wikki"}], CPU, dtype="float32")


def test_a_task_of_conf_is_scored_as_the_packages_and_refused_when_it_changed(
    assets: Path, moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "conf/task"
    folder.mkdir(parents=True)
    (tmp_path / "conf/config.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    packaged = json.loads((assets / "tasks" / "plain.yaml").read_text())
    (folder / "mine.yaml").write_text(json.dumps(packaged | {"task": "mine"}))
    (folder / "items.jsonl").write_text((assets / "tasks" / "items.jsonl").read_text())
    task = {"task": "mine", "limit": 5, "content": scoring.task_revision("mine")}
    own, samples = scoring.score(moe, [task], CPU, dtype="float32")
    other, expected = scoring.score(moe, [{"task": "plain", "limit": 5}], CPU, dtype="float32")
    assert own["tasks"]["mine"] == other["tasks"]["plain"]
    assert list(samples["item"]) == [f"item/{n}" for n in range(5)]  # their own ids, as the package's
    assert list(samples["acc"]) == list(expected["acc"])
    (folder / "items.jsonl").write_text((folder / "items.jsonl").read_text() + "\n")
    with pytest.raises(UserError, match=r"conf/task/mine\.yaml or its data changed since this run was planned"):
        scoring.score(moe, [task], CPU, dtype="float32")
