"""The fenced blocks of README.md and docs/*.md: what each is for, and one shell script of a page's.

A reader sees the language of a block; a comment before it, which no page shows, says what it is to tests:

    <!-- slow -->             run by tests/newcomer.py alone, not by `make test`
    <!-- dry: REASON -->      its `espalier run` lines are run with -n
    <!-- not run: REASON -->  it needs what a laptop without a network does not have, or hours

`sh` and `python` are run in the order of the page, `text` and `json` are shown. A block that begins with a comment that
is a path is the file of that path. State stays from block to block, as in a reader's shell.
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAMED = re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)  # in the order in which they are read
PAGES = [
    "README.md",
    *(f"docs/{name}" for name in dict.fromkeys([*NAMED, *sorted(p.name for p in (ROOT / "docs").glob("*.md"))])),
]
LANGUAGES = ("sh", "python", "yaml", "json", "text")
FENCE = re.compile(r"(?:^<!-- (?P<mark>[^\n]*?) -->\n)?^```(?P<language>[\w-]*)\n(?P<text>.*?)^```$", re.M | re.S)
MARK = re.compile(r"slow|(dry|not run): \S.*")
PATH = re.compile(r"(?:# @package \S+\n)?# (\S+/\S+\.\w+)\n")  # Hydra reads `@package` in the first line only
END = "END_OF_A_BLOCK"


@dataclass(frozen=True)
class Block:
    """One fenced block; `line` is that of its first line of text."""

    page: str
    line: int
    language: str
    mark: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def path(self) -> str | None:
        """Of a block that is a file: where it is to lie."""
        found = PATH.match(self.text) if self.language in ("python", "yaml") else None
        return found[1] if found else None

    @property
    def runs(self) -> bool:
        """Whether anybody runs it."""
        return not self.mark.startswith("not run") and (self.language in ("sh", "python") or self.path is not None)

    def script(self) -> str:
        """Return the block as lines of a shell script."""
        if self.path is not None:
            return f"mkdir -p {Path(self.path).parent}\n{self._file(self.path)}"
        if self.language == "python":
            return self._file(".block.py") + "python .block.py\n"
        if self.mark.startswith("dry"):
            return re.sub(r"^((?:\S+/)?espalier run [^#\n]*?)(\s*#.*)?$", r"\1 -n", self.text, flags=re.M)
        return self.text

    def _file(self, path: str) -> str:
        return f"cat > {path} <<'{END}'\n{self.text}{END}\n"


def blocks(page: str, text: str | None = None) -> list[Block]:
    """Return the blocks of a page, which is a path from the project's root."""
    text = (ROOT / page).read_text() if text is None else text
    found = []
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("text")) + 1
        found.append(Block(page, line, match["language"], match["mark"] or "", match["text"]))
    return found


def script(chosen: list[Block]) -> str:
    """Return a bash script that runs the blocks in order, says each one's place first, and ends at what fails."""
    lines = ["set -euo pipefail"]
    for block in chosen:
        if block.runs:
            lines += [f"echo '== {block.where}'", block.script()]
    return "\n".join(lines) + "\n"
