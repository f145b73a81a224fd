"""Experiments become nodes: sweeps crossed and zipped, shared parents, bundles that never move."""

from collections import Counter

import pytest

from espalier.artefacts.store import Store
from espalier.errors import UserError
from espalier.workflow import graph
from espalier.workflow.sweep import Composer, points


def stages(experiment):
    return Counter(node.stage for node in experiment.nodes)


def project(tmp_path, monkeypatch, sweep, name="mine", rest=""):
    """A copy of conf/ with one more experiment, as the working directory."""
    import shutil

    from espalier import conf

    if not (tmp_path / "conf").exists():
        shutil.copytree(conf.directory(), tmp_path / "conf")
    monkeypatch.chdir(tmp_path)
    text = f"# @package _global_\nevaluation: {{tasks: [perplexity_maths, maths_choice], limit: 4}}\n{rest}\nsweep:\n"
    (tmp_path / "conf/experiment" / f"{name}.yaml").write_text(text + "".join(f"  - {line}\n" for line in sweep))
    return Store(tmp_path / "results")


def test_points_cross_and_zip():
    sweep = [{"a": [1, 2], "b": ["x", "y"]}, {"c": 3, "zip": {"d": [4, 5], "e": [6, 7]}}, {}]
    assert list(points(sweep)) == [
        {"a": 1, "b": "x"},
        {"a": 1, "b": "y"},
        {"a": 2, "b": "x"},
        {"a": 2, "b": "y"},
        {"c": 3, "d": 4, "e": 6},
        {"c": 3, "d": 5, "e": 7},
        {},
    ]


def test_zip_needs_equal_lengths():
    with pytest.raises(UserError, match=r"'d': 2, 'e': 1"):
        list(points([{"zip": {"d": [4, 5], "e": [6]}}]))


def labels(name, store, *overrides):
    nodes = graph.expand(name, overrides, store).nodes
    return [row["label"] for row in next(node for node in nodes if node.stage == "table").config["rows"]]


def test_cases_have_axes_of_their_own_that_are_crossed_with_the_rest():
    cases = [
        {"a": [1, 2]},
        {"a": 3, "zip": {"b": [4, 5], "c": [6, 7]}},
        {"a": 8, "cases": [{"b": 1}, {"b": 2, "c": 3}]},
    ]
    assert list(points([{"d": ["x", "y"], "cases": cases}])) == [
        {"d": d} | rest
        for d in ("x", "y")
        for rest in (
            {"a": 1},
            {"a": 2},
            {"a": 3, "b": 4, "c": 6},
            {"a": 3, "b": 5, "c": 7},
            {"a": 8, "b": 1},
            {"a": 8, "b": 2, "c": 3},
        )
    ]


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"a": [1], "cases": [{"a": 2}]}, "'a' is given twice in one block"),
        ({"a": 1, "zip": {"a": [2]}}, "'a' is given twice in one block"),
        ({"a": []}, "'a' has no value"),
        ({"cases": {"a": 1}}, "sweep.cases: .* is not a list of blocks"),
        ({"cases": [1]}, "sweep.cases: 1 is not a mapping"),
        ({"zip": [1]}, "sweep.zip: .* is not a mapping"),
        ([1], r"sweep: \[1\] is not a mapping"),
    ],
)
def test_a_block_that_means_nothing_is_refused(block, message):
    with pytest.raises(UserError, match=message):
        list(points([block]))


