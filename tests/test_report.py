"""Reports: self-contained, complete, readable without the pictures."""

import math
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy.cluster.hierarchy import fcluster, linkage

from espalier import plots
from espalier.operations import Keep, Merge, Skip
from espalier.plan import Plan
from espalier.report import make_report
from espalier.shape import ModelShape
from espalier.stats import Stats
from espalier.store import write_json

EXPERTS, LAYERS = 6, (0, 2)
SHAPE = ModelShape("olmoe", LAYERS, EXPERTS, 2, 8, 4, True, 96, 8, 2000)


def keep_plan() -> Plan:
    return Plan({"name": "reap", "ratio": 1 / 3}, {0: (Keep((0, 1, 3, 4)),), 2: (Keep((1, 2, 3, 5)), Skip(0.5))})


def merge_plan(clusters: int = 4) -> Plan:
    layers, evidence = {}, {}
    for layer in LAYERS:
        points = np.random.default_rng(layer).normal(size=(EXPERTS, 3))
        merges = linkage(points, "average")
        labels = fcluster(merges, clusters, "maxclust")
        groups = sorted(tuple(int(e) for e in np.flatnonzero(labels == label)) for label in np.unique(labels))
        weights = tuple(tuple(1 / len(group) for _ in group) for group in groups)
        layers[layer] = (Merge(tuple(groups), weights),)
        evidence[layer] = {"linkage": merges.tolist()}
    return Plan({"name": "hc_smoe"}, layers, evidence)


def line(label: str, method: str, unique: float, worse: float, plans: list[str]) -> dict[str, Any]:
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
        "label": label, "method": method, "ratio": None, "then": None, "seeds": [None], "plans": plans,
        "calibration": "embedded (samples 16)" if plans else None, "commit": "c0ffee", "dirty": method == "hc_smoe",
        "stored": unique, "unique": unique, "active": unique / 3, "tasks": {"perplexity_wiki": task},
        "perplexity": bounds | ratio,
        "accuracy": {"value": 0.7 - worse, "low": 0.6 - worse, "high": 0.8 - worse} | paired,
    }  # fmt: skip


def write_table(path: Path, lines: list[dict[str, Any]], baseline: str | None = "full") -> Path:
    document = {
        "format": "espalier.table/1", "experiment": "demo",
        "model": {"id": "embedded:moe <&>", "revision": "sha256:12"},
        "baseline": baseline, "compare": None, "task_order": ["perplexity_wiki"],
        "tasks": {"perplexity_wiki": {"kind": "perplexity", "metric": "perplexity", "items": 9}},
        "summary": lines, "tidy": [],
        "runs": [{"commit": "c0ffee", "dirty": True, "versions": {"torch": "2.13.0"}, "device": "CPU", "runtime": {}}],
    }  # fmt: skip
    write_json(path, document)
    return path


@pytest.fixture
def report(tmp_path: Path) -> Path:
    lines = [
        line("full", "none", 5e6, 0, []),
        line("reap 33 %", "reap", 4e6, 0.1, ["plan-a"]),
        line("hc_smoe 33 %", "hc_smoe", 4e6, 0.2, ["plan-b"]),
    ]
    plans = {"plan-a": tmp_path / "a.json", "plan-b": tmp_path / "b.json"}
    keep_plan().save(plans["plan-a"])
    merge_plan().save(plans["plan-b"])
    counts = np.random.default_rng(0).integers(1, 50, (len(LAYERS), EXPERTS))
    stats = Stats(SHAPE, (64,), {("usage", layer): {"counts": c} for layer, c in zip(LAYERS, counts, strict=True)})
    return make_report(write_table(tmp_path / "table.json", lines), plans, [stats], tmp_path / "reports" / "abc.html")


class Reader(HTMLParser):
    """Collects tags, attributes and text; checks that tags close in order."""

    VOID = ("meta", "link", "img", "br", "hr", "input")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text())
    assert reader.open == []
    return reader


def test_report_needs_nothing_from_outside(report: Path) -> None:
    for tag, attributes in read(report).tags:
        assert tag not in ("script", "link", "iframe", "base")
        for key in ("src", "href", "xlink:href"):
            value = attributes.get(key) or ""
            assert value == "" or value.startswith(("#", "data:image/png;base64,"))
    outside = set(re.findall(r"url\((?!#)[^)]*\)|@import[^;]*", report.read_text()))
    assert outside == set()


def test_report_says_what_was_measured_and_how(report: Path) -> None:
    reader = read(report)
    text = " ".join(reader.text)
    for said in (
        "hc_smoe 33 % †",
        "reap 33 %",
        "22.00",
        "espalier run demo",
        "c0ffee with uncommitted changes",
        "torch 2.13.0",
        "embedded (samples 16)",
        "embedded:moe <&>",
        "Cluster trees: hc_smoe 33 %",
    ):
        assert said in text
    assert "reproduc" not in text.lower()


def test_every_figure_has_a_text_and_a_caption(report: Path) -> None:
    reader = read(report)
    pictures = [attributes for tag, attributes in reader.tags if tag == "svg"]
    captions = [tag for tag, _ in reader.tags if tag == "figcaption"]
    assert len(pictures) == len(captions) == 4
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in pictures)
    assert "reap 33 %: 4.00 million unique parameters, perplexity 22.00" in str(pictures[0]["aria-label"])
    ids = [attributes["id"] for tag, attributes in reader.tags if tag == "section"]
    links = [attributes["href"] for tag, attributes in reader.tags if tag == "a"]
    assert links == [f"#{id}" for id in ids]


