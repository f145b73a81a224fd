"""Perplexity against a loop that predicts one token at a time."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from espalier.errors import UserError
from espalier.inputs.windows import windows
from espalier.scoring.perplexity import Text, default_length, document_scores
from tiny import save_tiny

LENGTHS = (1, 5, 7, 8, 13, 16, 31)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    directory = save_tiny("olmoe", tmp_path_factory.mktemp("model"))
    return AutoModelForCausalLM.from_pretrained(directory).eval(), AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def documents() -> list[tuple[str, str]]:
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randint(3, 95, (length,), generator=generator).tolist() for length in LENGTHS]
    return [(f"d{n}", " ".join(f"w{token}" for token in ids)) for n, ids in enumerate(drawn)]


def one_token_at_a_time(model: PreTrainedModel, ids: list[int], start: int, length: int) -> float:
    """Predict each token from its window so far, in a batch of one and without padding."""
    total = 0.0
    for position, token in enumerate(ids):
        begin = position - position % length
        before = ids[begin - 1] if begin else start
        context = torch.tensor([[before, *ids[begin:position]]])
        with torch.no_grad():
            logits = model(input_ids=context).logits[0, -1].double()
        total += float(torch.logsumexp(logits, 0) - logits[token])
    return total


@pytest.mark.parametrize("length", [8, 64])
def test_scores_equal_the_plain_loop(loaded, documents, length: int) -> None:
    model, tokenizer = loaded
    found = document_scores(model, tokenizer, Text(documents, length), batch_size=4)
    for (id, text), score in zip(documents, found, strict=True):
        ids = [int(word[1:]) for word in text.split()]
        assert (score.id, score.tokens, score.bytes) == (id, len(ids), len(text))
        assert score.nll == pytest.approx(one_token_at_a_time(model, ids, 1, length), rel=1e-5)


def test_batch_size_only_rounds(loaded, documents) -> None:
    model, tokenizer = loaded
    one = document_scores(model, tokenizer, Text(documents, 8), batch_size=1)
    many = document_scores(model, tokenizer, Text(documents, 8), batch_size=100)
    assert [s.nll for s in one] == pytest.approx([s.nll for s in many], rel=1e-6)


def test_windows_predict_each_token_once() -> None:
    ids = list(range(10, 21))
    found = windows(0, ids, 1, 4)
    assert [(w[1], w[2]) for w in found] == [
        ([1, 10, 11, 12, 13], 4),
        ([13, 14, 15, 16, 17], 4),
        ([17, 18, 19, 20], 3),
    ]
    assert windows(0, [], 1, 4) == []


def test_length_beyond_the_positions_is_refused(loaded, documents) -> None:
    model, tokenizer = loaded
    assert default_length(model) == 256
    with pytest.raises(UserError, match="length=257 exceeds the model's 256 positions"):
        document_scores(model, tokenizer, Text(documents, 257))


def test_progress_reaches_the_total(loaded, documents) -> None:
    model, tokenizer = loaded
    heard: list[tuple[int, int]] = []
    document_scores(model, tokenizer, Text(documents, 8), batch_size=4, progress=lambda *p: heard.append(p))
    total = sum(math.ceil(length / 8) for length in LENGTHS)
    assert heard[-1] == (total, total)
