"""Held-out texts cut into windows: what perplexities and divergences are measured on; imports no torch."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from espalier.errors import UserError, nearest
from espalier.inputs.assets import text_directory
from espalier.inputs.documents import read_jsonl

Documents = Sequence[tuple[str, str]]  # id, text


class Window(NamedTuple):
    """Tokens of one document, of which all after the first are targets, but only the last `predicted` are scored.

    `number` counts the windows of all documents, in their order.
    """

    document: int
    ids: list[int]
    predicted: int
    number: int


def windows(document: int, ids: list[int], start: int, length: int, number: int = 0) -> list[Window]:
    """Cut a document's token ids into windows that predict `length` tokens each, the last one the rest.

    The first window is preceded by the token `start`, each later one by the last token of the window before:
    no token is predicted twice, and a window's input has at most `length` tokens. `number` is that of the first.
    """
    padded = [start, *ids]
    cuts = range(0, len(ids), length)
    return [
        Window(document, padded[cut : cut + length + 1], min(length, len(ids) - cut), number + n)
        for n, cut in enumerate(cuts)
    ]


def cut_documents(tokenizer: Any, documents: Documents, length: int) -> tuple[list[Window], list[list[int]]]:
    """Return the windows of all documents, in their order, and each document's token ids.

    UserError when the tokenizer has no token to start a document with.
    """
    start = start_token(tokenizer)
    encoded = [tokenizer.encode(text, add_special_tokens=False, verbose=False) for _, text in documents]
    found: list[Window] = []
    for document, ids in enumerate(encoded):
        found += windows(document, ids, start, length, len(found))
    return found, encoded


def start_token(tokenizer: Any) -> int:
    """Return the token that precedes a document: beginning of sequence, else end of sequence.

    UserError when the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise UserError(f"{tokenizer.name_or_path}: the tokenizer has no BOS or EOS token to start a document with.")


def held_out(domain: str, task: str) -> list[tuple[str, str]]:
    """Return the held-out documents of an embedded text; UserError, naming `task`, for an unknown domain."""
    path = text_directory() / domain / "validation.jsonl"
    if not path.exists():
        prefix = task.removesuffix(domain)
        known = sorted(prefix + entry.name for entry in text_directory().iterdir() if entry.is_dir())
        raise UserError(f"evaluation: task {task!r} is unknown; {nearest(task, known)}.")
    return [(row["id"], row["text"]) for row in read_jsonl(path)]


def padded(found: Sequence[Window]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the windows' inputs and their mask, int64 [B, L], padded on the right."""
    ids = np.zeros((len(found), max(len(window.ids) for window in found) - 1), np.int64)
    mask = np.zeros_like(ids)
    for row, window in enumerate(found):
        ids[row, : len(window.ids) - 1] = window.ids[:-1]
        mask[row, : len(window.ids) - 1] = 1
    return ids, mask
