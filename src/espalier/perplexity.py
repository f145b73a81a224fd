"""Perplexity of a causal model, document by document: exp(sum of nll / sum of tokens), nll in nats."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from espalier.errors import UserError

CPU_TOKENS = 2304  # tokens a batch on a processor: more leave its cache (8 windows of 256 ran 1.4 times as fast as 32)

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


@torch.inference_mode()
def document_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[tuple[str, str]],
    *,
    length: int | None = None,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> list[DocumentScore]:
    """Score `documents`, pairs of (id, text), with windows of `length` tokens.

    Every token is predicted once, the first from the start token alone. Windows are sorted by length and
    padded in batches of at most `batch_size`, with the padding masked; log-softmax is taken in fp32 and summed in fp64.
    `progress` hears (windows done, windows in all). UserError when `length` exceeds the model's positions.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    length = length or default_length(model)
    if positions is not None and length > positions:
        raise UserError(f"evaluation: length={length} exceeds the model's {positions} positions. Use {positions}.")
    start = start_token(tokenizer)
    encoded = [tokenizer.encode(text, add_special_tokens=False, verbose=False) for _, text in documents]
    cut = [window for number, ids in enumerate(encoded) for window in windows(number, ids, start, length)]
    cut.sort(key=lambda window: -len(window[1]))
    nll = torch.zeros(len(documents), dtype=torch.float64)
    done = 0
    while done < len(cut):
        fit = max(1, CPU_TOKENS // len(cut[done][1])) if model.device.type == "cpu" else batch_size
        batch = cut[done : done + min(batch_size, fit)]
        for (document, _, _), value in zip(batch, _batch_nll(model, batch), strict=True):
            nll[document] += value
        done += len(batch)
        if progress is not None:
            progress(done, len(cut))
    return [
        DocumentScore(id, float(nll[n]), len(encoded[n]), len(text.encode())) for n, (id, text) in enumerate(documents)
    ]


def _batch_nll(model: PreTrainedModel, batch: list[Window]) -> list[float]:
    longest = max(len(ids) for _, ids, _ in batch) - 1
    inputs = torch.zeros(len(batch), longest, dtype=torch.long)  # [B, L]
    mask = torch.zeros_like(inputs)
    for row, (_, ids, _) in enumerate(batch):
        inputs[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        mask[row, : len(ids) - 1] = 1
    device = model.device
    logits = model(input_ids=inputs.to(device), attention_mask=mask.to(device), use_cache=False).logits  # [B, L, V]
    values = []
    for row, (_, ids, predicted) in enumerate(batch):  # row by row: fp32 logits of a whole batch can be gigabytes
        targets = torch.tensor(ids[1:], device=device)
        losses = functional.cross_entropy(logits[row, : len(targets)].float(), targets, reduction="none")
        values.append(float(losses[-predicted:].double().sum()))
    return values
