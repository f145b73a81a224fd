"""Generate school-maths questions and answers with mathematics_dataset (Saxton et al. 2019, arXiv:1904.01557).

Each (split, module) pair has a seed of its own, so a split never depends on how many items another one drew;
questions that occur in a held-out split are dropped from the splits after it.
"""

from __future__ import annotations

import importlib
import random
import signal
import sys
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from espalier.embedded.passages import Document

ITEMS_A_DOCUMENT = 20
SECONDS_AN_ITEM = 1  # SIGALRM; some compositions make sympy search for minutes
LONGEST_QUESTION = 160  # characters
LONGEST_ANSWER = 30


class Item(NamedTuple):
    """One question with its answer and the generator's module, e.g. `algebra__linear_1d`."""

    module: str
    question: str
    answer: str


@lru_cache(maxsize=1)
def _modules(package: str) -> dict[str, Callable[[], Any]]:
    """Module name -> callable that draws one problem."""
    if package not in sys.path:
        sys.path.insert(0, package)
    solver = importlib.import_module("sympy.solvers.diophantine.diophantine")
    sys.modules["sympy.solvers.diophantine"] = solver  # where base_solution_linear was when 1.0.1 was written
    np.object = object  # type: ignore[attr-defined]  # an alias that numpy 2 no longer has
    generators = importlib.import_module("mathematics_dataset.modules.modules")
    found = {}

    def walk(tree: dict[str, Any], prefix: str) -> None:
        for name, entry in tree.items():
            if isinstance(entry, dict):
                walk(entry, f"{prefix}{name}__")
            else:
                found[prefix + name] = entry

    walk(generators.train(lambda bounds: (bounds[0], (bounds[0] + bounds[1]) / 2)), "")
    return found


def module_names(package: Path) -> list[str]:
    """The names of all generator modules, sorted."""
    return sorted(_modules(str(package)))


def _too_long(signum: int, frame: object) -> None:
    raise TimeoutError


def draw(package: str, module: str, split: str, count: int, seconds: float) -> list[Item]:
    """At most `count` unique items of a module, fewer when `seconds` of wall time are spent."""
    generate = _modules(package)[module]
    seed = zlib.crc32(f"{split}/{module}".encode())
    random.seed(seed)
    np.random.seed(seed)
    signal.signal(signal.SIGALRM, _too_long)
    items: dict[str, Item] = {}
    end = time.monotonic() + seconds
    tries = 0
    while len(items) < count and tries < 4 * count and time.monotonic() < end:
        tries += 1
        signal.setitimer(signal.ITIMER_REAL, SECONDS_AN_ITEM)
        try:
            problem = generate()
            question, answer = str(problem.question), str(problem.answer)
        except Exception:  # about 6 % of draws fail inside the generator with current sympy
            continue
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if len(question) <= LONGEST_QUESTION and 0 < len(answer) <= LONGEST_ANSWER and "\n" not in question:
            items.setdefault(question, Item(module, question, answer))
    return list(items.values())


def items(package: Path, counts: dict[str, int], seconds: float, processes: int) -> dict[str, list[Item]]:
    """Items of every split in `counts` (split -> items a module), deduplicated in the order of `counts`."""
    names = module_names(package)
    jobs = [(split, name) for split in counts for name in names]
    with ProcessPoolExecutor(processes) as pool:
        futures = [pool.submit(draw, str(package), name, split, counts[split], seconds) for split, name in jobs]
        drawn = [future.result() for future in futures]
    seen: set[str] = set()
    splits: dict[str, list[Item]] = {split: [] for split in counts}
    for (split, _), found in zip(jobs, drawn, strict=True):
        splits[split].extend(item for item in found if item.question not in seen)
        seen.update(item.question for item in found)
    return splits


def documents(split: str, drawn: list[Item], seed: int) -> list[Document]:
    """Groups of ITEMS_A_DOCUMENT shuffled items as `Q: ...` / `A: ...` lines."""
    shuffled = list(drawn)
    random.Random(f"{seed}/{split}").shuffle(shuffled)
    made = []
    for start in range(0, len(shuffled) - ITEMS_A_DOCUMENT + 1, ITEMS_A_DOCUMENT):
        chunk = shuffled[start : start + ITEMS_A_DOCUMENT]
        name = f"{split}-{start // ITEMS_A_DOCUMENT:05d}"
        text = "".join(f"Q: {item.question}\nA: {item.answer}\n" for item in chunk)
        made.append(Document(name, name, text))
    return made
