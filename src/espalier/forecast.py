"""Forecast an experiment before anything runs: its jobs by stage, which are done, and what the others cost."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from espalier import conf, sources
from espalier.errors import UserError
from espalier.estimate import (
    DTYPE_BYTES,
    Hardware,
    Sizes,
    collect_flops,
    collect_memory,
    forward_flops,
    proof_memory,
    score_memory,
    sizes_of,
)
from espalier.graph import expand, save
from espalier.store import Store

BYTES_PER_TOKEN = 3.5  # of English text under a common tokenizer
SCORE_LENGTH = 256  # tokens of a scored sequence where no length is set

# lm-eval's tasks of the papers' tables: items, continuations of each, tokens of one with its context (rounded means).
KNOWN_TASKS: dict[str, tuple[int, int, int]] = {
    "arc_challenge": (1172, 4, 32),
    "arc_easy": (2376, 4, 30),
    "boolq": (3270, 2, 140),
    "hellaswag": (10042, 4, 100),
    "mmlu": (14042, 4, 110),
    "openbookqa": (500, 4, 18),
    "piqa": (1838, 2, 35),
    "rte": (277, 2, 85),
    "winogrande": (1267, 2, 27),
}


@dataclass
class Cost:
    """What jobs cost: floating-point operations, bytes read, bytes written that stay, seconds, peak bytes of memory."""

    flops: float = 0.0
    read: float = 0.0
    written: float = 0.0
    seconds: float = 0.0
    memory: float = 0.0


@dataclass
class StageForecast:
    """All jobs of one stage; the cost is of those that are still to be run, its memory that of the largest."""

    stage: str
    jobs: int = 0
    done: int = 0
    cost: Cost = field(default_factory=Cost)


@dataclass
class Forecast:
    """An experiment's stages in the order they run, and what could not be known."""

    experiment: str
    stages: dict[str, StageForecast]
    unknown: list[str]

    @property
    def total(self) -> Cost:
        return _total(stage.cost for stage in self.stages.values())


def _total(costs: Iterable[Cost]) -> Cost:
    total = Cost()
    for cost in costs:
        total.flops += cost.flops
        total.read += cost.read
        total.written += cost.written
        total.seconds += cost.seconds
        total.memory = max(total.memory, cost.memory)
    return total


def forecast(experiment: str, overrides: list[str], results: Path, hardware: Hardware) -> Forecast:
    """Return the forecast; nothing is written. UserError as for running the experiment.

    Seconds add up over jobs, as if one ran after another.
    """
    store = Store(results, dry=True)
    expanded = expand(experiment, overrides, store)
    save(expanded, store)
    jobs: dict[str, dict[str, Any]] = {}
    for node in expanded.nodes:
        document = store.read_node(node.id)
        job = store.read_node(document["made_by"]) if document["made_by"] else document
        jobs.setdefault(job["id"], job)
    reckoner = _Reckoner(store, hardware, expanded.run["runtime"])
    order = ("fetch", "tokens", "collect", "plan", "apply", "score", "table", "report")
    stages = {stage: StageForecast(stage) for stage in order}
    for job in jobs.values():
        row = stages[job["stage"]]
        row.jobs += 1
        if store.path(job).exists():
            row.done += 1
        else:
            row.cost = _total((row.cost, reckoner.cost(job)))
    return Forecast(experiment, {name: row for name, row in stages.items() if row.jobs}, sorted(reckoner.unknown))


