"""Write an experiment's table into docs/results.md and its head into README.md, with commit and command."""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def main(refs: Path) -> None:
    """Publish the table that `refs` (results/refs/EXPERIMENT) links to."""
    text = (refs / "table.md").read_text()
    document = json.loads((refs / "table.json").read_text())
    runs = document["runs"]
    commits = sorted({str(run["commit"])[:12] + (" (with changes)" if run["dirty"] else "") for run in runs})
    record = json.loads((refs / "table.json").resolve().with_suffix(".run.json").read_text())
    made = (
        f"Made by `make {refs.name}` at commit {', '.join(commits)} on {record['device']}, "
        f"{record['start'][:10]}; torch {record['versions']['torch']}, transformers "
        f"{record['versions']['transformers']}, lm-eval {record['versions']['lm_eval']}."
    )
    _, _, body = text.partition("\n\n")
    (ROOT / "docs/results.md").write_text(f"# Results\n\n{made}\n\n{body}")
    head = re.split(r"\n## |\n- ", body)[0].strip()
    readme = (ROOT / "README.md").read_text()
    before, rest = readme.split(BEGIN)
    after = rest.split(END)[1]
    note = "Parameters in millions; all tasks, intervals and how to read them: [docs/results.md](docs/results.md)."
    (ROOT / "README.md").write_text(f"{before}{BEGIN}\n{head}\n\n{note} {made}\n{END}{after}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
