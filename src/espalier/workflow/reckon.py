"""From a job's node to its cost: the sizes of the model its parents lead to, its tokens, its settings."""

import json
from collections.abc import Collection
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from espalier.artefacts.store import MODELS, Store
from espalier.artefacts.temporary import made_by
from espalier.costs.estimate import (
    CHOICE_LENGTH,
    KERNEL_BYTES,
    PROCESS,
    TIMED_KERNEL_BYTES,
    Cost,
    apply_cost,
    collect_cost,
    forward_flops,
    plan_cost,
    score_cost,
    statistics_bytes,
    tokens_cost,
)
from espalier.costs.sizes import Sizes, sizes_of_source
from espalier.errors import UserError
from espalier.inputs import assets, sources
from espalier.machine.hardware import Hardware
from espalier.methods import build, is_for_dense
from espalier.models.running import Running
from espalier.timing.kernel_cost import kernel_cost
from espalier.timing.kernel_settings import KernelBench
from espalier.timing.speed_settings import Timing
from espalier.training.fit_cost import fit_cost
from espalier.training.fit_settings import Fitting
from espalier.training.tune_cost import teacher_cost, tune_cost
from espalier.training.tune_settings import Tuning

Document = dict[str, Any]

BYTES_PER_TOKEN = 3.5  # of English text under a common tokenizer
# Of a task's longest choice to their mean: the passages of BoolQ go up to seven times, its excerpt here to four.
LONGEST = 6
SCORE_LENGTH = 256  # tokens of a scored sequence where no length is set
FEW_DOCUMENTS_TOKENS = 16000  # on which active parameters are measured where no perplexity is asked for

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


