"""Write a table document as Markdown, to read in a terminal or on GitHub, and as a LaTeX booktabs table."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from espalier.passes import sentence

Document = Mapping[str, Any]
DAGGER = "†"
NONE = "–"


def name_of(line: Document) -> str:
    """Return the label of a summary line, with a dagger when its code was not committed."""
    return str(line["label"]) + (f" {DAGGER}" if line["dirty"] else "")


def number(value: float | None) -> str:
    """Format a perplexity: three to four digits."""
    if value is None:
        return NONE
    digits = 2 if abs(value) < 100 else 1 if abs(value) < 1000 else 0
    return f"{value:.{digits}f}"


def percent(value: float | None, sign: bool = False) -> str:
    """Format a fraction in percent with one decimal."""
    if value is None:
        return NONE
    return f"{100 * value:+.1f}" if sign else f"{100 * value:.1f}"


def between(found: Document, key: str, show: Callable[[float | None], str]) -> str:
    """Format `value [low, high]` of found[key], found[key_low], found[key_high]."""
    value = found.get(key)
    if value is None:
        return NONE
    prefix = "" if key == "value" else f"{key}_"
    low, high = found.get(f"{prefix}low"), found.get(f"{prefix}high")
    return show(value) if low is None else f"{show(value)} [{show(low)}, {show(high)}]"


def nats(value: float | None) -> str:
    """Format a divergence: three digits after the point."""
    return NONE if value is None else f"{value:.3f}"


def millions(value: float) -> str:
    """Format a number of parameters in millions, three digits or more."""
    return f"{value / 1e6:.2f}" if value < 1e8 else f"{value / 1e6:,.0f}"


def seconds(value: float | None) -> str:
    """Format a time: a tenth of a second below ten."""
    return NONE if value is None else f"{value:.1f}" if value < 10 else f"{value:,.0f}"


def main_rows(table: Document) -> tuple[list[str], list[list[str]]]:
    """Return header and cells of the table of means: one line a label, what the seeds share averaged."""
    header = ["method", "seeds", "plan s", "stored", "unique", "active"]
    has_ffn, has_depth, has_cache, has_texts, has_divergences, has_choices = (
        any(key in line for line in table["summary"])
        for key in ("ffn", "entered", "cache", "perplexity", "kl", "accuracy")
    )
    has_ffn = has_ffn and not has_depth  # of FFNs that are skipped as part of a layer, `tokens %` tells all
    if has_ffn:
        header.append("FFN %")
    if has_depth:
        header.append("tokens %")
    if has_texts:
        header += ["perplexity [95 %]", "× full [95 %]"]
    if has_divergences:
        header.append("KL [95 %]")
    if has_choices:
        header += ["accuracy % [95 %]", "Δ full [95 %]"]
    phases = [phase for phase in ("prefill", "decode") if any(phase in line for line in table["summary"])]
    header += [f"{phase} × [95 %] (ideal)" for phase in phases] + (["cache ×"] if has_cache else [])
    rows = []
    for line in table["summary"]:
        counts = [millions(line[key]) for key in ("stored", "unique", "active")]
        row = [name_of(line), str(len(line["seeds"])), seconds(line.get("plan_seconds")), *counts]
        if has_ffn:
            row.append(percent(line.get("ffn")))
        if has_depth:
            row.append(percent(line.get("entered")))
        if has_texts:
            found = line.get("perplexity", {})
            row += [between(found, "value", number), between(found, "ratio", number)]
        if has_divergences:
            row.append(between(line.get("kl", {}), "value", nats))
        if has_choices:
            found = line.get("accuracy", {})
            row += [between(found, "value", percent), between(found, "delta", lambda x: percent(x, sign=True))]
        row += [_timed(line.get(phase)) for phase in phases]
        if has_cache:
            row.append(number(line["cache"]) if "cache" in line else NONE)
        rows.append(row)
    return header, rows


def _timed(found: Document | None) -> str:
    return NONE if found is None else f"{between(found, 'value', number)} ({number(found['ideal'])})"


def task_rows(table: Document) -> tuple[list[str], list[list[str]]]:
    """Return header and cells of the table of tasks: perplexities first, then accuracies in percent."""
    tasks = ordered_tasks(table)
    header = ["method", *(short(task, table) for task in tasks)]
    rows = []
    for line in table["summary"]:
        cells = [_value(line["tasks"].get(task)) for task in tasks]
        rows.append([name_of(line), *cells])
    return header, rows


def ordered_tasks(table: Document) -> list[str]:
    """Names of the tasks: perplexities, choices, others, each in the order of the evaluation."""
    kinds = ("perplexity", "divergence", "choice", "other")
    return [task for kind in kinds for task in table["task_order"] if table["tasks"][task]["kind"] == kind]


def short(task: str, table: Document) -> str:
    """Return a column's head: `ppl wiki` for perplexity_wiki, else the task's name."""
    if table["tasks"][task]["kind"] == "divergence":
        return f"KL {task.removeprefix('kl_')}"
    kind = table["tasks"][task]["kind"]
    return f"ppl {task.removeprefix('perplexity_')}" if kind == "perplexity" else task.replace("_", " ")


def _value(found: Document | None) -> str:
    if found is None:
        return NONE
    show = {"choice": percent, "divergence": nats}.get(found["kind"], number)
    return show(found["value"])


def published_rows(table: Document) -> tuple[list[str], list[list[str]]]:
    """Return header and cells of ours beside published numbers; no rows when nothing matches."""
    header = ["method", "task", "ours [95 %]", "published", "ours - published", "source"]
    rows = []
    for line in table["summary"]:
        beside = [(task, found, found["kind"] == "choice") for task, found in line["tasks"].items()]
        beside.append(("mean accuracy", line.get("accuracy", {}), True))
        for task, found, is_choice in beside:
            if found.get("published") is not None:
                show: Callable[[float | None], str] = percent if is_choice else number
                delta = found["published_delta"]
                difference = percent(delta, sign=True) if is_choice else f"{delta:+.2f}"
                cells = [name_of(line), task, between(found, "value", show), show(found["published"]), difference]
                rows.append([*cells, found["published_source"]])
    return header, rows


def legend(table: Document, paired: bool = True) -> list[str]:
    """Return the sentences that explain the columns, with those of the differences from the full model if `paired`."""
    kinds = {facts["kind"] for facts in table["tasks"].values()}
    lines = [
        "`plan s`: seconds that the plan took, statistics apart. Parameters in millions: stored in the files, unique "
        "after sharing, active for one token (measured)."
    ]
    if "perplexity" in kinds:
        ratio = "; `× full`: its ratio to the uncompressed model's, paired over documents" if paired else ""
        lines.append(f"Perplexity (ppl): geometric mean over the texts, lower is better{ratio}.")
    if "divergence" in kinds:
        lines.append("KL: divergence of the uncompressed model's predictions from the model's, in nats a token.")
    if any("ffn" in line for line in table["summary"]):
        lines.append("FFN %: neurons of the uncompressed model's FFNs that a token runs (measured).")
    if any("entered" in line for line in table["summary"]):
        lines.append(
            "tokens %: share of tokens that enter a layer which they may skip, the mean of such layers (measured)."
        )
    if any("cache" in line for line in table["summary"]):
        lines.append("cache ×: bytes of keys and values over the uncompressed model's.")
    if "choice" in kinds:
        corrected = any(facts["metric"] == "acc_mutual_info" for facts in table["tasks"].values())
        how = " (each choice's score less its score without the question)" if corrected else ""
        difference = "; `Δ full`: difference from the uncompressed model, paired over items, in points"
        lines.append(
            f"Accuracy (acc): mean over the choice tasks{how}, in percent, higher is better"
            f"{difference if paired else ''}."
        )
    bounds = "[95 %]" if paired else "±"
    dense = any("ffn" in line for line in table["summary"])
    removed = "FFN neurons that a token leaves out" if dense else "experts removed (camera_p: of neurons)"
    lines.append(
        f"{bounds}: 95 % interval over items or documents; with several seeds, the variance over seeds is added. "
        f"The ratio in a method's name is the fraction of {removed}."
    )
    if any("decode" in line for line in table["summary"]):
        lines.append(
            "prefill ×, decode ×: time of one sequence over the uncompressed model's, in turns in one process; ideal: "
            "the FLOPs of the prefill, and the weights that a decoded token reads, over the uncompressed model's."
        )
    if table.get("passes"):
        lines.append(sentence(table["passes"]))
    if any(line["dirty"] for line in table["summary"]):
        lines.append(f"{DAGGER} made from a source tree with uncommitted changes.")
    return lines


def markdown(table: Document) -> str:
    """Return the tables of means, of tasks and of published numbers, padded so that columns align as text."""
    model = table["model"]["id"] or "model"
    parts = [f"# {table['experiment']}: {model}", _pipe(*main_rows(table)), "## By task", _pipe(*task_rows(table))]
    header, rows = published_rows(table)
    if rows:
        parts += [
            f"## Beside published numbers ({table['compare']})",
            _pipe(header, rows),
            "Models, data and harness may differ from the publication's: a comparison, no more.",
        ]
    parts.append("\n".join(f"- {line}" for line in legend(table)))
    return "\n\n".join(parts) + "\n"


def _pipe(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[n]) for row in (header, *rows)) for n in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if n == 0 else c.rjust(w) for n, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * w if n == 0 else "-" * (w - 1) + ":" for n, w in enumerate(widths)]
    return "\n".join([line(header), "| " + " | ".join(rule) + " |", *map(line, rows)])


ESCAPES = {character: "\\" + character for character in "%_&#${}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    DAGGER: r"$^\dagger$",
    NONE: "--",
}


def escape(text: str) -> str:
    """Escape LaTeX's special characters."""
    return "".join(ESCAPES.get(character, character) for character in text)