def test_values_have_names_that_stand_in_the_rows(tmp_path, monkeypatch):
    layers = "{early: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], late: [20, 21]}"
    sweep = [
        f"{{method: layer_drop, method.layers: {layers}}}",
        f"{{as: dropped, method: layer_drop, zip: {{method.layers: {layers}, method.granularity: [block, ffn]}}}}",
        "{method: layer_drop, method.layers: [[1, 2], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]]}",
        "{as: both, cases: [{method: reap, method.ratio: [0.25, 0.5]}, {as: merged, method: hc_smoe}]}",
        "{method: {ours: reap}, method.ratio: {half: 0.5}, calibration: {w: embedded_wiki}}",
    ]
    store = project(tmp_path, monkeypatch, sweep)
    path = tmp_path / "conf/experiment/mine.yaml"
    path.write_text(path.read_text().replace("\n", "\ndefaults: [override /model: mixtral_8x7b]\n", 1))
    nodes = graph.expand("mine", [], store).nodes
    assert [row["label"] for row in next(node for node in nodes if node.stage == "table").config["rows"]] == [
        "layer_drop layers=early",
        "layer_drop layers=late",
        "dropped layers=early granularity=block",
        "dropped layers=late granularity=ffn",
        "layer_drop layers=[1, 2]",
        "layer_drop layers=[1, ...12]",
        "both method=reap ratio=0.25",
        "both method=reap ratio=0.5",
        "both merged",
        "ours half calibration=w",
    ]
    plans = {node.label: node.config for node in nodes if node.stage == "plan"}
    assert plans["layer_drop layers=early"]["layers"] == list(range(1, 13))
    assert plans["dropped layers=late granularity=ffn"]["layers"] == [20, 21]


@pytest.mark.parametrize(
    ("sweep", "differ"),
    [
        (["{as: ours, method: reap}", "{as: ours, method: hc_smoe}"], "method"),
        (["{method: reap, method.ratio: {same: 0.25}}", "{method: reap, method.ratio: {same: 0.5}}"], "method.ratio"),
        (["{as: ours, method: random, method.seed: [0, 1]}", "{as: ours, method: random, calibration: embedded_wiki}"],
         "calibration"),
    ],
)  # fmt: skip
def test_rows_of_one_name_differ_in_seeds_alone(tmp_path, monkeypatch, sweep, differ):
    store = project(tmp_path, monkeypatch, sweep)
    with pytest.raises(UserError, match=rf"two rows are called '.*' and differ in {differ}\. ") as caught:
        graph.expand("mine", [], store)
    assert "\n" not in str(caught.value)
    same = ["{method: reap, method.ratio: 0.5}", "{as: reap 50 %, method: reap}"]  # one row said twice
    store = project(tmp_path, monkeypatch, same)
    assert labels("mine", store) == ["reap 50 %"]


def test_calibration_is_shared_over_methods_and_ratios(tmp_path, monkeypatch):
    sweep = ["method: none", "{method: [reap, frequency, hc_smoe], method.ratio: [0.25, 0.5]}"]
    store = project(tmp_path, monkeypatch, sweep)
    experiment = graph.expand("mine", [], store)
    found = stages(experiment)
    assert (found["fetch"], found["tokens"], found["plan"], found["apply"]) == (1, 1, 6, 6)
    assert found["task"] == 7 * 2
    graph.save(experiment, store)
    written = Counter(store.read_node(path.stem)["stage"] for path in (tmp_path / "results/nodes").iterdir())
    assert (written["collect"], written["score"]) == (1, 7)  # one forward pass, one process a checkpoint


def test_every_composed_value_reaches_its_node(tmp_path, monkeypatch):
    store = project(tmp_path, monkeypatch, ["{method: hc_smoe, method.linkage: [single, ward], method.ratio: 0.5}"])
    plans = [node for node in graph.expand("mine", [], store).nodes if node.stage == "plan"]
    assert [plan.config["linkage"] for plan in plans] == ["single", "ward"]
    assert [plan.label for plan in plans] == ["hc_smoe 50 % linkage=single", "hc_smoe 50 % linkage=ward"]


def test_skipping_after_pruning_observes_the_pruned_model(tmp_path, monkeypatch):
    store = project(tmp_path, monkeypatch, ["{method: naee, method.ratio: 0.5, method@then: naee_skip}"])
    nodes = {node.id: node for node in graph.expand("mine", [], store).nodes}
    first, second = [node for node in nodes.values() if node.stage == "apply"]
    (probe,) = [n for n in nodes.values() if n.stage == "probe" and n.config["probe"] == "routing"]
    assert first.id in probe.parents
    assert second.parents[0] == first.id