def test_figures_are_saved_beside_for_papers(report: Path) -> None:
    saved = sorted(path.name for path in report.with_suffix("").iterdir())
    assert saved == ["decisions.svg", "quality.svg", "trees-1.svg", "usage.svg"]
    for name in saved:
        assert ElementTree.parse(report.with_suffix("") / name).getroot().tag.endswith("svg")


def test_report_of_a_dense_model_has_no_expert_sections(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.json", [line("full", "none", 1e8, 0, [])])
    reader = read(make_report(table, {}, [], tmp_path / "r.html"))
    ids = [attributes["id"] for tag, attributes in reader.tags if tag == "section"]
    assert ids == ["results", "read", "quality", "made"]


def test_report_without_a_baseline_is_made(tmp_path: Path) -> None:
    lines = [line("reap 33 %", "reap", 4e6, 0, []), line("naee 33 %", "naee", 4e6, 0, [])]
    table = write_table(tmp_path / "t.json", lines, baseline=None)
    assert make_report(table, {}, [], tmp_path / "r.html").exists()


def test_equal_inputs_make_equal_reports(report: Path, tmp_path: Path) -> None:
    plans = {"plan-a": tmp_path / "a.json", "plan-b": tmp_path / "b.json"}
    one = make_report(tmp_path / "table.json", plans, [], tmp_path / "one.html")
    two = make_report(tmp_path / "table.json", plans, [], tmp_path / "two.html")
    assert one.read_bytes() == two.read_bytes()


def test_decision_matrix_marks_removed_kept_and_merged() -> None:
    found = plots.decision_matrix(keep_plan(), EXPERTS)
    assert found is not None
    assert found[0] == [0, 2]
    assert found[1].tolist() == [[0, 0, -1, 0, 0, -1], [-1, 0, 0, 0, -1, 0]]
    groups = ((0, 4), (1,), (2, 3), (5,))
    merge = Plan({}, {0: (Merge(groups, ((0.5, 0.5), (1.0,), (0.5, 0.5), (1.0,))),)})
    found = plots.decision_matrix(merge, EXPERTS)
    assert found is not None
    assert found[1].tolist() == [[1, 0, 2, 2, 1, 0]]
    assert plots.decision_matrix(Plan({}, {0: (Skip(0.4),)}), EXPERTS) is None


def test_trees_are_cut_between_the_last_merge_done_and_the_first_left_out() -> None:
    plan = merge_plan()
    figure = plots.trees(plan)
    assert figure is not None
    for axes, layer in zip(figure.axes, LAYERS, strict=True):
        heights = sorted(row[2] for row in plan.evidence[layer]["linkage"])
        (cut,) = {y for drawn in axes.lines for y in drawn.get_ydata()}
        assert heights[1] < cut < heights[2]  # 6 experts in 4 groups: two merges
    assert plots.trees(keep_plan()) is None
    # With a budget over all layers one may keep every expert: it has a tree and no merge.
    whole = replace(plan, layers={LAYERS[0]: plan.layers[LAYERS[0]]})
    figure = plots.trees(whole)
    assert figure is not None
    assert [axes.get_title(loc="left").partition(": ")[2] for axes in figure.axes] == [
        "6 experts, 4 groups",
        "6 experts, 6 groups",
    ]


def test_error_bars_are_those_of_the_paired_comparison() -> None:
    lines = [line("full", "none", 5e6, 0, []), line("reap 33 %", "reap", 4e6, 0.1, [])]
    figure = plots.quality(lines, "full")
    assert figure is not None
    bars = figure.axes[0].containers[0].get_children()[-1].get_segments()[0]
    assert bars[:, 1].tolist() == pytest.approx([20 * 1.09, 20 * 1.11])
    bars = figure.axes[1].containers[0].get_children()[-1].get_segments()[0]
    assert bars[:, 1].tolist() == pytest.approx([59.0, 61.0])  # 70 - 10 -+ 1


def test_marks_on_a_logarithmic_axis_lie_within_it() -> None:
    for low, high in ((3.0, 400.0), (21.0, 90.0)):
        ticks = plots._log_ticks(low, high)
        assert len(ticks) >= 2
        assert all(0.9 * low <= tick <= 1.1 * high for tick in ticks)
        assert ticks == sorted(ticks)
    assert math.isclose(plots._log_ticks(1, 10)[0], 1)


def test_dense_methods_are_drawn_over_the_parameters_that_a_token_uses() -> None:
    lines = [line("dense", "none", 5e6, 0, []), line("dsmoe", "dsmoe", 5e6, 0.1, [])]
    for each, active in zip(lines, (5e6, 3e6), strict=True):
        each |= {"active": active, "ffn": active / 5e6}
    figure = plots.quality(lines, "dense")
    assert figure is not None
    assert figure.axes[0].get_xlabel() == "active parameters, millions"
    assert figure.axes[0].containers[0].lines[0].get_xdata().tolist() == pytest.approx([3.0])


def test_wide_ranges_are_marked_by_decades() -> None:
    assert plots._log_ticks(16.0, 2.3e6) == [1e2, 1e3, 1e4, 1e5, 1e6]


def test_reports_import_no_torch() -> None:
    code = "import sys, espalier.report; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
