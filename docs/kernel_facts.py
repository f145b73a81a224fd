"""Write what the compiler made of the kernels (src/espalier/kernels/facts.json) into its block of docs/kernels.md."""

import json
from pathlib import Path

from publish import replace

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = (
    "GPU", "kernel", "for", "tile", "warps", "stages", "registers", "spilled", "shared bytes", "a unit", "products",
)  # fmt: skip


def table() -> str:
    """Return the facts in Markdown."""
    document = json.loads((ROOT / "src/espalier/kernels/facts.json").read_text())
    lines = ["| " + " | ".join(COLUMNS) + " |", "| " + " | ".join(["---"] * len(COLUMNS)) + " |"]
    for fact in document["facts"]:
        constants, options = fact["constants"], fact["options"]
        tile = "x".join(str(constants[side]) for side in ("BM", "BN", "BK") if side in constants)
        if constants.get("SPLIT", 1) > 1:
            tile += f" split {constants['SPLIT']}"
        cells = (
            fact["target"], fact["kernel"], fact["variant"], tile, options["num_warps"], options.get("num_stages", ""),
            fact["registers"], fact["spilled"], fact["shared"], fact["blocks"], fact["tensor_core"] or "",
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return f"Triton {document['triton']}.\n\n" + "\n".join(lines)


if __name__ == "__main__":
    replace(ROOT / "docs/kernels.md", "facts", table())
