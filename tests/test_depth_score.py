"""Scoring models whose layers tokens skip: shared contexts and batches against sequences that run alone."""

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from dense_models import save_dense
from depth_plans import depth_plan
from espalier.checkpoints.checkpoint import Checkpoint
from espalier.scoring.harness import SharedContextLM
from espalier.surgery.apply import apply
from tiny import VOCABULARY

KINDS = (
    "threshold",
    "threshold_attention",
    "threshold_ffn",
    "all_keys",
    "random",
    "predictor",
    "top_k",
    "nothing_kept",
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_dense("llama", tmp_path_factory.mktemp("llama") / "model")


def slow(model, tokenizer, context, choice):
    """The log likelihood of a choice behind its context, in one sequence that runs alone."""
    before, whole = tokenizer.encode(context), tokenizer.encode(context + choice)
    with torch.no_grad():
        scores = model(input_ids=torch.tensor([whole[:-1]]), use_cache=False).logits[0].log_softmax(-1)
    return sum(float(scores[place - 1, whole[place]]) for place in range(len(before), len(whole)))


@pytest.mark.parametrize("kind", KINDS)
def test_log_likelihoods(kind, source, tmp_path):
    apply(source, depth_plan(kind, Checkpoint(source).any_shape()), tmp_path / "out", prove=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    words = [tokenizer.decode([number]) for number in range(5, VOCABULARY - 5)]
    contexts = [" ".join(words[n : n + size]) for n, size in ((0, 10), (7, 10), (20, 3), (30, 40))]
    choices = [" " + " ".join(words[n : n + size]) for n, size in ((1, 1), (40, 4), (50, 7))]
    pairs = [(context, choice) for context in contexts for choice in choices]
    requests = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)]
    expected = [slow(model, tokenizer, *pair) for pair in pairs]
    for batch_size in (1, 4, 64):
        found = SharedContextLM(model, tokenizer, batch_size).loglikelihood(requests)
        assert [value for value, _ in found] == pytest.approx(expected, abs=1e-3)
    stock = HFLM(pretrained=str(tmp_path / "out"), trust_remote_code=True, batch_size=1, device="cpu")
    found = stock.loglikelihood(requests, disable_tqdm=True)
    assert [value for value, _ in found] == pytest.approx(expected, abs=1e-3)
