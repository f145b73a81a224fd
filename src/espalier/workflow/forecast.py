"""Forecast an experiment before anything runs: its jobs by stage, which are done, and what the others cost."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from espalier.artefacts.store import Store
from espalier.costs.estimate import Cost
from espalier.machine.hardware import Hardware
from espalier.workflow.graph import expand, save
from espalier.workflow.reckon import Reckoner
from espalier.workflow.slow_dtype import slow_dtype

ORDER = (
    "fetch",
    "tokens",
    "collect",
    "reduce",
    "fit",
    "plan",
    "apply",
    "teacher",
    "tune",
    "score",
    "speed",
    "table",
    "report",
)


@dataclass
class StageForecast:
    """All jobs of one stage; the cost is of those that are still to be run, memory and scratch that of the largest."""

    stage: str
    jobs: int = 0
    done: int = 0
    cost: Cost = field(default_factory=Cost)
    seconds: float = 0.0


@dataclass
class Forecast:
    """An experiment's stages in the order they run, the table's configuration, and what could not be known.

    `slow`: what to say of a dtype that this machine has no products for, or None.
    """

    experiment: str
    stages: dict[str, StageForecast]
    table: dict[str, Any]
    unknown: list[str]
    slow: str | None = None

    @property
    def total(self) -> Cost:
        return total(stage.cost for stage in self.stages.values())

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages.values())


def total(costs: Iterable[Cost]) -> Cost:
    """Add costs up: of memory the largest, of the disk what stays and the largest of what does not."""
    sums = dict.fromkeys(("flops", "read", "written"), 0.0)
    peaks = dict.fromkeys(("memory", "gpu_memory"), 0.0)
    stays = beside = 0.0
    gpu = streamed = False
    for cost in costs:
        for key in sums:
            sums[key] += getattr(cost, key)
        for key in peaks:
            peaks[key] = max(peaks[key], getattr(cost, key))
        stays += cost.kept
        beside = max(beside, cost.disk - cost.kept)
        gpu, streamed = gpu or cost.gpu, streamed or cost.streamed
    return Cost(**sums, **peaks, kept=stays, disk=stays + beside, gpu=gpu, streamed=streamed)


def forecast(experiment: str, overrides: list[str], results: Path, hardware: Hardware) -> Forecast:
    """Return the forecast; nothing is written. UserError as for running the experiment.

    Seconds add up over jobs, as if one ran after another with all cores.
    """
    store = Store(results, dry=True)
    expanded = expand(experiment, overrides, store)
    save(expanded, store)
    jobs: dict[str, dict[str, Any]] = {}

    def add(job: dict[str, Any]) -> None:
        jobs.setdefault(job["id"], job)
        if job["stage"] == "reduce":
            for parent in job["parents"]:
                add(store.read_node(parent))

    for node in expanded.nodes:
        document = store.read_node(node.id)
        add(store.read_node(document["made_by"]) if document["made_by"] else document)
    temporary = frozenset(expanded.run.get("temporary", ()))
    reckoner = Reckoner(store, hardware, expanded.run["runtime"], temporary)
    stages = {stage: StageForecast(stage) for stage in ORDER}
    for job in jobs.values():
        if job["id"] in temporary and not store.path(job).exists():
            continue  # part of its score job
        row = stages[job["stage"]]
        row.jobs += 1
        if store.path(job).exists():
            row.done += 1
        else:
            cost = reckoner.cost(job)
            row.cost = total((row.cost, cost))
            row.seconds += cost.seconds(hardware)
    table = next(node.config for node in expanded.nodes if node.stage == "table")
    made = {name: row for name, row in stages.items() if row.jobs}
    return Forecast(experiment, made, table, sorted(reckoner.unknown), slow_dtype(expanded, hardware))