def test_a_new_method_leaves_probes_with_the_node_that_made_them(tmp_path, monkeypatch):
    store = project(tmp_path, monkeypatch, ["{method: reap, method.ratio: 0.5}"])
    graph.save(graph.expand("mine", [], store), store)
    before = {path.name: path.read_bytes() for path in (tmp_path / "results/nodes").iterdir()}
    project(tmp_path, monkeypatch, ["{method: [reap, hc_smoe, naee_skip], method.ratio: 0.5}"], "more")
    (tmp_path / "conf/experiment/more.yaml").write_text(
        (tmp_path / "conf/experiment/mine.yaml").read_text() + "  - {method: hc_smoe, method.ratio: 0.5}\n"
    )
    graph.save(graph.expand("more", [], store), store)
    after = {path.name: path.read_bytes() for path in (tmp_path / "results/nodes").iterdir()}
    assert {name: after[name] for name in before} == before
    fresh = [store.read_node(name.removesuffix(".json")) for name in set(after) - set(before)]
    (collect,) = [node for node in fresh if node["stage"] == "collect"]
    assert collect["config"]["probes"] == ["mean_output"]


def test_runtime_and_tracking_change_no_id(tmp_path, monkeypatch):
    store = project(tmp_path, monkeypatch, ["{method: reap, method.ratio: 0.5}"])
    plain = graph.expand("mine", [], store)
    other = graph.expand("mine", ["runtime.collect_batch_size=1", "tracking=offline"], store)
    assert [node.id for node in plain.nodes] == [node.id for node in other.nodes]
    assert graph.save_run(plain, store) != graph.save_run(other, store)


def test_a_path_is_a_calibration(tmp_path, monkeypatch):
    (tmp_path / "my.safetensors").write_bytes(b"tokens")
    store = project(tmp_path, monkeypatch, ["{method: reap, method.ratio: 0.5}"])
    experiment = graph.expand("mine", ["calibration=my.safetensors"], store)
    (tokens,) = [node for node in experiment.nodes if node.stage == "tokens"]
    assert tokens.config["path"] == str(tmp_path / "my.safetensors")
    (tmp_path / "my.safetensors").write_bytes(b"other tokens")
    (changed,) = [n for n in graph.expand("mine", ["calibration=my.safetensors"], store).nodes if n.stage == "tokens"]
    assert changed.id != tokens.id


