"""Tables of kernel benchmarks: what was timed, what compilers say of GPUs elsewhere, and what real routing shares.

Columns are those that users of vLLM's and Triton's benchmarks know. Imports no torch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

Document = Mapping[str, Any]
Documents = Mapping[str, Document]  # by the label of their row

TIMED = "Timed on {device} ({machine}: {flops:.3g} FLOP/s, {bandwidth:.3g} bytes/s); medians, 20 and 80 % quantiles."
COMPILED = (
    "GPUs: not timed here. Launches, registers, spills and shared memory are what the compiler made of the kernels; "
    "bytes, FLOPs and the floor are arithmetic (data sheets, bf16)."
)


def timed_frame(documents: Documents) -> pd.DataFrame:
    """Return one line for every timing: the settings of its run, what was computed, and how long it took."""
    lines = []
    for label, document in documents.items():
        block = document["block"]
        for row in document["measured"]:
            tile = [_tile(row, key) for key in ("gate_up", "down")]
            lines.append(
                {
                    "row": label,
                    "layer": document["layer"],
                    "experts": block["experts"],
                    "k": block["k"],
                    "hidden": block["hidden"],
                    "width": block["width"],
                    "dtype": document["dtype"],
                    "device": document["device"],
                    "threads": document["kernel"]["threads"],
                    "tokens": row["tokens"],
                    "routing": row["routing"],
                    "cache": row["cache"],
                    "implementation": row["implementation"],
                    "distinct": row["distinct"],
                    "imbalance": row["imbalance"],
                    "rows": row["rows"],
                    "padded": row.get("padded"),
                    "microseconds": row["seconds"] * 1e6,
                    "microseconds_20": row["seconds_20"] * 1e6,
                    "microseconds_80": row["seconds_80"] * 1e6,
                    "tflops": row["flops"] / row["seconds"] / 1e12,
                    "gigabytes_second": row["bytes"] / row["seconds"] / 1e9,
                    "roofline": row["floor_seconds"] / row["seconds"],
                    "bound": row["bound"],
                    "over_library": row.get("over_library"),
                    "library": row.get("library"),
                    "over_eager": row.get("over_eager"),
                    "over_uncompressed": row.get("over_uncompressed"),
                    "error": row["error"],
                    "gate_up": tile[0],
                    "down": tile[1],
                }
            )
    return pd.DataFrame(lines)


def compiled_frame(documents: Documents) -> pd.DataFrame:
    """Return one line for every GPU and input: tiles, what they take, and the floor; no times."""
    lines = []
    for label, document in documents.items():
        for row in document["compiled"]:
            facts = [row["facts"][kernel] for kernel in ("ragged_gate_up", "ragged_matmul")]
            lines.append(
                {
                    "row": label,
                    "target": row["target"],
                    "tokens": row["tokens"],
                    "routing": row["routing"],
                    "distinct": row["distinct"],
                    "rows": row["rows"],
                    "padded": row["padded"],
                    "launches": row["launches"],
                    "megabytes": row["bytes"] / 1e6,
                    "gigaflops": row["flops"] / 1e9,
                    "floor_microseconds": row["floor_seconds"] * 1e6,
                    "bound": row["bound"],
                    "gate_up": _tile(row, "gate_up"),
                    "down": _tile(row, "down"),
                    "registers": _pair(facts, "registers"),
                    "spilled": _pair(facts, "spilled"),
                    "shared": _pair(facts, "shared"),
                    "programs": _pair(facts, "programs"),
                }
            )
    return pd.DataFrame(lines)


def routing_frame(documents: Documents) -> pd.DataFrame:
    """Return one line for every layer whose routing was traced: picks joined, and a batch's experts."""
    lines = []
    for label, document in documents.items():
        for row in document["routing"]:
            line = {key: row[key] for key in ("layer", "tokens", "stored", "collisions", "joined", "joined_even")}
            unions = {f"union_{tokens}": value for tokens, value in row["union"].items()}
            lines.append({"row": label} | line | unions)
    return pd.DataFrame(lines)


def _tile(row: Document, key: str) -> str | None:
    if key not in row:
        return None
    tile = row[key]
    size = "x".join(str(tile[side]) for side in ("block_m", "block_n", "block_k"))
    split = f" split {tile['split']}" if tile["split"] > 1 else ""
    return f"{size} w{tile['warps']} s{tile['stages']}{split}"


def _pair(facts: Sequence[Document | None], key: str) -> str:
    return " / ".join("-" if fact is None else str(fact[key]) for fact in facts)


def summary_rows(documents: Documents) -> tuple[list[str], list[list[str]]]:
    """Return the header and cells of our kernels beside the library's best and the uncompressed block, all in one run.

    Real routing and warm caches where they were timed. `ideal` is the ratio of the floors: what fewer rows, or fewer
    experts' weights, can save at best.
    """
    header = [
        "row", "tokens", "routing", "experts run", "rows", "espalier µs", "library's best µs", "speed-up over it",
        "time / uncompressed", "ideal",
    ]  # fmt: skip
    cells = []
    for label, document in documents.items():
        lines = document["measured"]
        routing = _preferred([line["routing"] for line in lines], "trace")
        cache = _preferred([line["cache"] for line in lines], "warm")
        kept = [line for line in lines if line["routing"] == routing and line["cache"] == cache]
        for tokens in dict.fromkeys(line["tokens"] for line in kept):
            by_name = {line["implementation"]: line for line in kept if line["tokens"] == tokens}
            ours, before = by_name.get("espalier"), by_name.get("uncompressed")
            if ours is None:
                continue
            best = by_name.get(ours.get("library", ""))
            cells.append(
                [
                    label,
                    str(tokens),
                    routing,
                    f"{ours['distinct']} of {document['block']['experts']}",
                    str(ours["rows"]),
                    _number(ours["seconds"] * 1e6),
                    "" if best is None else f"{_number(best['seconds'] * 1e6)} ({best['implementation']})",
                    _times(ours.get("over_library")),
                    "" if before is None else _times(1 / ours["over_uncompressed"]),
                    "" if before is None else _times(ours["floor_seconds"] / before["floor_seconds"]),
                ]
            )
    return header, cells


