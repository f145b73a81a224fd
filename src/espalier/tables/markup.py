"""The cells of a table document's tables as text, and the sentences that explain them; what renderings are made of."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from espalier.tables import budgets, passes
from espalier.workflow.scale import FULL

Document = Mapping[str, Any]
DAGGER = "†"
ONLY = "‡"  # a line that only the paper has
BEYOND = "*"  # a difference of more than two standard errors
NONE = "–"
LISTED = 8  # lines that are named of those not told apart, or worse


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


MEANS: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
    ("perplexity", "perplexity [95 %]", number),
    ("accuracy", "accuracy % [95 %]", percent),
)


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
        cells = [value_of(line["tasks"].get(task)) for task in tasks]
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


def value_of(found: Document | None) -> str:
    """Format a task's value by its kind."""
    if found is None:
        return NONE
    show = {"choice": percent, "divergence": nats}.get(found["kind"], number)
    return show(found["value"])


def published_rows(table: Document) -> tuple[list[str], list[list[str]]]:
    """Return header and cells of published numbers beside ours; no rows when none is of the table's models.

    Where ours are of the paper's models and tasks, a method has a line of ours, the paper's, and one of differences,
    with a mark beyond two standard errors. Else ours are two columns of means, before the paper's. Lines that only the
    paper has come last, marked too.
    """
    lines = table.get("published") or []
    columns = list(dict.fromkeys((cell["task"], cell["metric"]) for line in lines for cell in line["cells"]))
    metrics = {metric for _, metric in columns}
    heads = [task if len(metrics) == 1 or not metric else f"{task} ({metric})" for task, metric in columns]
    if table.get("scale", FULL) != FULL:
        return _apart(table, lines, columns, heads)
    rows = []
    for line in lines:
        cells = {(cell["task"], cell["metric"]): cell for cell in line["cells"]}
        printed = [cells[column]["printed"] if column in cells else NONE for column in columns]
        if line["label"] is None:
            rows.append([f"{_printed_name(line)} {ONLY}", "paper", *printed])
            continue
        ours = [(cells.get(column) or {}).get("ours") for column in columns]
        rows.append(
            [line["label"], "ours [95 %]", *(between(own, "value", _shown(own)) if own else NONE for own in ours)]
        )
        rows.append([line["label"], "paper", *printed])
        rows.append([line["label"], "ours - paper", *map(_difference, ours)])
    return ["method", "whose", *heads], rows


