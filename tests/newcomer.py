"""Walk the project as a newcomer would: a fresh clone, an environment of its own, every command of README and docs.

    python3 tests/newcomer.py            # README, then the pages in their order: about an hour on two cores
    python3 tests/newcomer.py docs/add_a_method.md docs/add_a_family.md

Ends at the first command that fails. Needs Python, make and git alone. What is not committed is not in a clone.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import doc_blocks

FIRST = ("README.md", "docs/index.md")  # these set up the environment themselves


def main(pages: list[str]) -> int:
    """Run the pages' blocks in a fresh clone; 0 when all succeed, 1 with the page and line of what failed."""
    home = Path(tempfile.mkdtemp(prefix="espalier-newcomer-"))
    clone = home / "espalier"
    environment = _environment(home)
    try:
        subprocess.run(["git", "clone", "--quiet", str(doc_blocks.ROOT), str(clone)], check=True)
        if pages[0] not in FIRST:
            subprocess.run(["make", "env"], cwd=clone, env=environment, check=True)
        for page in pages:
            start = time.monotonic()
            text = (clone / page).read_text()
            lines = doc_blocks.script(doc_blocks.blocks(page, text))
            before = "" if page in FIRST else "source .venv/bin/activate\n"
            done = subprocess.run(["bash", "-c", before + lines], cwd=clone, env=environment, stdin=subprocess.DEVNULL)
            if done.returncode:
                print(f"newcomer: {page} failed (exit {done.returncode}): see the last line `== PAGE:LINE`", flush=True)
                return 1
            print(f"newcomer: {page} done in {time.monotonic() - start:.0f} s", flush=True)
        return 0
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _environment(home: Path) -> dict[str, str]:
    """Return the variables of somebody who has nothing of this project yet: no environment, no caches."""
    own = str(doc_blocks.ROOT)
    dropped = ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME", "ESPALIER_", "HF_", "MAKE", "MFLAGS", "VENV", "OMP_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    kept["PATH"] = os.pathsep.join(part for part in kept["PATH"].split(os.pathsep) if not part.startswith(own))
    return kept | {"HF_HOME": str(home / "huggingface")}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or doc_blocks.PAGES))
