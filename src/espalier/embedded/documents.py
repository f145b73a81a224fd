"""Documents on disk: one JSON object with an `id` and a `text` a line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

DOMAINS = ("wiki", "code", "maths", "archaic")


def read_jsonl(path: Path) -> list[dict]:
    """All objects of a JSON-lines file, in file order."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Write one JSON object a line under a temporary name, then rename it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("w", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
    partial.replace(path)


def size(text: str) -> int:
    """Length in UTF-8 bytes, the unit of every size limit of this package."""
    return len(text.encode("utf-8"))