class _Reckoner:
    """The cost of each job, from the sizes of the model that its parents lead to."""

    def __init__(self, store: Store, hardware: Hardware, runtime: dict[str, Any]) -> None:
        self.store, self.hardware, self.runtime = store, hardware, runtime
        self.unknown: set[str] = set()
        self._sizes: dict[str, Sizes | None] = {}

    def cost(self, job: dict[str, Any]) -> Cost:
        cost = getattr(self, f"_{job['stage']}", self._light)(job)
        cost.seconds = self.hardware.seconds(cost.flops, cost.read + cost.written)
        return cost

    def _light(self, job: dict[str, Any]) -> Cost:
        return Cost()

    def _fetch(self, job: dict[str, Any]) -> Cost:
        sizes, id = self._model(job), job["config"]["id"]
        here = sources.is_local(id) or id == sources.EMBEDDED
        return Cost() if sizes is None or here else Cost(written=sizes.disk_bytes)

    def _collect(self, job: dict[str, Any]) -> Cost:
        sizes, config = self._weights(job), job["config"]
        tokens, length = self._calibration(self.store.parent(job, "tokens")["config"])
        if sizes is None or tokens == 0:
            return Cost()
        probes, batch = set(config["probes"]), self.runtime["collect_batch_size"]
        return Cost(
            flops=collect_flops(sizes, tokens, length, probes),
            read=sizes.disk_bytes,
            memory=collect_memory(sizes, tokens, batch, length, _dtype(config), probes),
        )

    def _apply(self, job: dict[str, Any]) -> Cost:
        before, after = self._weights(job), self._after(job)
        if before is None or after is None:
            return Cost()
        # Written once, then the proof reads both and computes in float32.
        read = 2 * before.disk_bytes + after.disk_bytes
        return Cost(read=read, written=after.disk_bytes, memory=proof_memory(before))

    def _score(self, job: dict[str, Any]) -> Cost:
        sizes, config = self._weights(job), job["config"]
        if sizes is None:
            return Cost()
        flops, length = 0.0, SCORE_LENGTH
        for task in config["tasks"]:
            length = task.get("length") or SCORE_LENGTH
            flops += forward_flops(sizes, self._scored_tokens(task), length)
        memory = score_memory(sizes, self.runtime["score_batch_size"], length, _dtype(config))
        return Cost(flops=flops, read=sizes.disk_bytes, memory=memory)

    def _weights(self, job: dict[str, Any]) -> Sizes | None:
        return self._model(self.store.parent(job, "fetch", "apply"))

    def _model(self, node: dict[str, Any]) -> Sizes | None:
        """Sizes of the checkpoint that a `fetch` or `apply` node stands for."""
        if node["id"] not in self._sizes:
            self._sizes[node["id"]] = self._after(node) if node["stage"] == "apply" else self._source(node["config"])
        return self._sizes[node["id"]]

    def _source(self, config: dict[str, Any]) -> Sizes | None:
        id = str(config["id"])
        name = next((name for name in conf.names("model") if conf.load("model", name).get("id") == id), id)
        try:
            return sizes_of(name)
        except UserError as error:
            self.unknown.add(str(error))
            return None

    def _after(self, apply: dict[str, Any]) -> Sizes | None:
        before, method = self._weights(apply), self.store.parent(apply, "plan")["config"]
        ratio = method.get("ratio")
        if before is None or ratio is None or method.get("router") == "tie":
            return before
        return before.without(round(ratio * before.experts), rows=method.get("router") != "remap")

    def _calibration(self, config: dict[str, Any]) -> tuple[int, int]:
        """Tokens in all and in a sequence; 0 where only reading the texts would tell."""
        samples, length = config.get("samples"), int(config.get("length") or 0)
        if not samples:
            self.unknown.add(f"calibration {config.get('name')}: its number of tokens is not in its configuration.")
            return 0, length
        return int(samples) * len(config.get("domains") or [1]) * length, length

    def _scored_tokens(self, task: dict[str, Any]) -> int:
        name, limit = str(task["task"]), task.get("limit")
        domain = name.removeprefix("perplexity_")
        own = sources.ASSETS / "text" / domain / "validation.jsonl"
        items = sources.ASSETS / "tasks" / f"{name}.jsonl"
        if domain != name and own.is_file():
            return int(own.stat().st_size / BYTES_PER_TOKEN)
        if items.is_file():
            # A line holds a context and its continuations, which share it when they are scored.
            return int(sum(map(len, items.read_bytes().splitlines()[:limit])) / BYTES_PER_TOKEN)
        if name in KNOWN_TASKS:
            count, continuations, tokens = KNOWN_TASKS[name]
            return min(count, limit or count) * continuations * tokens
        self.unknown.add(f"task {name}: how many tokens it scores is not known; its time is not counted.")
        return 0