@pytest.mark.parametrize(
    ("sweep", "overrides", "message"),
    [
        (["{method: reep, method.ratio: 0.5}"], [], "did you mean reap"),
        (["{method: reap, method.rato: 0.5}"], [], "did you mean ratio"),
        (["{method: reap, method.ratio: 0.5}"], ["model=mixtrall_8x7b"], "did you mean mixtral_8x7b"),
        (["{method: reap, method.ratio: 0.5}"], ["nothing.here=1"], "nothing"),
        (["{zip: {method.ratio: [0.1, 0.2], seed: [1]}}"], [], "different lengths"),
        (["{}"], ["evaluation.limt=5"], "^evaluation.limt=5: 'evaluation.limt' is not in .*; did you mean limit"),
        (["{method: reap}"], ["method.ratio=0.5"], "'method.ratio' is not in conf/method/none.yaml; known: name"),
        (["{}"], ["tuning=router_lm", "tuning.rte=1"], "conf/tuning/router_lm.yaml; did you mean rate"),
        (["{method: reap, method.ratio: half}"], [], "conf/method/reap.yaml: ratio=half is not a fraction"),
        (["{}"], ["evaluation.limit=0"], "conf/evaluation/embedded.yaml: limit=0, expected a whole number >= 1"),
        (["{}"], ["evaluation.limit=-3"], "limit=-3, expected a whole number >= 1"),
        (["{}"], ["evaluation.length=long"], "length='long', expected a whole number >= 2"),
        (["{}"], ["evaluation.tasks=maths_choice"], "tasks='maths_choice', expected a list"),
        (["{}"], ["evaluation.tasks=[]"], r"tasks=\[\], expected a list"),
        (["{}"], ["+evaluation.num_fewshots=5"], "unknown key 'num_fewshots'; did you mean num_fewshot"),
        (["{}"], ["+evaluation.fewshot={maths_choice: 1.5}"], "fewshot=1.5, expected a whole number >= 0"),
        (["{}"], ["runtime.score_batch_size=0"], "conf/runtime: score_batch_size=0, expected a whole number >= 1"),
        (["{}"], ["runtime.device=cudda:1"], "conf/runtime: device='cudda:1'; did you mean cuda?"),
        (["{}"], ["model.dtype=float31"], "model.dtype=float31; did you mean float32?"),
        (
            ["{method: reap, method.ratio: 0.5}"],
            ["calibration.length=0"],
            "embedded.yaml: length=0, expected a whole number",
        ),
        (["{}"], ["runtime.apply_workers=many"], "apply_workers='many', expected a whole number"),
        (["{}"], ["compare={table: Table 2}"], "compare: key 'file' has no value"),
        (["{}"], ["compare={file: paper/naee.csv, table: Table 99}"], "no table 'Table 99'; it has Table 1"),
        (["{}"], ["sweep=null"], "sweep=None, expected a list of blocks"),
        (["{}"], ["sweep=[]"], r"sweep=\[\], expected a list of blocks"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, sweep, overrides, message):
    store = project(tmp_path, monkeypatch, sweep)
    with pytest.raises(UserError, match=message) as caught:
        graph.expand("mine", overrides, store)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "results").exists()


def test_an_unknown_experiment_names_the_nearest(tmp_path):
    with pytest.raises(UserError, match="did you mean demo"):
        graph.expand("dmo", [], Store(tmp_path))


def test_large_sweeps_compose_once_per_choice_of_groups(tmp_path, monkeypatch):
    import hydra

    ratios = [round(0.1 + 0.001 * n, 3) for n in range(1, 501)]
    store = project(tmp_path, monkeypatch, [f"{{method: [reap, frequency], method.ratio: {ratios}}}"])
    calls = []
    compose = hydra.compose
    monkeypatch.setattr(hydra, "compose", lambda *a, **k: calls.append(a) or compose(*a, **k))
    experiment = graph.expand("mine", [], store)
    assert stages(experiment)["plan"] == 1000
    assert len(calls) == 3  # the experiment itself, and one a method


def test_crossed_groups_compose_a_choice_at_a_time_to_what_they_compose_together(tmp_path, monkeypatch):
    import hydra

    sweep = "{method: [reap, hc_smoe, naee], calibration: [embedded, embedded_wiki], tuning: [none, router_lm]}"
    project(tmp_path, monkeypatch, [sweep])
    (tmp_path / "conf/method/both.yaml").write_text(
        "# @package _global_\ndefaults: [/method@method: reap]\ncalibration: {samples: 3}\n"
    )
    calls = []
    compose = hydra.compose
    monkeypatch.setattr(hydra, "compose", lambda *a, **k: calls.append(a) or compose(*a, **k))
    composer = Composer("mine", ["evaluation.limit=5"])
    together = {}
    for point in points(composer.sweep()):
        together[tuple(point.items())] = composer.compose(point)
    assert len(calls) == 1 + 3 + 2 + 2
    # A file that sets what another group's files set: its choices are composed with the other's.
    entangled = composer.compose({"method": "both", "calibration": "embedded_wiki"})
    assert entangled["calibration"]["samples"] == 3
    assert entangled["calibration"]["name"] == "embedded_wiki"
    nested = {"calibration@tuning.calibration": "embedded_code", "method": "reap", "tuning": "router_lm"}
    together[tuple(nested.items())] = composer.compose(nested)  # means nothing without the tuning
    for point, config in together.items():
        overrides = [f"{key}={value}" for key, value in point]
        plain = Composer("mine", ["evaluation.limit=5", *overrides]).compose({})
        assert plain == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=reap", "method.ratio=0.95"], r"conf/method/reap.yaml: ratio=0.95 leaves 1 of 16 experts"),
        (["method=mone", "method.ratio=0.01"], r"conf/method/mone.yaml: ratio=0.01"),
        (["method=reap", "model=smollm2_135m"], None),  # its files are made when it is fetched: not known yet
        (["method=reap", "method.ratio=0.95", "model=mixtral_8x7b"], None),  # not here
    ],
)
def test_what_a_model_at_hand_cannot_have_is_refused_before_anything_runs(overrides, message, tmp_path, monkeypatch):
    store = project(tmp_path, monkeypatch, ["{}"])
    if message is None:
        assert stages(graph.expand("mine", overrides, store))["plan"] == 1
        return
    with pytest.raises(UserError, match=message):
        graph.expand("mine", overrides, store)


