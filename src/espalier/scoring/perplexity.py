"""Perplexity of a causal model, document by document: exp(sum of nll / sum of tokens), nll in nats.

With the original model's answers to the same windows, the KL divergence from it as well.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from espalier.errors import UserError
from espalier.inputs.windows import Documents, Window, cut_documents, padded
from espalier.models.stream import Batch, StreamedModel
from espalier.training.teacher import Teacher
from espalier.training.tune_losses import divergences

CPU_TOKENS = 2304  # tokens a batch on a processor: more leave its cache (8 windows of 256 ran 1.4 times as fast as 32)
CACHED = 2**21  # fp32 logits looked at together on a processor: 8 MB
AT_ONCE = 2**27  # and elsewhere: 0.5 GB

Progress = Callable[[int, int], None]
Values = list[tuple[float, float]]  # nll and divergence of each window of a batch


@dataclass(frozen=True)
class DocumentScore:
    """Negative log-likelihood of one document in nats, its tokens (all are predicted) and its UTF-8 bytes.

    `divergence`: summed KL of the original's predictions from the model's, in nats; 0 where it was not asked for.
    """

    id: str
    nll: float
    tokens: int
    bytes: int
    divergence: float = 0.0


@dataclass(frozen=True)
class Text:
    """Documents, pairs of (id, text), the `length` of their windows, and the original's `answers` to these windows."""

    documents: Documents
    length: int | None = None
    answers: Teacher | None = None


def default_length(model: PreTrainedModel) -> int:
    """Return the model's number of positions, at most 2,048."""
    return min(int(getattr(model.config, "max_position_embeddings", None) or 2048), 2048)


@dataclass(frozen=True)
class Corpus:
    """Documents cut into batches of windows; `lengths` are tokens and bytes of each document."""

    ids: list[str]
    lengths: list[tuple[int, int]]
    batches: list[list[Window]]

    def scores(self, values: Iterable[Values]) -> list[DocumentScore]:
        """Return each document's score from the windows' values, batch by batch."""
        total = torch.zeros(len(self.ids), 2, dtype=torch.float64)
        for batch, found in zip(self.batches, values, strict=True):
            for window, value in zip(batch, found, strict=True):
                total[window.document] += torch.tensor(value, dtype=torch.float64)
        rows = zip(self.ids, total.tolist(), self.lengths, strict=True)
        return [DocumentScore(id, nll, tokens, size, kl) for id, (nll, kl), (tokens, size) in rows]


def cut_corpus(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Text,
    *,
    batch_size: int = 32,
    device: str = "cpu",
) -> Corpus:
    """Cut a text into windows, longest first, in batches.

    UserError when its `length` exceeds the model's positions.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    length = text.length or default_length(model)
    if positions is not None and length > positions:
        raise UserError(f"evaluation: length={length} exceeds the model's {positions} positions. Use {positions}.")
    cut, encoded = cut_documents(tokenizer, text.documents, length)
    cut.sort(key=lambda window: -len(window.ids))
    batches = []
    while cut:
        fit = max(1, CPU_TOKENS // len(cut[0].ids)) if torch.device(device).type == "cpu" else batch_size
        size = min(batch_size, fit)
        batches.append(cut[:size])
        cut = cut[size:]
    lengths = [(len(ids), len(words.encode())) for ids, (_, words) in zip(encoded, text.documents, strict=True)]
    return Corpus([id for id, _ in text.documents], lengths, batches)


@torch.inference_mode()
def document_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Text,
    *,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> list[DocumentScore]:
    """Score the documents of a text.

    Every token is predicted once, the first from the start token alone. Windows are sorted by length and
    padded in batches of at most `batch_size`, with the padding masked; log-softmax is taken in fp32 and summed in fp64.
    `progress` hears (windows done, windows in all). UserError when the text's `length` exceeds the model's positions.
    """
    corpus = cut_corpus(model, tokenizer, text, batch_size=batch_size, device=model.device.type)
    done, total = 0, sum(map(len, corpus.batches))
    values = []
    for part in corpus.batches:
        inputs, mask = map(torch.from_numpy, padded(part))
        logits = model(
            input_ids=inputs.to(model.device), attention_mask=mask.to(model.device), use_cache=False
        ).logits  # [B, L, V]
        values.append(_window_values(logits, part, text.answers))
        done += len(part)
        if progress is not None:
            progress(done, total)
    return corpus.scores(values)


@torch.inference_mode()
def streamed_scores(
    model: StreamedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, Text],
    *,
    batch_size: int = 32,
    activation_memory: float = float("inf"),
    scratch: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, list[DocumentScore]]:
    """Score several texts, by name, in one pass over the layers of a streamed model.

    As `document_scores` otherwise; `activation_memory` and `scratch` are those of `Activations`.
    """
    kind = model.device.type
    cut = {
        name: cut_corpus(model.model, tokenizer, text, batch_size=batch_size, device=kind)
        for name, text in texts.items()
    }
    every = [(part, texts[name].answers) for name, corpus in cut.items() for part in corpus.batches]
    batches = [Batch.of(*map(torch.from_numpy, padded(part))) for part, _ in every]
    states = model.activations(batches, activation_memory, scratch)
    steps = len(batches) * (len(model.layers) + 1)
    for turn in model.turns(batches, states):
        for number in range(len(batches)):
            turn.run(number)
            if progress is not None:
                progress(turn.layer * len(batches) + number + 1, steps)
    found: list[Values] = []
    with model.head(states) as head:
        for number, (part, answers) in enumerate(every):
            found.append(_window_values(head.logits(batches[number], number), part, answers))
            if progress is not None:
                progress(len(model.layers) * len(batches) + number + 1, steps)
    values = iter(found)
    return {name: corpus.scores([next(values) for _ in corpus.batches]) for name, corpus in cut.items()}


def _window_values(logits: Tensor, batch: Sequence[Window], answers: Teacher | None) -> Values:
    """Return, summed over each window's predicted tokens, the negative log-likelihood and the divergence.

    From logits [B, L, V], some positions at a time: fp32 logits of a whole batch can be gigabytes, and those that stay
    in a processor's cache are read four times as fast.
    """
    values = []
    told = None if answers is None else answers.rows([window.number for window in batch])
    step = max(1, (CACHED if logits.device.type == "cpu" else AT_ONCE) // logits.shape[-1])
    for row, (_, ids, predicted, _) in enumerate(batch):
        targets = torch.tensor(ids[1:], device=logits.device)
        losses, apart = [], []
        for start in range(len(targets) - predicted, len(targets), step):
            places = slice(start, min(start + step, len(targets)))
            own = logits[row, places].float()
            losses.append(functional.cross_entropy(own, targets[places], reduction="none"))
            if told is not None:
                log_probs, indices = (part[row, places].to(logits.device) for part in told)
                apart.append(divergences(own, log_probs, indices))
        values.append((_sum(losses), _sum(apart)))
    return values


def _sum(parts: Sequence[Tensor]) -> float:
    return float(torch.cat(list(parts)).double().sum()) if parts else 0.0