class Reckoner:
    """The cost of each job of a results folder on `hardware` with the settings `runtime`.

    `temporary`: ids of checkpoints that are made by the jobs that score them. `unknown` gathers what could not be
    known, in sentences; costs are 0 there.
    """

    def __init__(self, store: Store, hardware: Hardware, runtime: Document, temporary: Collection[str] = ()) -> None:
        self.store, self.hardware, self.running = store, hardware, Running.of(runtime)
        self.temporary = temporary
        self.unknown: set[str] = set()
        self._sizes: dict[str, Sizes | None] = {}

    def cost(self, job: Document) -> Cost:
        """Return the cost of a node that is made by a job of its own."""
        cost: Cost = getattr(self, f"_{job['stage']}", lambda job: Cost())(job)
        checkpoint = made_by(job, self.store, self.temporary)
        return cost if checkpoint is None else cost.after(self._apply(checkpoint))

    def known(self, job: Document) -> bool:
        """Whether the sizes of the job's model are known."""
        try:
            return self._model(job if job["stage"] == "fetch" else self._root(job)) is not None
        except UserError:
            return False

    def _root(self, job: Document) -> Document:
        """The `fetch` node that a job's parents lead to."""
        while job["stage"] != "fetch":
            job = next(map(self.store.read_node, job["parents"]))
        return job

    def _fetch(self, job: Document) -> Cost:
        sizes, id = self._model(job), job["config"]["id"]
        here = sources.is_local(id) or id == sources.EMBEDDED
        if sizes is None or here:
            return Cost()
        return Cost(written=sizes.disk_bytes, kept=sizes.disk_bytes, disk=sizes.disk_bytes)

    def _tokens(self, job: Document) -> Cost:
        return tokens_cost()

    def _collect(self, job: Document) -> Cost:
        sizes, config = self._weights(job), job["config"]
        tokens, length = self._calibration(self.store.parent(job, "tokens")["config"], config.get("shard"))
        if sizes is None or tokens == 0:
            return Cost()
        probes = frozenset(config["probes"])
        return collect_cost(sizes, tokens, length, probes, str(config["dtype"]), self.running, self.hardware)

    def _statistics(self, job: Document) -> float:
        """Bytes of the statistics that a `probe`, `collect` or `reduce` node stands for."""
        config = job["config"]
        shard = config.get("shard")
        if job["stage"] == "reduce":
            job = self.store.read_node(job["parents"][0])
        sizes = self._weights(job)
        tokens, _ = self._calibration(self.store.parent(job, "tokens")["config"], shard)
        probes = frozenset([config["probe"]] if "probe" in config else config["probes"])
        return 0.0 if sizes is None else statistics_bytes(sizes, tokens, probes)

    def _reduce(self, job: Document) -> Cost:
        parts = sum(self._statistics(self.store.read_node(parent)) for parent in job["parents"])
        made = self._statistics(job)
        cost = plan_cost(parts)
        return Cost(read=parts, written=made, kept=made, disk=made, memory=tokens_cost().memory + cost.memory + made)

    def _fit(self, job: Document) -> Cost:
        sizes, config = self._weights(job), job["config"]
        tokens, length = self._calibration(self.store.parent(job, "tokens")["config"])
        if sizes is None or tokens == 0:
            return Cost()
        fitting, dtype = Fitting(**config["fit"]), str(config["dtype"])
        return fit_cost(sizes, tokens, length, fitting, dtype, self.running, self.hardware)

    def _plan(self, job: Document) -> Cost:
        parents = [self.store.read_node(id) for id in job["parents"]]
        if any(parent["stage"] == "tokens" for parent in parents):
            return self._plan_sequentially(job)
        probes = (parent for parent in parents if parent["stage"] == "probe")
        method = build({key: value for key, value in job["config"].items() if key != "dtype"})
        reads = is_for_dense(method) or getattr(method, "reads_weights", False)
        return plan_cost(sum(map(self._statistics, probes)), self._weights(job) if reads else None)

    def _plan_sequentially(self, job: Document) -> Cost:
        """A pass over the layers that carries the tokens three times, and keeps what a layer's probes gather."""
        sizes, config = self._weights(job), job["config"]
        tokens, length = self._calibration(self.store.parent(job, "tokens")["config"])
        if sizes is None or tokens == 0:
            return Cost()
        running = replace(self.running, stream="always")
        probes = frozenset({"residual_gram"})
        cost = collect_cost(sizes, tokens, length, probes, str(config["dtype"]), running, self.hardware)
        plain = 2 * forward_flops(sizes, tokens, length, head=False)
        return replace(cost, flops=cost.flops + plain, written=0.0, kept=0.0, disk=0.0)

    def _apply(self, job: Document) -> Cost:
        before, after = self._weights(job), self._model(job)
        if before is None or after is None:
            return Cost()
        merges = _router(self.store.parent(job, "plan")["config"]) is not None
        return apply_cost(before, after, merges, self.running, self.hardware)

    def _score(self, job: Document) -> Cost:
        sizes, config = self._weights(job), job["config"]
        if sizes is None:
            return Cost()
        flops, length, choices, windows, longest = 0.0, SCORE_LENGTH, 0, 0, 0
        texts: set[str] = set()  # each is run once, whatever is measured on it
        for task in config["tasks"]:
            own, domain = int(task.get("length") or SCORE_LENGTH), _domain(str(task["task"]))
            tokens = 0 if domain in texts else self._scored_tokens(task)
            flops += forward_flops(sizes, tokens, own)
            if domain is not None:
                texts.add(domain)
                windows, length = windows + tokens, max(length, own)
            else:
                choices, longest = choices + tokens, max(longest, _longest_choice(task))
        if sizes.experts and not windows:
            flops += forward_flops(sizes, FEW_DOCUMENTS_TOKENS, length)
        longest = min(longest, sizes.positions or longest)
        dtype = str(config["dtype"])
        return score_cost(sizes, choices, windows, length, flops, dtype, self.running, self.hardware, longest)

    def _speed(self, job: Document) -> Cost:
        cost = self._timing(job)
        compiled = str(job["config"]["dtype"]) in ("bfloat16", "float16") and not self.hardware.gpu(self.running.device)
        more = TIMED_KERNEL_BYTES - KERNEL_BYTES if compiled and cost.memory else 0.0
        return replace(cost, memory=cost.memory + more)

    def _timing(self, job: Document) -> Cost:
        sizes, original = self._weights(job), self._model(self.store.origin(job))
        if sizes is None or original is None:
            return Cost()
        dtype = str(job["config"]["dtype"])
        if "kernel" in job["config"]:
            bench = KernelBench.of(job["config"]["kernel"])
            return kernel_cost(sizes, original, bench, dtype, self.running, self.hardware)
        timing = Timing.of(job["config"]["speed"])
        length = timing.prompt + timing.new
        tokens = (2 * timing.rounds + 1) * length
        own, other = (
            score_cost(each, 0, length, length, forward_flops(each, tokens, length), dtype, self.running, self.hardware)
            for each in (sizes, original)
        )
        return replace(
            own,
            flops=own.flops + other.flops,
            read=own.read + other.read,
            memory=own.memory + other.memory - PROCESS["perplexity"],
            gpu_memory=own.gpu_memory + other.gpu_memory,
        )

    def _teacher(self, job: Document) -> Cost:
        sizes, config = self._weights(job), job["config"]
        tokens, length = self._calibration(self.store.parent(job, "tokens")["config"])
        if sizes is None or tokens == 0:
            return Cost()
        return teacher_cost(sizes, tokens, length, config["top"], str(config["dtype"]), self.running, self.hardware)

    def _tune(self, job: Document) -> Cost:
        sizes, original, config = self._weights(job), self._model(self.store.origin(job)), job["config"]
        tokens, length = self._calibration(self.store.parent(job, "tokens")["config"])
        if sizes is None or original is None or tokens == 0:
            return Cost()
        tuning, dtype = Tuning.of(config["tuning"]), str(config["dtype"])
        return tune_cost(sizes, original, tokens, length, tuning, dtype, self.running, self.hardware)

    def _weights(self, job: Document) -> Sizes | None:
        return self._model(self.store.parent(job, *MODELS))

    def _model(self, node: Document) -> Sizes | None:
        """Sizes of the checkpoint that a `fetch`, `apply` or `tune` node stands for."""
        make = {"apply": self._after, "tune": self._weights, "fetch": self._source}
        if node["id"] not in self._sizes:
            self._sizes[node["id"]] = make[node["stage"]](node)
        return self._sizes[node["id"]]

    def _source(self, node: Document) -> Sizes | None:
        try:
            return sizes_of_source(str(node["config"]["id"]), self.store.path(node))
        except UserError as error:
            self.unknown.add(str(error))
            return None

    def _after(self, apply: Document) -> Sizes | None:
        before, method = self._weights(apply), self.store.parent(apply, "plan")["config"]
        ratio, router = method.get("ratio"), _router(method)
        if before is None or ratio is None or router == "tie":
            return before
        if not before.moe:  # of a dense model, only static pruning makes the files smaller
            return before.narrower(ratio) if method.get("name") == "static" else before
        return before.without(round(ratio * before.experts), rows=router != "remap")

    def _calibration(self, config: Document, shard: list[int] | None = None) -> tuple[int, int]:
        """Tokens in all, or in a shard, and in a sequence; 0 where only reading the texts would tell."""
        samples, length = config.get("samples"), int(config.get("length") or 0)
        if config.get("source") == "windows":
            return _held_out_tokens(str(config["domains"][0])), length
        if not samples:
            self.unknown.add(f"calibration {config.get('name')}: its number of tokens is not in its configuration.")
            return 0, length
        sequences = int(samples) * len(config.get("domains") or [1])
        return -(-sequences // (shard[1] if shard else 1)) * length, length

    def _scored_tokens(self, task: Document) -> int:
        name, limit = str(task["task"]), task.get("limit")
        domain = _domain(name)
        if domain is not None:
            return _held_out_tokens(domain, task.get("documents"))
        items = sources.task_items(name)
        if items is not None:
            return _item_tokens(items, limit)
        if name in KNOWN_TASKS:
            count, continuations, tokens = KNOWN_TASKS[name]
            return min(count, limit or count) * continuations * tokens
        self.unknown.add(f"task {name}: how many tokens it scores is not known; its time is not counted.")
        return 0


def _domain(task: str) -> str | None:
    """Return the embedded text that a task is measured on, or None."""
    kind, _, domain = task.partition("_")
    known = kind in ("perplexity", "kl") and _held_out(domain).is_file()
    return domain if known else None


def _held_out(domain: str) -> Path:
    return assets.text_directory() / domain / "validation.jsonl"


@cache
def _item_tokens(items: Path, limit: int | None) -> int:
    """Tokens of a task's items; a line holds a context and its continuations, which share it when they are scored."""
    return int(sum(map(len, items.read_bytes().splitlines()[:limit])) / BYTES_PER_TOKEN)


@cache
def _held_out_tokens(domain: str, documents: int | None = None) -> int:
    return int(sum(map(len, _held_out(domain).read_bytes().splitlines()[:documents])) / BYTES_PER_TOKEN)


def _longest_choice(task: Document) -> int:
    """Tokens of a task's longest choice with its context."""
    name = str(task["task"])
    items = sources.task_items(name)
    if items is None:
        return LONGEST * KNOWN_TASKS[name][2] if name in KNOWN_TASKS else CHOICE_LENGTH
    return _longest_item(items, task.get("limit"))


@cache
def _longest_item(items: Path, limit: int | None) -> int:
    lengths = []
    for item in map(json.loads, items.read_text().splitlines()[:limit]):
        text = sum(len(item.get(key, "")) for key in ("context", "passage", "question"))
        lengths.append(text + max(map(len, item.get("choices", [""]))))
    return int(max(lengths) / BYTES_PER_TOKEN)


def _router(method: Document) -> str | None:
    """What becomes of the router where a method merges experts; None where it does not."""
    default = "remap" if method.get("name") == "random_merge" else None
    router: str | None = method.get("router", default)
    return router