def _dtype(config: dict[str, Any]) -> str:
    dtype = str(config.get("dtype"))
    return dtype if dtype in DTYPE_BYTES else "float32"


def render(forecast: Forecast, hardware: Hardware) -> None:
    """Print a forecast as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{forecast.experiment}: what is left to do", title_justify="left")
    for column in ("stage", "jobs", "done", "TFLOP", "GB read", "GB written", "time", "peak GB"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage in forecast.stages.values():
        table.add_row(stage.stage, str(stage.jobs), str(stage.done), *_cells(stage.cost))
    jobs, done = (sum(getattr(stage, key) for stage in forecast.stages.values()) for key in ("jobs", "done"))
    table.add_section()
    table.add_row("all", str(jobs), str(done), *_cells(forecast.total))
    console = Console()
    console.print(table)
    console.print(_terms(hardware), highlight=False)
    for line in forecast.unknown:
        console.print(f"not counted: {line}", highlight=False)


def render_model(name: str, hardware: Hardware, tokens: int, length: int, batch_size: int) -> None:
    """Print what one model takes to store, calibrate and compress."""
    from rich.console import Console
    from rich.table import Table

    sizes = sizes_of(name)
    table = Table(title=f"{name}: {sizes.parameters:,} parameters", title_justify="left", show_header=False)
    experts = (
        f"{sizes.experts} in each of {sizes.moe_layers} layers, {sizes.top_k} a token" if sizes.experts else "none"
    )
    table.add_row("experts", experts)
    table.add_row("active parameters a token", f"{sizes.active:,}")
    table.add_row("checkpoint on disk", f"{sizes.disk_bytes / 1e9:.2f} GB")
    for ratio in (0.25, 0.5) if sizes.experts else ():
        smaller = sizes.without(round(ratio * sizes.experts))
        table.add_row(f"  with {ratio:.0%} of the experts removed", f"{smaller.disk_bytes / 1e9:.2f} GB")
    stored = {"dtype": "float32" if sizes.bytes_per_parameter > 2 else "bfloat16"}
    dtype = _dtype(stored | sources.model_config(name))
    cases: list[tuple[str, frozenset[str]]] = [("calibration", frozenset())]
    if sizes.experts:
        cases.append(("calibration, all experts (hc_smoe)", frozenset({"mean_output"})))
        cases.append(("calibration, Gram matrices (naee)", frozenset({"residual_gram"})))
    for what, probes in cases:
        flops = collect_flops(sizes, tokens, length, probes)
        memory = collect_memory(sizes, tokens, batch_size, length, dtype, probes)
        seconds = hardware.seconds(flops, sizes.disk_bytes)
        table.add_row(what, f"{flops / 1e12:,.2f} TFLOP, {_time(seconds)}, {memory / 1e9:.2f} GB of memory")
    table.add_row("proof of a written checkpoint", f"{proof_memory(sizes) / 1e9:.2f} GB of memory (float32)")
    console = Console()
    console.print(table)
    console.print(f"Calibration on {tokens:,} tokens of {length} in {dtype}. {_terms(hardware)}", highlight=False)


def _cells(cost: Cost) -> list[str]:
    numbers = [f"{value / scale:,.2f}" for value, scale in ((cost.flops, 1e12), (cost.read, 1e9), (cost.written, 1e9))]
    return [*numbers, _time(cost.seconds), f"{cost.memory / 1e9:,.2f}"]


def _terms(hardware: Hardware) -> str:
    return (
        f"Times are for jobs one after another at {hardware.flops / 1e9:,.0f} GFLOP/s, {hardware.disk / 1e6:,.0f} MB/s "
        f"and {hardware.startup:g} s to start each; formulas in src/espalier/estimate.py."
    )


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
