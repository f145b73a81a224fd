"""Four-choice continuation items from held-out documents.

The context is 48 tokens of a document, the true continuation its next 24; the other three choices are the true
continuations of items from other documents of the domain, so nothing but the context tells them apart. They are
drawn among neighbouring items, so that the first N items need the scores of about N continuations without a
context, not 4 N: a third of the cost of a corrected choice.
"""

from __future__ import annotations

import random

from transformers import PreTrainedTokenizerBase

from espalier.inputs.documents import Row

CONTEXT = 48  # tokens
CONTINUATION = 24  # tokens
CHOICES = 4
NEIGHBOURS = 40  # items that share their continuations


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _sane(tokenizer: PreTrainedTokenizerBase, context: list[int], continuation: list[int]) -> bool:
    """Whether the cut keeps whole characters and both sides tokenise alike alone and together."""
    before, after = _text(tokenizer, context), _text(tokenizer, continuation)
    return (
        "\ufffd" not in before + after
        and before == before.rstrip()  # lm-eval moves trailing white space into the continuation
        and after[:1] in (" ", "\n")
        and tokenizer(before)["input_ids"] == context
        and tokenizer(after)["input_ids"] == continuation
        and tokenizer(before + after)["input_ids"] == context + continuation
    )


def windows_of(text: str, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
    """Disjoint (context, continuation) pairs of one document, each starting at a word's or line's start."""
    ids = tokenizer(text, verbose=False)["input_ids"]
    found = []
    start = 0
    while start + CONTEXT + CONTINUATION <= len(ids):
        middle, end = start + CONTEXT, start + CONTEXT + CONTINUATION
        context, continuation = ids[start:middle], ids[middle:end]
        if (start == 0 or _text(tokenizer, context)[0].isspace()) and _sane(tokenizer, context, continuation):
            found.append((_text(tokenizer, context), _text(tokenizer, continuation)))
            start = end
        else:
            start += 1
    return found


def cloze_items(
    documents: list[Row], tokenizer: PreTrainedTokenizerBase, domain: str, count: int, seed: int, read: str = ""
) -> list[Row]:
    """At most `count` items {id, document, context, choices, gold}, gold positions balanced to within one.

    Windows whose context occurs in `read`, the text that other splits hold, are left out: headers and quoted
    passages recur between documents.
    """
    generator = random.Random(f"{seed}/{domain}")
    windows = [
        (document["id"], number, context, continuation)
        for document in documents
        for number, (context, continuation) in enumerate(windows_of(document["text"], tokenizer))
        if context not in read
    ]
    generator.shuffle(windows)
    unique = {continuation: window for *window, continuation in reversed(windows)}
    windows = [(*window, continuation) for continuation, window in unique.items()][::-1][:count]
    golds = [position % CHOICES for position in range(len(windows))]
    generator.shuffle(golds)
    items = []
    for position, ((document, number, context, continuation), gold) in enumerate(zip(windows, golds, strict=True)):
        first = min(position // NEIGHBOURS * NEIGHBOURS, max(0, len(windows) - NEIGHBOURS))
        near = windows[first : first + NEIGHBOURS]
        others = [other for name, _, _, other in near if _file(name) != _file(document)]
        choices = generator.sample(others, CHOICES - 1)
        choices.insert(gold, continuation)
        items.append(
            {
                "id": f"{document}/{number}",
                "document": document,
                "context": context,
                "choices": choices,
                "gold": gold,
            }
        )
    return items


def _file(document: str) -> str:
    """A document's id without the number of the piece that it is."""
    return document.partition("#")[0]
