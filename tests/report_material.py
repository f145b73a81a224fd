"""A table, plans, statistics and curves such as a run leaves, small and made by hand, for tests of reports."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import pdist, squareform

from espalier.checkpoints.shape import ModelShape
from espalier.collecting.stats import Stats
from espalier.plans.operations import Keep, Merge, Skip
from espalier.plans.plan import Plan
from espalier.report.commands import Step
from espalier.report.material import Line, Made, Material
from espalier.training.curves import Curve

EXPERTS, LAYERS = 6, (0, 2)
SHAPE = ModelShape("olmoe", LAYERS, EXPERTS, 2, 8, 4, True, 96, 8, 2000)


def keep_plan() -> Plan:
    return Plan({"name": "reap", "ratio": 1 / 3}, {0: (Keep((0, 1, 3, 4)),), 2: (Keep((1, 2, 3, 5)), Skip(0.5))})


def points(layer: int) -> Any:
    """Where the experts of a layer lie, [E, 3]."""
    return np.random.default_rng(layer).normal(size=(EXPERTS, 3))


def merge_plan(clusters: int = 4) -> Plan:
    layers, evidence = {}, {}
    for layer in LAYERS:
        merges = linkage(points(layer), "average")
        labels = fcluster(merges, clusters, "maxclust")
        groups = sorted(tuple(int(e) for e in np.flatnonzero(labels == label)) for label in np.unique(labels))
        weights = tuple(tuple(1 / len(group) for _ in group) for group in groups)
        layers[layer] = (Merge(tuple(groups), weights),)
        evidence[layer] = {"linkage": merges.tolist(), "loss": 1.0 + layer}
    return Plan({"name": "hc_smoe"}, layers, evidence)


def line(label: str, method: str, unique: float, worse: float, plans: Sequence[str] = ()) -> dict[str, Any]:
    """A line of a table's summary, `worse` than the uncompressed model by so much."""
    paired = (
        {"delta": None} if not worse else {"delta": -worse, "delta_low": -worse - 0.01, "delta_high": -worse + 0.01}
    )
    ratio: dict[str, Any] = {"ratio": None}
    if worse:
        ratio = {"ratio": 1 + worse, "ratio_low": 1 + 0.9 * worse, "ratio_high": 1 + 1.1 * worse}
    value = 20 * (1 + worse)
    bounds = {"value": value, "low": value - 1, "high": value + 1}
    task = {"kind": "perplexity", "metric": "perplexity", "items": 9} | bounds
    return {
        "label": label, "method": method, "ratio": None, "then": None, "seeds": [None], "plans": list(plans),
        "calibration": "embedded (samples 16)" if plans else None, "commits": ["c0ffee"], "dirty": method == "hc_smoe",
        "stored": unique, "unique": unique, "active": unique / 3, "tasks": {"perplexity_wiki": task},
        "perplexity": bounds | ratio,
        "accuracy": {"value": 0.7 - worse, "low": 0.6 - worse, "high": 0.8 - worse} | paired,
    }  # fmt: skip


def table(lines: list[dict[str, Any]], baseline: str | None = "full", **changes: Any) -> dict[str, Any]:
    return {
        "format": "espalier.table/1", "experiment": "demo",
        "model": {"id": "embedded:moe <&>", "revision": "sha256:12"},
        "baseline": baseline, "baselines": {} if baseline is None else {one["label"]: baseline for one in lines},
        "compare": None, "task_order": ["perplexity_wiki"],
        "tasks": {"perplexity_wiki": {"kind": "perplexity", "metric": "perplexity", "items": 9}},
        "summary": lines, "tidy": [],
        "runs": [{"commit": "c0ffee", "dirty": True, "versions": {"torch": "2.13.0"}, "device": "CPU", "runtime": {}}],
    } | changes  # fmt: skip


def usage() -> Stats:
    counts = np.random.default_rng(0).integers(1, 50, (len(LAYERS), EXPERTS))
    arrays = {("usage", layer): {"counts": own} for layer, own in zip(LAYERS, counts, strict=True)}
    return Stats(SHAPE, (64,), arrays)


def material(suffix: str = "", model: str = "embedded:moe <&>") -> Material:
    """Three lines: uncompressed, pruned with a rule of skipping, merged; names end in `suffix`."""
    full, reap, merged = (name + suffix for name in ("full", "reap 33 %", "hc_smoe 33 %"))
    summary = [
        line(full, "none", 5e6, 0), line(reap, "reap", 4e6, 0.1, ["a"]), line(merged, "hc_smoe", 4e6, 0.2, ["b"]),
    ]  # fmt: skip
    summary[1] |= {phase: {"value": 0.8, "low": 0.7, "high": 0.9, "ideal": 0.6} for phase in ("prefill", "decode")}
    curve = Curve(reap, "router_lm", "tokens", (10.0, 20.0, 30.0), {"lm": (3.0, 2.0, 1.5)})
    layered = [Curve(merged, "router_layerwise", "tokens", (1.0, 2.0), {"loss": (2.0, 1.0)}, n) for n in LAYERS]
    active = {"tokens": 99, "experts_per_token": {"0": 2.0, "2": 1.4}}
    distances = {layer: squareform(pdist(points(layer))) for layer in LAYERS}
    node = {"id": "0123456789ab", "stage": "score", "config": {"tasks": [{"task": "perplexity_wiki"}]}, "label": merged}
    step = Step(node, "espalier score 0123456789ab", {"commit": "c0ffee", "dirty": False, "seconds": 2.0})
    command = "espalier run demo 'sweep=[{method:reap}]'"
    return Material(
        table=table(summary, full, model={"id": model, "revision": "sha256:12"}, experiment=f"demo{suffix}"),
        lines=(
            Line(full),
            Line(reap, (keep_plan(),), active, curves=(curve,)),
            Line(merged, (merge_plan(),), distances=distances, curves=tuple(layered)),
        ),
        stats=[usage()],
        shape=SHAPE,
        command=f"espalier run demo{suffix}",
        made=tuple(Made(label, label, (step,), command) for label in (full, reap, merged)),
    )


def write(path: Path, content: Material) -> Path:
    from espalier.report import make_report

    return make_report(content, path)