def test_an_override_that_the_sweep_would_hide_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"^method=reap: the sweep of conf/experiment/demo\.yaml sets 'method' itself"):
        graph.expand("demo", ["method=reap"], Store(tmp_path))
    nodes = graph.expand("demo", ["sweep=[{method: reap}]"], Store(tmp_path)).nodes
    assert [node.label for node in nodes if node.stage == "plan"] == ["reap 50 %"]


def test_divergences_share_the_originals_answers_and_a_process_with_the_perplexities(tmp_path, monkeypatch):
    rest = "evaluation: {tasks: [perplexity_wiki, kl_wiki, kl_code], length: 64}"
    store = project(tmp_path, monkeypatch, ["method: none", "{method: reap, method.ratio: [0.25, 0.5]}"])
    path = tmp_path / "conf/experiment/mine.yaml"
    path.write_text("# @package _global_\n" + rest + "\n" + path.read_text().split("\n", 2)[2])
    experiment = graph.expand("mine", [], store)
    found = stages(experiment)
    assert (found["teacher"], found["task"]) == (2, 9)  # one text each, whatever is compared with it
    graph.save(experiment, store)
    nodes = {path.stem: store.read_node(path.stem) for path in (tmp_path / "results/nodes").glob("?" * 12 + ".json")}
    scores = [node for node in nodes.values() if node["stage"] == "score"]
    assert len(scores) == 3
    for node in scores:
        assert [nodes[id]["stage"] for id in node["parents"]] == [
            nodes[node["parents"][0]]["stage"],
            "teacher",
            "teacher",
        ]
        for task, id in node["config"]["answers"].items():
            (tokens,) = [nodes[parent] for parent in nodes[id]["parents"] if nodes[parent]["stage"] == "tokens"]
            assert tokens["config"]["name"] == task
            assert tokens["config"]["length"] == 64


def test_a_divergence_needs_windows_of_one_length(tmp_path, monkeypatch):
    store = project(tmp_path, monkeypatch, ["method: none"])
    overrides = ["evaluation.tasks=[kl_wiki]", "evaluation.length=null"]
    with pytest.raises(UserError, match="task kl_wiki compares windows of one length"):
        graph.expand("mine", overrides, store)


def test_compressed_models_are_timed_on_request(tmp_path, monkeypatch):
    store = project(tmp_path, monkeypatch, ["method: none", "{method: reap, method.ratio: [0.25, 0.5]}"])
    plain, timed = (graph.expand("mine", extra, store) for extra in ([], ["speed=one_thread"]))
    assert stages(timed) - stages(plain) == Counter({"speed": 2})
    apply = [node.id for node in timed.nodes if node.stage == "apply"]
    assert [node.parents[0] for node in timed.nodes if node.stage == "speed"] == apply
    # Timed in another dtype than it is scored in: the same scores, other times; named or not, the model's own is one.
    others = [
        graph.expand("mine", ["speed=one_thread", f"speed.dtype={dtype}"], store) for dtype in ("float32", "bfloat16")
    ]
    ids = [{node.id for node in found.nodes if node.stage == "speed"} for found in (timed, *others)]
    assert ids[0] == ids[1]
    assert not ids[0] & ids[2]
    assert stages(others[1]) == stages(timed)
    assert {n.id for n in others[1].nodes if n.stage == "task"} == {n.id for n in timed.nodes if n.stage == "task"}
    assert {node.id for node in plain.nodes if node.stage == "task"} <= {node.id for node in timed.nodes}
    # Of rows that differ in seeds only, as many as are asked for, the first ones; their timings are the same ones.
    seeds = ["{method: reap, method.ratio: [0.25, 0.5], calibration.seed: [7, 8, 9]}"]
    store = project(tmp_path, monkeypatch, ["method: none", *seeds])
    every, two = (graph.expand("mine", ["speed=one_thread", *more], store) for more in ([], ["speed.seeds=2"]))
    first = [node.id for node in every.nodes if node.stage == "speed"]
    assert len(first) == 6
    assert [node.id for node in two.nodes if node.stage == "speed"] == [first[n] for n in (0, 1, 3, 4)]
    with pytest.raises(UserError, match="seeds=0, expected a whole number >= 1"):
        graph.expand("mine", ["speed=one_thread", "speed.seeds=0"], store)
    with pytest.raises(UserError, match="rounds=1, expected a whole number >= 2"):
        graph.expand("mine", ["speed=one_thread", "speed.rounds=1"], store)