def _preferred(names: Sequence[str], wanted: str) -> str:
    return wanted if wanted in names else names[0]


def timed_rows(document: Document) -> tuple[list[str], list[list[str]]]:
    """Return the header and cells of one benchmark's timings, as people read them."""
    header = [
        "tokens", "routing", "cache", "implementation", "experts run", "rows", "µs", "GFLOP/s", "GB/s", "of the floor",
        "bound", "over eager", "over the library's best", "over uncompressed", "largest error",
    ]  # fmt: skip
    cells = []
    for row in document["measured"]:
        middle, low, high = (_number(row[key] * 1e6) for key in ("seconds", "seconds_20", "seconds_80"))
        cells.append(
            [
                str(row["tokens"]),
                row["routing"],
                row["cache"],
                row["implementation"],
                f"{row['distinct']} of {document['block']['experts']}",
                f"{row['rows']}" + (f" / {row['padded']}" if "padded" in row else ""),
                f"{middle} [{low}, {high}]",
                _number(row["flops"] / row["seconds"] / 1e9),
                _number(row["bytes"] / row["seconds"] / 1e9),
                f"{row['floor_seconds'] / row['seconds']:.0%}".replace("%", " %"),
                row["bound"],
                _times(row.get("over_eager")),
                _times(row.get("over_library")),
                _times(row.get("over_uncompressed")),
                f"{row['error']:.0e}",
            ]
        )
    return header, cells


def compiled_rows(document: Document) -> tuple[list[str], list[list[str]]]:
    """Return the header and cells of what one benchmark says of GPUs that were not timed."""
    frame = compiled_frame({"": document})
    frame = frame[frame["routing"] == _preferred(list(frame["routing"]), "trace")]
    header = [
        "GPU", "tokens", "routing", "experts run", "rows / padded", "launches", "MB", "GFLOP", "floor µs", "bound",
        "gate and up", "down", "registers", "spilled", "shared bytes", "programs a unit",
    ]  # fmt: skip
    cells = [
        [
            line.target, str(line.tokens), line.routing, str(line.distinct), f"{line.rows} / {line.padded}",
            str(line.launches), _number(line.megabytes), _number(line.gigaflops), _number(line.floor_microseconds),
            line.bound, line.gate_up, line.down, line.registers, line.spilled, line.shared, line.programs,
        ]
        for line in frame.itertuples()
    ]  # fmt: skip
    return header, cells


def routing_rows(document: Document) -> tuple[list[str], list[list[str]]]:
    """Return the header and cells of what real routing shares, by layer."""
    sizes = sorted({int(tokens) for row in document["routing"] for tokens in row["union"]})
    header = ["layer", "experts stored", "picks skipped", "tokens with joined picks", "picks joined", "if drawn evenly"]
    header += [f"experts run by {tokens}" for tokens in sizes]
    cells = []
    for row in document["routing"]:
        unions = [row["union"].get(str(tokens)) for tokens in sizes]
        cells.append(
            [
                str(row["layer"]),
                str(row["stored"]),
                "" if row["skipped"] is None else _percent(row["skipped"]),
                *(_percent(row[key]) for key in ("collisions", "joined", "joined_even")),
                *("" if union is None else f"{union:.2f}" for union in unions),
            ]
        )
    return header, cells


def caption(document: Document) -> str:
    """Return what a reader of the timings must know of their run."""
    machine = document["machine"]
    said = TIMED.format(
        device=document["device"], machine=machine["name"], flops=machine["flops"], bandwidth=machine["bandwidth"]
    )
    block = document["block"]
    return (
        f"Layer {document['layer']}: {block['experts']} experts, {block['k']} chosen, hidden {block['hidden']}, width "
        f"{block['width']}, {document['dtype']}. {said}"
        + "".join(f" Left out: {name}, which {reason}." for name, reason in document["left_out"].items())
    )


def markdown(documents: Documents) -> str:
    """Return all tables in Markdown."""
    parts = [_markdown(*summary_rows(documents))]
    for label, document in documents.items():
        parts.append(f"## {label}\n\n{caption(document)}\n\n{_markdown(*timed_rows(document))}")
        if document["routing"]:
            parts.append(f"What the router chose on the calibration text:\n\n{_markdown(*routing_rows(document))}")
        if document["compiled"]:
            parts.append(f"{COMPILED}\n\n{_markdown(*compiled_rows(document))}")
    return "\n\n".join(parts) + "\n"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _number(value: float) -> str:
    """Return three digits, without an exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _percent(part: float) -> str:
    return f"{part:.1%}".replace("%", " %")


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
