"""Perplexity of a causal model, document by document: exp(sum of nll / sum of tokens), nll in nats."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from espalier.errors import UserError
from espalier.stream import Batch, StreamedModel

CPU_TOKENS = 2304  # tokens a batch on a processor: more leave its cache (8 windows of 256 ran 1.4 times as fast as 32)

Progress = Callable[[int, int], None]
Window = tuple[int, list[int], int]  # document, token ids, how many of them are predicted


@dataclass(frozen=True)
class DocumentScore:
    """Negative log-likelihood of one document in nats, its tokens (all are predicted) and its UTF-8 bytes."""

    id: str
    nll: float
    tokens: int
    bytes: int


def windows(document: int, ids: list[int], start: int, length: int) -> list[Window]:
    """Cut a document's token ids into windows that predict `length` tokens each, the last one the rest.

    The first window is preceded by the token `start`, each later one by the last token of the window before:
    no token is predicted twice, and a window's input has at most `length` tokens.
    """
    padded = [start, *ids]
    cuts = range(0, len(ids), length)
    return [(document, padded[cut : cut + length + 1], min(length, len(ids) - cut)) for cut in cuts]


def start_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that precedes a document: beginning of sequence, else end of sequence.

    UserError when the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise UserError(f"{tokenizer.name_or_path}: the tokenizer has no BOS or EOS token to start a document with.")


def default_length(model: PreTrainedModel) -> int:
    """Return the model's number of positions, at most 2,048."""
    return min(int(getattr(model.config, "max_position_embeddings", None) or 2048), 2048)


@dataclass(frozen=True)
class Corpus:
    """Documents cut into batches of windows; `lengths` are tokens and bytes of each document."""

    ids: list[str]
    lengths: list[tuple[int, int]]
    batches: list[list[Window]]

    def scores(self, nll: Iterable[list[float]]) -> list[DocumentScore]:
        """Return each document's score from the windows' values, batch by batch."""
        total = torch.zeros(len(self.ids), dtype=torch.float64)
        for batch, values in zip(self.batches, nll, strict=True):
            for (document, _, _), value in zip(batch, values, strict=True):
                total[document] += value
        rows = zip(self.ids, total.tolist(), self.lengths, strict=True)
        return [DocumentScore(id, value, tokens, size) for id, value, (tokens, size) in rows]


def cut_corpus(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[tuple[str, str]],
    *,
    length: int | None = None,
    batch_size: int = 32,
    device: str = "cpu",
) -> Corpus:
    """Cut `documents`, pairs of (id, text), into windows of `length` tokens, longest first, in batches.

    UserError when `length` exceeds the model's positions.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    length = length or default_length(model)
    if positions is not None and length > positions:
        raise UserError(f"evaluation: length={length} exceeds the model's {positions} positions. Use {positions}.")
    start = start_token(tokenizer)
    encoded = [tokenizer.encode(text, add_special_tokens=False, verbose=False) for _, text in documents]
    cut = [window for number, ids in enumerate(encoded) for window in windows(number, ids, start, length)]
    cut.sort(key=lambda window: -len(window[1]))
    batches = []
    while cut:
        fit = max(1, CPU_TOKENS // len(cut[0][1])) if torch.device(device).type == "cpu" else batch_size
        size = min(batch_size, fit)
        batches.append(cut[:size])
        cut = cut[size:]
    lengths = [(len(ids), len(text.encode())) for ids, (_, text) in zip(encoded, documents, strict=True)]
    return Corpus([id for id, _ in documents], lengths, batches)


@torch.inference_mode()
def document_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[tuple[str, str]],
    *,
    length: int | None = None,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> list[DocumentScore]:
    """Score `documents`, pairs of (id, text), with windows of `length` tokens.

    Every token is predicted once, the first from the start token alone. Windows are sorted by length and
    padded in batches of at most `batch_size`, with the padding masked; log-softmax is taken in fp32 and summed in fp64.
    `progress` hears (windows done, windows in all). UserError when `length` exceeds the model's positions.
    """
    kind = model.device.type
    corpus = cut_corpus(model, tokenizer, documents, length=length, batch_size=batch_size, device=kind)
    done, total = 0, sum(map(len, corpus.batches))
    nll = []
    for part in corpus.batches:
        inputs, mask = _padded(part)
        logits = model(
            input_ids=inputs.to(model.device), attention_mask=mask.to(model.device), use_cache=False
        ).logits  # [B, L, V]
        nll.append(_window_nll(logits, part))
        done += len(part)
        if progress is not None:
            progress(done, total)
    return corpus.scores(nll)


@torch.inference_mode()
def streamed_scores(
    model: StreamedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpora: Mapping[str, tuple[Sequence[tuple[str, str]], int | None]],
    *,
    batch_size: int = 32,
    activation_memory: float = float("inf"),
    scratch: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, list[DocumentScore]]:
    """Score several corpora, (documents, length) by name, in one pass over the layers of a streamed model.

    As `document_scores` otherwise; `activation_memory` and `scratch` are those of `Activations`.
    """
    cut = {
        name: cut_corpus(
            model.model, tokenizer, documents, length=length, batch_size=batch_size, device=model.device.type
        )
        for name, (documents, length) in corpora.items()
    }
    every = [part for corpus in cut.values() for part in corpus.batches]
    batches = [Batch.of(*_padded(part)) for part in every]
    states = model.activations(batches, activation_memory, scratch)
    steps = len(batches) * (len(model.layers) + 1)
    for turn in model.turns(batches, states):
        for number in range(len(batches)):
            turn.run(number)
            if progress is not None:
                progress(turn.layer * len(batches) + number + 1, steps)
    nll: list[list[float]] = []
    with model.head(states) as head:
        for number, part in enumerate(every):
            nll.append(_window_nll(head.logits(batches[number], number), part))
            if progress is not None:
                progress(len(model.layers) * len(batches) + number + 1, steps)
    values = iter(nll)
    return {name: corpus.scores([next(values) for _ in corpus.batches]) for name, corpus in cut.items()}


def _padded(batch: list[Window]) -> tuple[Tensor, Tensor]:
    """Return the inputs and the mask of a batch, int64 [B, L], padded on the right."""
    longest = max(len(ids) for _, ids, _ in batch) - 1
    inputs = torch.zeros(len(batch), longest, dtype=torch.long)
    mask = torch.zeros_like(inputs)
    for row, (_, ids, _) in enumerate(batch):
        inputs[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        mask[row, : len(ids) - 1] = 1
    return inputs, mask


def _window_nll(logits: Tensor, batch: list[Window]) -> list[float]:
    """Return the summed negative log-likelihood of each window's predicted tokens, from logits [B, L, V]."""
    values = []
    for row, (_, ids, predicted) in enumerate(batch):  # row by row: fp32 logits of a whole batch can be gigabytes
        targets = torch.tensor(ids[1:], device=logits.device)
        losses = functional.cross_entropy(logits[row, : len(targets)].float(), targets, reduction="none")
        values.append(float(losses[-predicted:].double().sum()))
    return values