def _apart(
    table: Document, lines: Sequence[Document], columns: Sequence[tuple[str, str]], heads: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """Ours and the paper's in columns of their own, where they are of different models or tasks."""
    summary = {line["label"]: line for line in table["summary"]}
    means = [(key, head, show) for key, head, show in MEANS if any(key in line for line in summary.values())]
    rows = []
    for line in lines:
        cells = {(cell["task"], cell["metric"]): cell["printed"] for cell in line["cells"]}
        own = summary.get(line["label"], {})
        ours = [between(own.get(key, {}), "value", show) for key, _, show in means]
        name = f"{line['method']} {ONLY}" if line["label"] is None else line["label"]
        rows.append([name, *ours, _model_name(line["model"]), line["setting"], *(cells.get(c, NONE) for c in columns)])
    return ["method", *(f"ours: {head}" for _, head, _ in means), "paper's model", "setting", *heads], rows


def _printed_name(line: Document) -> str:
    setting = f" ({line['setting']})" if line["setting"] else ""
    return f"{_model_name(line['model'])}: {line['method']}{setting}" if line["model"] else f"{line['method']}{setting}"


def _model_name(id: str) -> str:
    return id.rpartition("/")[2] or NONE


def _shown(own: Document) -> Callable[[float | None], str]:
    return percent if own["percent"] else number


def _difference(own: Document | None) -> str:
    if own is None:
        return NONE
    text = percent(own["delta"], sign=True) if own["percent"] else f"{own['delta']:+.2f}"
    return f"{text} {BEYOND}" if own["beyond"] else text


def pair_rows(table: Document) -> tuple[list[str], list[list[str]]]:
    """Return header and cells of the comparisons in pairs: of each share and measure the best, and what differs."""
    header = ["left", "by", "best", "not told apart from it", "worse (difference or ratio [95 %], p by Holm)"]
    keys = list(dict.fromkeys(map(_family, table.get("pairs") or [])))
    names = {model["node"]: _model_name(str(model["id"])) for model in table.get("models") or [] if "node" in model}
    several = len({model for model, *_ in keys}) > 1
    rows = []
    for key in keys:
        own = [pair for pair in table["pairs"] if _family(pair) == key]
        labels = dict.fromkeys(label for pair in own for label in (pair["first"], pair["second"]))
        best = min(labels, key=lambda label, own=own: _losses(label, own))  # type: ignore[misc]
        alike: list[tuple[str, str]] = []
        worse: list[tuple[str, str]] = []
        for pair in own:
            if best in (pair["first"], pair["second"]):
                other = pair["second"] if pair["first"] == best else pair["first"]
                (alike if pair["better"] is None else worse).append((other, _against(pair, best)))
        model = f"{names.get(key[0], '')}, " if several else ""
        cells = [f"{model}{100 * key[1]:g} %", key[2], best, _listed([name for name, _ in alike])]
        rows.append([*cells, _listed([f"{name} ({text})" for name, text in worse])])
    return header, rows


def _family(pair: Document) -> tuple[Any, Any, Any, Any]:
    """Return what the lines that are compared with each other share: model, share, measure, how they were scored."""
    return pair["model"], pair["share"], pair["measure"], pair.get("scored", 0)


def _losses(label: str, pairs: Sequence[Document]) -> int:
    """Number of pairs in which a line's estimate is the worse one."""
    lost = 0
    for pair in pairs:
        even, sign = (1.0, -1) if pair["measure"] == "perplexity" else (0.0, 1)
        ahead = sign * (pair["value"] - even) > 0
        lost += (pair["first"] == label and not ahead) or (pair["second"] == label and ahead)
    return lost


def _against(pair: Document, best: str) -> str:
    """How much worse the other line of a pair is than the best one."""
    bounds = [pair[key] for key in ("value", "low", "high")]
    if pair["measure"] == "perplexity":
        value, low, high = (1 / bounds[0], 1 / bounds[2], 1 / bounds[1]) if pair["first"] == best else bounds
        return f"{number(value)} [{number(low)}, {number(high)}], {_chance(pair['p_holm'])}"
    value, low, high = (-bounds[0], -bounds[2], -bounds[1]) if pair["first"] == best else bounds
    texts = [percent(x, sign=True) for x in (value, low, high)]
    return f"{texts[0]} [{texts[1]}, {texts[2]}], {_chance(pair['p_holm'])}"


def _chance(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p {p:.3f}"


def _listed(names: Sequence[str]) -> str:
    more = [f"and {len(names) - LISTED} more"] if len(names) > LISTED else []
    return "; ".join([*names[:LISTED], *more]) or NONE


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
            f"{_timed_seeds(table['summary'])}"
        )
    if table.get("passes"):
        lines.append(passes.sentence(table["passes"]))
    if table.get("missed_budgets"):
        lines.append(budgets.sentence(table["missed_budgets"]))
    lines += _made(table)
    return lines


def _timed_seeds(summary: Sequence[Document]) -> str:
    """Say of how many seeds times are, where some seeds of a line have none."""
    counts = [(line["timed"], len(line["seeds"])) for line in summary if "timed" in line]
    fewer = sorted({count for count in counts if count[0] < count[1]})
    if not fewer:
        return ""
    return f" Timed, keys and values counted: {' or '.join(f'{some} of {all_} seeds' for some, all_ in fewer)}."


def _made(table: Document) -> list[str]:
    """Say what the rows were calibrated on, at which commit they were made, and whether that is all of the source."""
    by_text: dict[str, list[str]] = {}
    for line in table["summary"]:
        if line.get("calibration"):
            by_text.setdefault(line["calibration"], []).append(line["label"])
    lines = []
    for text, labels in by_text.items():
        lines.append(f"Calibration{'' if len(by_text) == 1 else f' of {_listed(labels)}'}: {text}.")
    commits = list(dict.fromkeys(str(run["commit"])[:12] for run in table["runs"] if run.get("commit")))
    if commits:
        lines.append(f"Made at commit {', '.join(commits)}.")
    if any(line["dirty"] for line in table["summary"]):
        lines.append(f"{DAGGER} made from a source tree with uncommitted changes.")
    return lines


def published_legend(table: Document) -> list[str]:
    """Return the sentences that explain the published numbers, with what is doubtful about them."""
    lines = table.get("published") or []
    metrics = dict.fromkeys(cell["metric"] for line in lines for cell in line["cells"] if cell["metric"])
    sources = dict.fromkeys(line["source"] for line in lines)
    notes = dict.fromkeys(note for line in lines for note in line["notes"])
    said = [f"Published: {'; '.join(sources)}. Metric: {', '.join(metrics)}."]
    if notes:
        said.append(f"Notes on published values: {'; '.join(notes)}.")
    calibrations = dict.fromkeys(line["calibration"] for line in lines if line["calibration"])
    if calibrations:
        said.append(f"The paper's calibration: {'; '.join(calibrations)}.")
    if any(line["label"] is None for line in lines):
        said.append(f"{ONLY} only the paper has this line: the method, setting or calibration was not run here.")
    if table.get("scale", FULL) == FULL:
        said.append(
            f"{BEYOND} more than two of our standard errors from the paper's value, which is taken as exact. Where "
            "metrics differ or are not stated, nothing is subtracted; models, data and harness may differ: a "
            "comparison, no more."
        )
    return said


PAIRED = (
    "Methods that leave the same share (of experts, neurons or tokens), compared on the same items by a paired "
    "bootstrap; differences of the mean accuracy in points, ratios of the mean perplexity. p by Holm over all pairs of "
    "a share, told apart at 5 %; every pair is in the file pairs.csv."
)
