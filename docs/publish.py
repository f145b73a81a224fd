"""Write an experiment's table into its block of docs/results.md or docs/papers.md; `results` into README.md too.

What the tables of RECORDED are made from goes into docs/records/.
"""

import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAPERS = "docs/papers.md"
README = "results"  # the experiment whose head the README shows
RECORDED = ("dense_to_moe", "depth")  # those that take hours: `espalier import` and `peek` make their tables again
# Of it: a screenful of rows, and the columns that fit.
ROWS = (
    "full", "random 50 %", "reap 50 %", "naee 50 %", "diep 50 %", "camera_p 50 %", "random_merge 50 %", "hc_smoe 50 %",
    "naee_skip", "naee 50 % + naee_skip",
)  # fmt: skip
LEFT_OUT = ("seeds", "plan s", "× full [95 %]")


def main(refs: Path, *overrides: str) -> None:
    """Publish the table that `refs` (results/refs/EXPERIMENT) links to; `overrides` are what `run` was given."""
    text = (refs / "table.md").read_text()
    document = json.loads((refs / "table.json").read_text())
    runs = document["runs"]
    commits = sorted({str(run["commit"])[:12] + (" (with changes)" if run["dirty"] else "") for run in runs})
    devices = sorted({str(run["device"]) for run in runs})
    record = json.loads((refs / "table.json").resolve().with_suffix(".run.json").read_text())
    name = refs.name
    command = "make results" if name == README else " ".join(["espalier run", name, *overrides])
    made = (
        f"Made by `{command}` at commit {', '.join(commits)} on {' and '.join(devices)}, "
        f"{record['start'][:10]}; torch {record['versions']['torch']}, transformers "
        f"{record['versions']['transformers']}, lm-eval {record['versions']['lm_eval']}."
    )
    _, _, body = text.partition("\n\n")
    if f"<!-- {name}:begin -->" in (ROOT / PAPERS).read_text():
        replace(ROOT / PAPERS, name, f"{made}\n\n{_paper(body)}")
        return
    # The blocks lie under a heading of the second level.
    body = re.sub(r"^## ", "### ", body.strip(), flags=re.M)
    replace(ROOT / "docs/results.md", name, f"{made}\n\n{body}")
    kernels = refs / "kernels.md"
    if kernels.exists():
        head, *sections = kernels.read_text().split("\n\n## ")
        shared = [_shared(section) for section in sections]
        replace(ROOT / "docs/kernels.md", name, "\n\n".join([made, head.strip(), *filter(None, shared)]))
    if name in RECORDED:
        keep_record(refs.parents[1], name, [word for said in overrides for word in shlex.split(said)])
    if name == README:
        note = "Half of the experts removed; parameters in millions. All methods, both ratios, and how to read them: "
        replace(ROOT / "README.md", name, f"{head(body)}\n\n{note}[docs/results.md](docs/results.md). {made}")


def keep_record(results: Path, name: str, overrides: Sequence[str]) -> None:
    """Put what an experiment's table is made from into docs/records/NAME.tar.xz."""
    from espalier.artefacts.store import Store
    from espalier.workflow import archive, graph

    store = Store(results, dry=True)
    experiment = graph.expand(name, overrides, store)
    graph.save(experiment, store)
    path = ROOT / "docs/records" / f"{name}.tar.xz"
    path.unlink(missing_ok=True)
    archive.export(experiment, store, path)


def head(body: str) -> str:
    """Return of a table's Markdown what the README shows: ROWS, in their order, without the columns LEFT_OUT.

    SystemExit when a row is not there.
    """
    table = re.split(r"\n### |\n- ", body)[0].splitlines()
    lines = [line.strip("|").split("|") for line in table if line.startswith("|")]
    kept = [n for n, name in enumerate(lines[0]) if name.strip() not in LEFT_OUT]
    rows = {cells[0].strip(): "|".join(["", *(cells[n] for n in kept), ""]) for cells in lines}
    missing = [name for name in ROWS if name not in rows]
    if missing:
        raise SystemExit(f"docs/publish.py: the table has no row {missing[0]!r}. Change ROWS, or the experiment.")
    ruler = next(name for name in rows if set(name) == {"-"})
    return "\n".join(rows[name] for name in (lines[0][0].strip(), ruler, *ROWS))


def _paper(body: str) -> str:
    """Return of a table what its page shows: means, published numbers and pairs, without what all of them say alike."""
    head, *sections = re.split(r"^## ", body.strip(), flags=re.M)
    shown = [head.strip()]
    for section in sections:
        title, _, text = section.partition("\n")
        if title.startswith("Beside"):
            shown += [f"**{title}**", text.strip()]
        elif title == "Methods in pairs":
            shown += [f"**{title}**", re.split(r"^- ", text.strip(), flags=re.M)[0].strip()]
    return "\n\n".join(shown)


def _shared(section: str) -> str:
    """Return what one row's section says of real routing, under its name."""
    title, _, rest = section.partition("\n")
    found = re.search(r"^What the router chose.*?(?=\n\n[^|]|\Z)", rest, flags=re.M | re.S)
    return f"### {title}\n\n{found.group(0).strip()}" if found else ""


def replace(path: Path, name: str, text: str) -> None:
    """Put `text` between the marks of a block; what people wrote around it stays. SystemExit without the marks."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found, rest = path.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{path}: no block {begin} ... {end}. Add both marks where the table shall stand.")
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
