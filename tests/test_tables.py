"""Intervals against closed forms and bootstraps; tables of a made-up store with known answers."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from espalier.artefacts.store import Node, Store, read_json, run_record_path, write_json
from espalier.errors import UserError
from espalier.scoring import intervals
from espalier.scoring.samples import save_scores
from espalier.tables.renderings import markdown
from espalier.tables.table import load_table, make_table

DOMAINS = {"perplexity_wiki": 30, "perplexity_code": 12}
CHOICES = {"cloze_wiki": 80, "maths_choice": 50}


# ---- intervals


def bootstrap(values: np.ndarray, weights: np.ndarray, draws: int = 4000) -> float:
    """Standard error of sum(values) / sum(weights) by drawing items with replacement."""
    generator = np.random.default_rng(0)
    index = generator.integers(len(values), size=(draws, len(values)))
    return float((values[index].sum(1) / weights[index].sum(1)).std())


def test_mean_is_the_textbooks() -> None:
    found = intervals.estimate([1.0, 0.0, 1.0, 1.0])
    assert found.value == 0.75
    assert found.variance == pytest.approx(np.var([1, 0, 1, 1], ddof=1) / 4)
    assert found.interval()[1] == pytest.approx(0.75 + 3.182446 * 0.25)  # t(0.975, 3 degrees)


def test_ratio_agrees_with_the_bootstrap() -> None:
    generator = np.random.default_rng(1)
    tokens = generator.integers(20, 400, 80).astype(float)
    nll = tokens * generator.normal(3, 0.5, 80)
    found = intervals.estimate(nll, tokens)
    assert found.value == pytest.approx(nll.sum() / tokens.sum())
    assert found.error == pytest.approx(bootstrap(nll, tokens), rel=0.1)


def test_paired_difference_agrees_with_the_bootstrap_and_is_narrower() -> None:
    generator = np.random.default_rng(2)
    hard = generator.random(300)
    first, second = ((hard + generator.normal(0, 0.2, 300)) < 0.6 for _ in range(2))
    difference = first.astype(float) - second.astype(float)
    found = intervals.estimate(difference)
    assert found.error == pytest.approx(bootstrap(difference, np.ones(300)), rel=0.1)
    apart = math.hypot(intervals.estimate(first).error, intervals.estimate(second).error)
    assert found.error < 0.8 * apart


def test_wilson_of_a_worked_example_and_at_the_edges() -> None:
    # Solve |p - 8/10| = z sqrt(p (1 - p) / 10) for p, the interval's definition.
    low, high = intervals.wilson(8, 10)
    for p in (low, high):
        assert abs(p - 0.8) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / 10), rel=1e-5)
    assert intervals.wilson(0, 20)[0] == 0
    assert intervals.wilson(20, 20)[1] == 1


def test_one_item_has_no_interval() -> None:
    assert all(math.isnan(x) for x in intervals.estimate([0.5]).interval())


def test_equal_seeds_add_nothing_but_their_items() -> None:
    values = np.random.default_rng(3).random(40)
    once, thrice = intervals.estimate(values), intervals.estimate(np.stack([values] * 3))
    assert thrice.variance == pytest.approx(once.variance)


def test_seeds_add_their_variance() -> None:
    items = np.random.default_rng(4).normal(0, 1, 50)
    shifts = np.array([0.0, 2.0, 4.0])
    found = intervals.estimate(items[None] + shifts[:, None])
    assert found.variance == pytest.approx(items.var(ddof=1) / 50 + 4 / 3)
    assert 2 < found.freedom < 52  # Welch-Satterthwaite lies between the parts' and their sum


def test_mean_of_independent_estimates() -> None:
    parts = [intervals.estimate(np.random.default_rng(n).normal(n, 1, 30)) for n in range(4)]
    found = intervals.mean(parts)
    assert found.value == pytest.approx(np.mean([p.value for p in parts]))
    assert found.variance == pytest.approx(sum(p.variance for p in parts) / 16)
    assert intervals.mean_over_seeds([parts]) == found


def coverage(draw: Any, truth: float, trials: int = 400) -> float:
    generator = np.random.default_rng(5)
    hits = 0
    for _ in range(trials):
        low, high = draw(generator)
        hits += low <= truth <= high
    return hits / trials


def test_intervals_cover_the_truth() -> None:
    def proportion(g: np.random.Generator) -> tuple[float, float]:
        return intervals.accuracy_interval((g.random(100) < 0.7).astype(float))[1:]

    def paired(g: np.random.Generator) -> tuple[float, float]:
        hard = g.random(100)
        return intervals.estimate((hard < 0.6).astype(float) - (hard + g.normal(0, 0.1, 100) < 0.5)).interval()

    def perplexity(g: np.random.Generator) -> tuple[float, float]:
        tokens = g.integers(50, 500, 60)
        level = g.normal(3.0, 0.3, 60)
        return intervals.estimate(tokens * level, tokens).exp()[1:]

    def seeds(g: np.random.Generator) -> tuple[float, float]:
        crossed = g.normal(0, 1, 60)[None] + g.normal(0, 0.3, 5)[:, None] + g.normal(0, 0.5, (5, 60))
        return intervals.estimate(crossed).interval()

    many = np.random.default_rng(6)
    hard = many.random(2_000_000)
    difference = float((hard < 0.6).mean() - (hard + many.normal(0, 0.1, hard.size) < 0.5).mean())
    assert 0.9 <= coverage(proportion, 0.7) <= 0.99
    assert 0.9 <= coverage(paired, difference) <= 0.99
    assert 0.9 <= coverage(perplexity, math.exp(3.0)) <= 0.99
    assert 0.9 <= coverage(seeds, 0.0) <= 0.99


# ---- tables


class Made:
    """A store with one fetched model and scored rows, and what was put into it."""

    def __init__(self, root: Path) -> None:
        self.store = Store(root)
        self.fetch = Node("fetch", {"id": "org/Tiny-MoE", "revision": "abc"})
        self.store.write_node(self.fetch)
        self.rows: list[dict[str, Any]] = []
        self.samples: list[pd.DataFrame] = []

    def add(
        self, label: str, method: str = "none", ratio: float | None = None, seed: int | None = None, worse: float = 0.0,
        dirty: bool = False, items: int | None = None, commit: str = "f" * 40,
    ) -> None:  # fmt: skip
        """Score one row; `worse` raises nll per token and the rate of wrong answers."""
        number = len(self.rows)
        weights, plan = self.fetch.id, None
        if method != "none":
            plan_node = Node("plan", {"name": method, "n": number}, (self.fetch.id,))
            apply_node = Node("apply", {}, (self.fetch.id, plan_node.id))
            self.store.write_node(plan_node)
            self.store.write_node(apply_node)
            weights, plan = apply_node.id, plan_node.id
        score = Node("score", {"n": number}, (weights,))
        self.store.write_node(score)
        scores, results, frames = {}, {}, []
        for task, count in (DOMAINS | CHOICES).items():
            count = min(count, items or count)
            node = Node("task", {"task": task}, (weights,), made_by=score.id)
            self.store.write_node(node)
            scores[task] = node.id
            frame = self._frame(task, count, number, worse)
            frames.append(frame)
            if task in DOMAINS:
                results[task] = {"kind": "perplexity", "metric": "perplexity", "bits_per_byte": 1.5, "items": count}
                results[task]["value"] = math.exp(frame.nll.sum() / frame.tokens.sum())
            else:
                results[task] = {"kind": "choice", "metric": "acc_mutual_info", "items": count}
                results[task] |= {"value": frame.correct.mean(), "metrics": {"acc_mutual_info": 0.0, "acc": 0.0}}
        path = self.store.path(score.id)
        document = {
            "format": "espalier.scores/1",
            "tasks": results,
            "active": {"tokens": 100, "parameters": 1.6e6 - 1e5 * worse, "experts_per_token": {}},
            "parameters": {"stored": 5.7e6, "unique": 5.7e6, "experts": 16},
        }
        self.samples.append(pd.concat(frames, ignore_index=True))
        save_scores(path, document, self.samples[-1])
        record = {"format": "espalier.run/1", "commit": commit, "dirty": dirty, "versions": {"torch": "2"}}
        write_json(run_record_path(path), record)
        self.rows.append(
            {"label": label, "model": self.fetch.id, "method": method, "ratio": ratio, "then": None, "seed": seed,
             "share": None if ratio is None else 1 - ratio, "plan": plan, "weights": weights, "scores": scores,
             "published": [{"model": "org/Tiny-MoE", "ratio": ratio}]}
        )  # fmt: skip

    def ask(self, **settings: Any) -> None:
        """Let the tasks of the last row have been scored with other settings."""
        scores = self.rows[-1]["scores"]
        for task, id in scores.items():
            old = self.store.read_node(id)
            node = Node("task", old["config"] | settings, tuple(old["parents"]), made_by=old["made_by"])
            self.store.write_node(node)
            scores[task] = node.id

    def _frame(self, task: str, count: int, number: int, worse: float) -> pd.DataFrame:
        items = np.random.default_rng(len(task))  # what an item is like does not depend on the row
        own = np.random.default_rng(1000 + number)
        frame = pd.DataFrame({"task": task, "item": [f"{task}/{n}" for n in range(count)]})
        if task in DOMAINS:
            tokens = items.integers(30, 300, count)
            noise = own.normal(0, 0.02, count) if worse else np.zeros(count)
            nll = tokens * (items.normal(3, 0.4, count) + worse + noise)
            return frame.assign(nll=nll, tokens=tokens, bytes=4 * tokens)
        right = (items.random(count) + worse * own.random(count) < 0.7).astype(float)
        return frame.assign(acc_mutual_info=right, acc=right, correct=right)

    def table(self, **changes: Any) -> Any:
        return make_table(
            {"experiment": "made", "scale": "full", "rows": self.rows, "compare": None} | changes, self.store
        )


@pytest.fixture
def made(tmp_path: Path) -> Made:
    made = Made(tmp_path)
    made.add("full")
    made.add("reap 25 %", "reap", 0.25, worse=0.2)
    for seed in range(3):
        made.add("random 25 %", "random", 0.25, seed, worse=0.5 + 0.1 * seed)
    return made


def test_the_commits_of_all_seeds_are_named(made: Made) -> None:
    for seed, commit in ((3, "a" * 40), (4, "b" * 40)):
        made.add("random 25 %", "random", 0.25, seed, worse=0.5, commit=commit)
    table = made.table()
    line = next(line for line in table.document["summary"] if line["label"] == "random 25 %")
    assert line["commits"] == ["f" * 40, "a" * 40, "b" * 40]
    assert f"Made at commit {'f' * 12}, {'a' * 12}, {'b' * 12}." in markdown(table.document)


def test_tidy_has_a_row_a_seed_task_and_metric(made: Made) -> None:
    tidy = made.table().tidy
    assert len(tidy) == 5 * (2 * 2 + 2 * 2)  # perplexity and bits per byte; both accuracies
    frame = made.samples[1]
    reap = tidy[(tidy.label == "reap 25 %") & (tidy.metric == "perplexity")].set_index("task")
    for task, count in DOMAINS.items():
        rows, base = frame[frame.task == task], made.samples[0][made.samples[0].task == task]
        assert reap.loc[task].value == pytest.approx(math.exp(rows.nll.sum() / rows.tokens.sum()))
        ratio = math.exp((rows.nll.sum() - base.nll.sum()) / rows.tokens.sum())
        assert reap.loc[task].delta == pytest.approx(ratio - 1)
        assert reap.loc[task, "items"] == count
        assert reap.loc[task].low < reap.loc[task].value < reap.loc[task].high
    full = tidy[tidy.label == "full"]
    assert full.delta.isna().all()
    assert tidy[tidy.label == "random 25 %"].seed.unique().tolist() == [0, 1, 2]


def test_summary_takes_geometric_and_arithmetic_means(made: Made) -> None:
    table = made.table()
    by_label = {line["label"]: line for line in table.summary}
    assert list(by_label) == ["full", "reap 25 %", "random 25 %"]
    full, reap = by_label["full"], by_label["reap 25 %"]
    for line, frame in ((full, made.samples[0]), (reap, made.samples[1])):
        logs = [frame[frame.task == t].nll.sum() / frame[frame.task == t].tokens.sum() for t in DOMAINS]
        assert line["perplexity"]["value"] == pytest.approx(math.exp(np.mean(logs)))
        rights = [frame[frame.task == task].correct.mean() for task in CHOICES]
        assert line["accuracy"]["value"] == pytest.approx(np.mean(rights))
    assert reap["perplexity"]["ratio"] == pytest.approx(reap["perplexity"]["value"] / full["perplexity"]["value"])
    assert reap["accuracy"]["delta"] == pytest.approx(reap["accuracy"]["value"] - full["accuracy"]["value"])
    assert full["perplexity"]["ratio"] is None
    # Pairing removes what makes a document hard: the ratio is known far better than either perplexity.
    width = math.log(reap["perplexity"]["ratio_high"] / reap["perplexity"]["ratio_low"])
    assert width < 0.2 * math.log(reap["perplexity"]["high"] / reap["perplexity"]["low"])


def test_seeds_become_one_line_with_a_wider_interval(made: Made) -> None:
    line = made.table().summary[2]
    assert line["seeds"] == [0, 1, 2]
    assert len(line["plans"]) == 3
    logs = []
    for frame in made.samples[2:]:
        logs.append(np.mean([frame[frame.task == t].nll.sum() / frame[frame.task == t].tokens.sum() for t in DOMAINS]))
    assert line["perplexity"]["value"] == pytest.approx(math.exp(np.mean(logs)))
    base = made.table().summary[0]["perplexity"]["value"]
    ratio = line["perplexity"]["value"] / base
    assert line["perplexity"]["ratio"] == pytest.approx(ratio)
    # At least the t interval over the three seeds.
    half = 4.302653 * np.std(logs, ddof=1) / math.sqrt(3)
    assert math.log(line["perplexity"]["ratio_high"] / ratio) >= 0.95 * half
    assert line["active"] == pytest.approx(1.6e6 - 1e5 * 0.6)


def test_other_items_than_the_baselines_are_refused(made: Made) -> None:
    made.add("short", "naee", 0.25, worse=0.1, items=10)
    with pytest.raises(UserError, match=r"scored on \d+ items for '\w+' and on \d+ "):
        made.table()


def test_files_hold_the_table_and_come_back(made: Made, tmp_path: Path) -> None:
    table = made.table()
    stem = tmp_path / "tables" / "abc"
    table.write(stem)
    read = load_table(stem.with_suffix(".json"))
    assert read["summary"] == json.loads(json.dumps(table.summary))
    assert len(read["tidy"]) == len(table.tidy)
    assert {key: read["model"][key] for key in ("id", "revision")} == {"id": "org/Tiny-MoE", "revision": "abc"}
    pd.testing.assert_frame_equal(pd.read_parquet(stem.with_suffix(".parquet")), table.tidy)
    assert len(pd.read_csv(stem.with_suffix(".csv"))) == len(table.tidy)


def test_markdown_columns_align_and_say_what_they_mean(made: Made, tmp_path: Path) -> None:
    made.add("naee 25 %", "naee", 0.25, worse=0.1, dirty=True)
    made.table().write(tmp_path / "t")
    text = (tmp_path / "t.md").read_text()
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(blocks) == 3  # means, tasks, pairs
    for block in blocks:
        assert len({len(line) for line in block}) == 1
    assert [len(block) for block in blocks] == [2 + 4, 2 + 4, 2 + 2]  # of one share, by accuracy and perplexity
    assert "| naee 25 % † |" in text
    assert "uncommitted changes" in text
    assert "reproduc" not in text.lower()


def test_clean_rows_print_no_dagger(made: Made, tmp_path: Path) -> None:
    made.table().write(tmp_path / "t")
    assert "†" not in (tmp_path / "t.md").read_text()


def test_latex_has_a_cell_for_each_column(made: Made, tmp_path: Path) -> None:
    made.table().write(tmp_path / "t")
    lines = (tmp_path / "t.tex").read_text().splitlines()
    columns = next(line for line in lines if "begin{tabular}" in line).split("{")[-1].rstrip("}")
    body = lines[lines.index(r"    \midrule") + 1 : lines.index(r"    \bottomrule")]
    assert len(body) == 3
    for line in body:
        assert line.count("&") == len(columns) - 1
        assert line.endswith(r"\\")
    assert r"reap 25 \%" in body[1]


PUBLISHED = """paper,table,model,setting,method,task,metric,value,calibration,source,note
made,Table 2,org2/Tiny-MoE,experts=16,baseline,maths_choice,acc_mutual_info,70.5,,text,
made,Table 2,org2/Tiny-MoE,experts=12,REAP,perplexity_wiki,perplexity,25.5,C4,text,
made,Table 2,org2/Tiny-MoE,experts=12,REAP,avg2,acc_mutual_info,61.0,C4,text,inferred
made,Table 2,org2/Tiny-MoE,experts=12,REAP,avg,acc_mutual_info,99.0,C4,text,
made,Table 2,org2/Tiny-MoE,experts=12,REAP,cloze,not_stated,12.3,C4,text,
made,Table 2,org2/Tiny-MoE,experts=8,REAP,maths_choice,acc,1.0,C4,text,
made,Table 2,org2/Tiny-MoE,active=75%,Theirs,maths_choice,acc_mutual_info,2.5,C4,text,
made,Table 2,org2/Other,experts=12,REAP,maths_choice,acc,2.0,C4,text,
made,Table 3,org2/Tiny-MoE,experts=12,REAP,maths_choice,acc_mutual_info,3.0,C4,text,
"""


@pytest.fixture
def paper(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "paper.csv"
    path.write_text(PUBLISHED)
    return {"file": str(path), "sha256": "0", "table": "Table 2", "tasks": {"cloze": "cloze_wiki"}}


def test_published_numbers_stand_beside_ours(made: Made, paper: dict[str, Any], tmp_path: Path) -> None:
    table = made.table(compare=paper)
    full, reap, random = table.summary
    ours = full["tasks"]["maths_choice"]
    assert ours["published"] == pytest.approx(0.705)
    frame = made.samples[0][made.samples[0].task == "maths_choice"].correct
    error = frame.std(ddof=1) / math.sqrt(len(frame))
    assert ours["published_z"] == pytest.approx((frame.mean() - 0.705) / error)
    assert ours["beyond"] == (abs(frame.mean() - 0.705) > 2 * error)
    ours = reap["tasks"]["perplexity_wiki"]
    assert ours["published_delta"] == pytest.approx(ours["value"] - 25.5)
    # The error of a perplexity is its logarithm's: half of the interval over t, here of 29 degrees of freedom.
    error = math.log(ours["high"] / ours["low"]) / 2 / 2.04523
    assert ours["published_z"] == pytest.approx(math.log(ours["value"] / 25.5) / error, rel=1e-4)
    assert reap["accuracy"]["published"] == pytest.approx(0.61)  # a mean over as many tasks
    for line, task in ((reap, "maths_choice"), (reap, "cloze_wiki"), (random, "maths_choice")):
        assert "published" not in line["tasks"][task]  # another ratio, a metric that is not stated, another method
    tidy = table.tidy[(table.tidy.label == "reap 25 %") & (table.tidy.metric == "perplexity")].set_index("task")
    assert tidy.loc["perplexity_wiki"].published == 25.5
    assert tidy.loc["perplexity_wiki"].beyond == ours["beyond"]
    assert set(tidy.model) == {"org/Tiny-MoE"}
    assert tidy.stored.iloc[0] == 5.7e6


def test_what_a_paper_prints_is_in_every_rendering(made: Made, paper: dict[str, Any], tmp_path: Path) -> None:
    table = made.table(compare=paper)
    lines = {(line["method"], line["setting"]): line for line in table.document["published"]}
    assert [line["label"] for line in table.document["published"]] == ["full", "reap 25 %", None, None]
    cells = {cell["task"]: cell for cell in lines["REAP", "experts=12"]["cells"]}
    assert cells["avg"]["ours"] is None  # a mean over nobody knows how many tasks
    assert cells["cloze"]["ours"] is None
    assert cells["avg2"]["ours"]["delta"] == pytest.approx(table.summary[1]["accuracy"]["value"] - 0.61)
    table.write(tmp_path / "t")
    for suffix in (".md", ".tex", ".html"):
        text = (tmp_path / f"t{suffix}").read_text()
        for printed in ("70.5", "25.5", "61.0", "99.0", "12.3", "2.5"):
            assert printed in text, (suffix, printed)
        assert "Theirs" in text
        assert "inferred" in text
        assert "made Table 2 (text)" in text
        assert "reproduc" not in text.lower()
    text = (tmp_path / "t.md").read_text()
    assert re.search(r"\| Tiny-MoE: Theirs \(active=75%\) ‡ +\| +paper \|", text)
    assert re.search(r"\| full +\| +ours - paper \|", text)


@pytest.mark.parametrize(
    ("changes", "limit", "said"),
    [({"scale": "small"}, None, r"\(scale=small\)"), ({}, 50, "no more than 50 items")],
)
def test_small_and_limited_runs_reproduce_nothing(
    made: Made, paper: dict[str, Any], tmp_path: Path, changes: Any, limit: int | None, said: str
) -> None:
    for row in made.rows if limit else ():
        old = made.store.read_node(row["scores"]["maths_choice"])
        node = Node("task", old["config"] | {"limit": limit}, tuple(old["parents"]), made_by=old["made_by"])
        made.store.write_node(node)
        row["scores"]["maths_choice"] = node.id
    table = made.table(compare=paper, **changes)
    small = "scale" in changes
    assert table.tidy.published.isna().all() == small
    assert any("published" in found for line in table.summary for found in line["tasks"].values()) != small
    assert all(cell["ours"] is None for line in table.document["published"] for cell in line["cells"]) == small
    table.write(tmp_path / "t")
    for suffix in (".md", ".tex", ".html"):
        text = (tmp_path / f"t{suffix}").read_text()
        assert re.search(f"Not a reproduction.*{said}", text)
        assert "70.5" in text  # shown all the same
        assert ("ours - paper" in text) != small
    assert ("paper's model" in (tmp_path / "t.md").read_text()) == small


def test_models_of_a_table_have_their_own_baselines(made: Made, tmp_path: Path) -> None:
    first = made.fetch
    made.fetch = Node("fetch", {"id": "org/Larger-MoE", "revision": "def"})
    made.store.write_node(made.fetch)
    made.add("Larger: full")
    made.add("Larger: reap", "reap", 0.25, worse=0.1)
    table = made.table()
    by_label = {line["label"]: line for line in table.summary}
    assert table.document["baselines"]["Larger: reap"] == "Larger: full"
    assert table.document["baselines"]["reap 25 %"] == "full"
    ratio = by_label["Larger: reap"]["perplexity"]["value"] / by_label["Larger: full"]["perplexity"]["value"]
    assert by_label["Larger: reap"]["perplexity"]["ratio"] == pytest.approx(ratio)
    assert by_label["Larger: full"]["perplexity"]["ratio"] is None
    assert [model["id"] for model in table.document["models"]] == ["org/Tiny-MoE", "org/Larger-MoE"]
    assert {pair["model"] for pair in table.document["pairs"]} == {first.id}  # the other model has one method


def test_rows_are_compared_with_those_that_were_scored_as_they_were(made: Made, tmp_path: Path) -> None:
    made.add("naee 25 %", "naee", 0.25, worse=0.3)
    for label, method, worse in (("full 5-shot", "none", 0.05), ("reap 5-shot", "reap", 0.3)):
        made.add(label, method, 0.25 if worse > 0.1 else None, worse=worse)
        made.ask(num_fewshot=5)
    table = made.table()
    of_base = table.document["baselines"]
    assert {of_base[label] for label in ("full", "reap 25 %", "random 25 %", "naee 25 %")} == {"full"}
    assert {of_base[label] for label in ("full 5-shot", "reap 5-shot")} == {"full 5-shot"}
    by_label = {line["label"]: line for line in table.summary}
    full, reap = by_label["full 5-shot"], by_label["reap 5-shot"]
    assert full["accuracy"]["delta"] is full["perplexity"]["ratio"] is None
    assert reap["accuracy"]["delta"] == pytest.approx(reap["accuracy"]["value"] - full["accuracy"]["value"])
    assert reap["perplexity"]["ratio"] == pytest.approx(reap["perplexity"]["value"] / full["perplexity"]["value"])
    pairs = [(pair["first"], pair["second"]) for pair in table.document["pairs"] if pair["measure"] == "accuracy"]
    assert pairs == [("reap 25 %", "random 25 %"), ("reap 25 %", "naee 25 %"), ("random 25 %", "naee 25 %")]
    made.add("ean 5-shot", "ean", 0.25, worse=0.5)
    made.ask(num_fewshot=5)
    paired = made.table()
    pairs = [(pair["first"], pair["second"]) for pair in paired.document["pairs"] if pair["measure"] == "accuracy"]
    assert pairs[3:] == [("reap 5-shot", "ean 5-shot")]
    rows = [line for line in markdown(paired.document).splitlines() if line.startswith("| 75 %")]
    assert len(rows) == 4  # of each way of scoring both measures, with a best of its own
    assert ["5-shot" in row for row in rows] == [False, False, True, True]


def test_pairs_are_a_file_and_a_hostile_name_is_no_markup(made: Made, tmp_path: Path) -> None:
    made.add("<b>&naee_1", "naee", 0.25, worse=0.2)
    made.table().write(tmp_path / "t")
    frame = pd.read_csv(tmp_path / "t.pairs.csv")
    assert len(frame) == 2 * 3  # three methods of one share, by accuracy and perplexity
    assert set(frame["first"]) | set(frame["second"]) == {"reap 25 %", "random 25 %", "<b>&naee_1"}
    assert (frame.p_holm >= frame.p).all()
    page = (tmp_path / "t.html").read_text()
    assert "<b>" not in page
    assert "&lt;b&gt;&amp;naee_1" in page
    assert r"<b>\&naee\_1" in (tmp_path / "t.tex").read_text()


def test_published_file_without_a_needed_column_is_refused(made: Made, tmp_path: Path) -> None:
    path = tmp_path / "paper.csv"
    path.write_text("paper,label,task,value\na,b,c,1\n")
    with pytest.raises(UserError, match="column 'source' is missing"):
        made.table(compare={"file": str(path), "sha256": "0"})


def test_tables_without_a_baseline_have_no_differences(made: Made) -> None:
    table = made.table(rows=made.rows[1:])
    assert table.tidy.delta.isna().all()
    assert all(line["perplexity"]["ratio"] is None for line in table.summary)


def test_samples_that_cannot_be_read_are_named(made: Made) -> None:
    path = made.store.path(made.rows[1]["scores"]["maths_choice"])
    samples = path.with_suffix(".parquet")
    samples.write_bytes(samples.read_bytes()[:-20])
    with pytest.raises(UserError, match=rf"{samples.name}: cannot read it .*Delete {path.name} and run again"):
        made.table()


def test_a_single_item_gives_null_intervals(tmp_path: Path) -> None:
    made = Made(tmp_path)
    made.add("full", items=1)
    made.add("reap 25 %", "reap", 0.25, worse=0.2, items=1)
    made.table().write(tmp_path / "t")
    line = read_json(tmp_path / "t.json", "espalier.table/1")["summary"][1]
    assert line["perplexity"]["low"] is None


def test_divergences_neurons_and_times_stand_in_the_table(made: Made, tmp_path: Path) -> None:
    generator = np.random.default_rng(8)
    kl, times = [], []
    for number, row in enumerate(made.rows):
        score = made.store.read_node(made.store.read_node(row["scores"]["perplexity_wiki"])["made_by"])
        path = made.store.path(score)
        document = read_json(path, "espalier.scores/1")
        frame = pd.DataFrame({"task": "kl_wiki", "item": [str(n) for n in range(20)]})
        frame = frame.assign(kl=number * generator.random(20), tokens=np.arange(1, 21))
        kl.append(frame)
        document["tasks"]["kl_wiki"] = {"kind": "divergence", "metric": "kl", "value": 0.0, "items": 20}
        document["active"]["neurons"] = 30.0 if number else 60.0
        save_scores(path, document, pd.concat([made.samples[number], frame], ignore_index=True))
        task = Node("task", {"task": "kl_wiki"}, (row["weights"],), made_by=score["id"])
        made.store.write_node(task)
        row["scores"]["kl_wiki"] = task.id
        if number:
            node = Node("speed", {"n": number}, (row["weights"],))
            made.store.write_node(node)
            phase = {"ratios": [0.5, 0.6 + number / 10], "ideal": 0.4}
            times.append(phase["ratios"])
            path = made.store.path(made.store.read_node(node.id))
            write_json(path, {"format": "espalier.speed/1", "prefill": phase, "decode": phase})
            row["speed"] = node.id
    table = made.table()
    full, reap, drawn = table.summary
    assert full["kl"]["value"] == 0
    assert (full["ffn"], reap["ffn"], drawn["ffn"]) == (1.0, 0.5, 0.5)
    assert reap["kl"]["value"] == pytest.approx(kl[1].kl.sum() / kl[1].tokens.sum())
    each = [frame.kl.sum() / frame.tokens.sum() for frame in kl[2:]]
    assert drawn["tasks"]["kl_wiki"]["value"] == pytest.approx(np.mean(each))
    assert drawn["kl"]["low"] < drawn["kl"]["value"] < drawn["kl"]["high"]
    assert reap["decode"]["value"] == pytest.approx(math.sqrt(0.5 * 0.7))
    assert drawn["prefill"]["value"] == pytest.approx(math.exp(np.mean(np.log(times[1:]))))
    assert "decode" not in full
    assert (reap["timed"], drawn["timed"]) == (1, len(drawn["seeds"]))
    table.write(tmp_path / "t")
    assert "keys and values counted" not in (tmp_path / "t.md").read_text()
    lines = (tmp_path / "t.md").read_text().splitlines()
    header, _, first, second = (line.split("|")[1:-1] for line in lines[2:6])
    cells = dict(zip([name.strip() for name in header], [cell.strip() for cell in second], strict=True))
    assert cells["FFN %"] == "50.0"
    assert cells["KL [95 %]"].startswith(f"{reap['kl']['value']:.3f} [")
    assert cells["decode × [95 %] (ideal)"].endswith("(0.40)")
    assert dict(zip([n.strip() for n in header], [c.strip() for c in first], strict=True))["FFN %"] == "100.0"
    assert "KL wiki" in "\n".join(lines)


def test_a_line_may_be_timed_in_some_of_its_seeds(made: Made, tmp_path: Path) -> None:
    """Its times are those of the seeds that have some, and the legend says of how many they are."""
    drawn = [row for row in made.rows if row["label"] == made.rows[-1]["label"]]
    assert len(drawn) == 3
    node = Node("speed", {}, (drawn[0]["weights"],))
    made.store.write_node(node)
    phase = {"ratios": [0.5, 0.5], "ideal": 0.4}
    path = made.store.path(made.store.read_node(node.id))
    write_json(path, {"format": "espalier.speed/1", "prefill": phase, "decode": phase})
    drawn[0]["speed"] = node.id
    table = made.table()
    assert table.summary[-1]["timed"] == 1
    assert table.summary[-1]["prefill"]["value"] == pytest.approx(0.5)
    table.write(tmp_path / "t")
    assert "Timed, keys and values counted: 1 of 3 seeds." in (tmp_path / "t.md").read_text()


def test_tables_import_no_torch() -> None:
    code = "import sys, espalier.tables.table; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