def latex(table: Document) -> str:
    """Return one booktabs table: parameters, each task, and the means with half-widths of their intervals."""
    tasks = ordered_tasks(table)
    header = ["Method", "Stored", "Unique", "Active", *(short(task, table) for task in tasks)]
    has_texts = any("perplexity" in line for line in table["summary"])
    has_choices = any("accuracy" in line for line in table["summary"])
    header += ["ppl geo"] * has_texts + ["acc mean"] * has_choices
    body = []
    for line in table["summary"]:
        cells = [
            escape(name_of(line)),
            *(millions(line[key]).replace(",", "{,}") for key in ("stored", "unique", "active")),
        ]
        cells += [escape(_value(line["tasks"].get(task))) for task in tasks]
        cells += [_half(line.get("perplexity"), number)] * has_texts + [
            _half(line.get("accuracy"), percent)
        ] * has_choices
        body.append("    " + " & ".join(cells) + r" \\")
    caption = escape(f"{table['experiment']}: {table['model']['id'] or 'model'}. ") + " ".join(
        escape(line) for line in legend(table, paired=False)
    )
    return "\n".join(
        [
            r"% Needs \usepackage{booktabs}.",
            r"\begin{table}",
            r"  \centering",
            rf"  \caption{{{caption}}}",
            rf"  \begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
            r"    \toprule",
            "    " + " & ".join(map(escape, header)) + r" \\",
            r"    \midrule",
            *body,
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _half(found: Document | None, show: Callable[[float | None], str]) -> str:
    if not found:
        return "--"
    if found["high"] is None:
        return show(found["value"])
    return rf"{show(found['value'])} $\pm$ {show((found['high'] - found['low']) / 2)}"