def test_rows_that_differ_in_seeds_are_one_line(tmp_path, monkeypatch):
    both = "calibration.seed: [0, 1]"
    sweep = [
        f"{{method: static, tuning: ffn_lm, tuning.tokens: 9000, zip: {{{both}, tuning.seed: [0, 1]}}}}",
        f"{{method: dsmoe, zip: {{method.seed: [3, 4], {both}}}}}",
    ]
    store = project(tmp_path, monkeypatch, sweep)
    path = tmp_path / "conf/experiment/mine.yaml"
    head, rest = path.read_text().split("\n", 1)
    path.write_text(f"{head}\ndefaults: [override /model: smollm2_135m]\n{rest}")
    rows = next(node for node in graph.expand("mine", [], store).nodes if node.stage == "table").config["rows"]
    assert [(row["label"], row["seed"]) for row in rows] == [
        ("static 50 % + ffn_lm lm tuning.tokens=9000", 0),
        ("static 50 % + ffn_lm lm tuning.tokens=9000", 1),
        ("dsmoe", 3),
        ("dsmoe", 4),
    ]


def test_a_block_may_name_its_rows(tmp_path, monkeypatch):
    sweep = [
        "{as: pruned, method: reap, method.ratio: 0.25}",
        "{as: drawn, method: random, method.ratio: [0.25, 0.5], method.seed: [0, 1]}",
        "{as: both, method: hc_smoe, zip: {method.ratio: [0.25, 0.5], method.linkage: [average, ward]}}",
    ]
    store = project(tmp_path, monkeypatch, sweep)
    rows = next(node for node in graph.expand("mine", [], store).nodes if node.stage == "table").config["rows"]
    assert [(row["label"], row["seed"]) for row in rows] == [
        ("pruned", None),
        ("drawn ratio=0.25", 0),
        ("drawn ratio=0.25", 1),
        ("drawn ratio=0.5", 0),
        ("drawn ratio=0.5", 1),
        ("both ratio=0.25 linkage=average", None),
        ("both ratio=0.5 linkage=ward", None),
    ]


def test_a_sweep_takes_its_seeds_from_the_command_line(tmp_path, monkeypatch):
    store = project(tmp_path, monkeypatch, ["{method: random, method.ratio: 0.5, method.seed: '${seeds}'}"])

    def seeds(*overrides):
        nodes = graph.expand("mine", overrides, store).nodes
        return [row["seed"] for row in next(node for node in nodes if node.stage == "table").config["rows"]]

    assert seeds() == [0, 1, 2]
    assert seeds("seeds=[4]") == [4]
    bad = project(tmp_path, monkeypatch, ["{method: random, method.seed: '${sedes}'}"], name="bad")
    with pytest.raises(UserError, match=r"conf/experiment/bad.yaml: sweep: .*sedes"):
        graph.expand("bad", [], bad)


def test_a_file_that_is_no_yaml_is_named_with_its_line(tmp_path, monkeypatch):
    store = project(tmp_path, monkeypatch, ["{method: random, method.seed: ${seeds}}"])
    with pytest.raises(UserError, match=r"conf/experiment/mine\.yaml, line 5: expected ',' or '}', but got '{'"):
        graph.expand("mine", [], store)


def test_an_experiment_without_its_first_line_is_refused(tmp_path, monkeypatch):
    store = project(tmp_path, monkeypatch, ["{method: reap}"])
    path = next(tmp_path.rglob("mine.yaml"))
    path.write_text(f"# about mine\n{path.read_text()}")  # Hydra looks for `@package` in the first line
    with pytest.raises(UserError, match=r"conf/experiment/mine\.yaml: its first line is not `# @package _global_`"):
        graph.expand("mine", [], store)
