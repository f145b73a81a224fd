"""Documents on disk: one JSON object with an `id` and a `text` a line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from espalier.artefacts.store import atomic_file

Row = dict[str, Any]  # one JSON object
DOMAINS = ("wiki", "code", "maths", "archaic")


def read_jsonl(path: Path) -> list[Row]:
    """All objects of a JSON-lines file, in file order."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    """Write one JSON object a line under a temporary name, then rename it to `path`."""
    with atomic_file(path) as partial, partial.open("w", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")


def size(text: str) -> int:
    """Length in UTF-8 bytes, the unit of every size limit of this package."""
    return len(text.encode("utf-8"))
