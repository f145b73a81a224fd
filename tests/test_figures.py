"""What figures show: values, fronts, groups and cuts, against slow and obvious computations."""

import math
from dataclasses import replace

import numpy as np
import pytest

from espalier.figures import activity, experts, losses, neurons, quality, similarity, style, training
from espalier.plans.operations import Constant, Keep, Merge, Narrow, Skip
from espalier.plans.plan import Plan
from espalier.plans.plan_tensors import PlanTensor
from espalier.plans.split import Split
from report_material import EXPERTS, LAYERS, keep_plan, line, merge_plan


def test_decision_matrix_marks_removed_kept_and_merged() -> None:
    found = experts.decision_matrix(keep_plan(), EXPERTS)
    assert found is not None
    assert found[0] == [0, 2]
    assert found[1].tolist() == [[0, 0, -1, 0, 0, -1], [-1, 0, 0, 0, -1, 0]]
    groups = ((0, 4), (1,), (2, 3), (5,))
    merge = Plan({}, {0: (Merge(groups, ((0.5, 0.5), (1.0,), (0.5, 0.5), (1.0,))),)})
    found = experts.decision_matrix(merge, EXPERTS)
    assert found is not None
    assert found[1].tolist() == [[1, 0, 2, 2, 1, 0]]
    found = experts.decision_matrix(Plan({}, {0: (Constant((1, 4), "v"),)}), EXPERTS)
    assert found is not None
    assert found[1].tolist() == [[0, -2, 0, 0, -2, 0]]
    assert experts.decision_matrix(Plan({}, {0: (Skip(0.4),)}), EXPERTS) is None


def test_a_later_plan_does_not_hide_what_the_first_decided() -> None:
    later = Plan({}, {0: (Keep((0, 1)),)})  # ids of the experts that are left
    figure = experts.decisions({"a": (keep_plan(), later), "b": (keep_plan(),)}, EXPERTS)
    assert figure is not None
    assert [axes.get_title(loc="left") for axes in figure.axes if axes.get_visible()] == ["a (and 1 more)"]


def test_trees_are_cut_between_the_last_merge_done_and_the_first_left_out() -> None:
    plan = merge_plan()
    for layer in LAYERS:
        tree = np.array(plan.evidence[layer]["linkage"])
        heights = sorted(tree[:, 2])
        cut = similarity.cut_height(tree, 4)  # 6 experts in 4 groups: two merges
        assert cut is not None
        assert heights[1] < cut < heights[2]
        assert similarity.cut_height(tree, EXPERTS) is None
    assert similarity.similarity(keep_plan(), {}) is None
    # With a budget over all layers one may keep every expert: it has a tree and no merge.
    whole = replace(plan, layers={LAYERS[0]: plan.layers[LAYERS[0]], LAYERS[1]: ()})
    assert [len(similarity.groups_of(whole, layer)) for layer in LAYERS] == [4, 6]
    assert similarity.similarity(whole, {}) is not None


def test_the_map_is_in_the_order_of_the_tree_and_frames_each_group() -> None:
    plan = merge_plan()
    apart = np.arange(EXPERTS**2, dtype=float).reshape(EXPERTS, EXPERTS)
    apart = apart + apart.T
    np.fill_diagonal(apart, 0)
    figure = similarity.similarity(plan, dict.fromkeys(LAYERS, apart))
    assert figure is not None
    for part, layer in zip(figure.subfigs, LAYERS, strict=True):
        tree, shown = part.axes[0], part.axes[1]
        order = [int(label.get_text()) for label in shown.get_xticklabels()]
        assert sorted(order) == list(range(EXPERTS))
        assert shown.images[0].get_array().tolist() == [[apart[a, b] for b in order] for a in order]
        groups = [set(group) for group in plan.layers[layer][0].groups if len(group) > 1]  # type: ignore[union-attr]
        framed = [
            {order[n] for n in range(round(box.get_x() + 0.5), round(box.get_x() + 0.5 + box.get_width()))}
            for box in shown.patches
        ]
        assert sorted(framed, key=min) == sorted(groups, key=min)
        assert len(tree.lines) == 1  # the cut


@pytest.mark.parametrize("lower", [True, False])
def test_no_point_of_the_front_is_beaten_and_every_other_is(lower: bool) -> None:
    random = np.random.default_rng(3)
    for number in (1, 2, 5, 30):
        points = [(float(x), float(y)) for x, y in random.integers(0, 8, (number, 2))]
        front = quality.pareto(points, lower)

        def beats(a: int, b: int, points: list[tuple[float, float]] = points) -> bool:
            (x, y), (u, v) = points[a], points[b]
            y, v = (y, v) if lower else (-y, -v)
            return x <= u and y <= v and (x < u or y < v)

        unbeaten = {points[n] for n in range(number) if not any(beats(m, n) for m in range(number))}
        assert {points[n] for n in front} == unbeaten
        assert len(front) == len(unbeaten)


def test_both_counts_are_drawn_with_the_intervals_of_the_paired_comparison() -> None:
    lines = [line("full", "none", 5e6, 0), line("reap 33 %", "reap", 4e6, 0.1)]
    figure = quality.quality(lines, {"full": "full", "reap 33 %": "full"})
    assert figure is not None
    labels = [axes.get_xlabel() for axes in figure.axes]
    assert labels == ["unique parameters, millions", "active parameters, millions"] * 2
    for n, values in ((0, [20 * 1.09, 20 * 1.11]), (2, [59.0, 61.0])):  # 70 - 10 -+ 1
        bars = figure.axes[n].containers[0].get_children()[-1].get_segments()[0]
        assert bars[:, 1].tolist() == pytest.approx(values)
    places = [axes.containers[0].lines[0].get_xdata().tolist() for axes in figure.axes[:2]]
    assert places == [pytest.approx([4.0]), pytest.approx([4 / 3])]


def test_each_model_of_a_figure_is_compared_with_its_own() -> None:
    small = [line("full", "none", 5e6, 0), line("reap 33 %", "reap", 4e6, 0.1)]
    large = [line("L: full", "none", 9e6, 0), line("L: reap 33 %", "reap", 7e6, 0.1)]
    for one in large:  # half the perplexity, 20 points more
        one["perplexity"] |= {key: one["perplexity"][key] / 2 for key in ("value", "low", "high")}
        one["accuracy"] |= {key: one["accuracy"][key] + 0.2 for key in ("value", "low", "high")}
    figure = quality.quality(
        [*small, *large], {one["label"]: group[0]["label"] for group in (small, large) for one in group}
    )
    assert figure is not None
    for n, expected in (
        (0, {"reap": [21.8, 22.2], "L: reap": [10.9, 11.1]}),
        (2, {"reap": [59, 61], "L: reap": [79, 81]}),
    ):
        axes = figure.axes[n]
        bars = {found.get_label(): found.get_children()[-1].get_segments()[0][:, 1] for found in axes.containers}
        assert {name: list(ends) for name, ends in bars.items()} == {k: pytest.approx(v) for k, v in expected.items()}
        (stars,) = (drawn for drawn in axes.lines if drawn.get_marker() == "*")
        assert list(stars.get_xdata()) == [5, 9]


def test_an_uncompressed_model_alone_has_no_divergence_to_draw() -> None:
    full = line("full", "none", 5e6, 0) | {"kl": {"value": 1e-9, "low": 0.0, "high": 2e-9}}
    figure = quality.quality([full], {"full": "full"})
    assert figure is not None
    assert len(figure.axes) == 2 * 2  # perplexity and accuracy
    assert quality.quality([{key: full[key] for key in full if key not in ("perplexity", "accuracy")}], {}) is not None
    alone = {key: value for key, value in full.items() if key not in ("perplexity", "accuracy")}
    assert quality.quality([alone], {"full": "full"}) is None


def test_lines_that_differ_in_a_number_are_one_family() -> None:
    same = ["reap 25 %", "reap 50 %", "reap 12.5 %"]
    assert {quality.family_of(label) for label in same} == {"reap"}
    assert quality.family_of("naee 50 % + naee_skip") == "naee + naee_skip"
    assert quality.family_of("reap 50 % + router_lm") == "reap + router_lm"
    assert quality.family_of("threshold tuning.target=0.3") == "threshold"
    assert quality.family_of("hc_smoe 50 % linkage=ward") == "hc_smoe linkage=ward"


def test_marks_on_a_logarithmic_axis_are_few_and_lie_within_it() -> None:
    for low, high in ((3.0, 40.0), (21.0, 90.0), (2.0, 900.0), (16.0, 2.3e6), (1e-30, 1e3)):
        ticks = style.log_ticks(low, high)
        assert 2 <= len(ticks) <= 8
        assert all(low <= tick <= high for tick in ticks)
        assert ticks == sorted(set(ticks))
    assert style.log_ticks(16.0, 2.3e6) == [1e2, 1e3, 1e4, 1e5, 1e6]  # a wide range has powers alone
    assert math.isclose(style.log_ticks(1, 10)[0], 1)


def test_colour_and_marker_of_many_names_differ() -> None:
    assert len({style.shade(n) for n in range(len(style.COLOURS) * len(style.MARKERS))}) == 49


def test_neurons_add_up_and_experts_of_unequal_width_are_drawn() -> None:
    split = Split((4, 2, 6), ((1,), (1, 2)), shared=1, router="linear", k=1)
    assert neurons.neuron_shares(split, 16) == pytest.approx((4 / 16, 8 / 16, 4 / 16))
    assert neurons.neuron_shares(Split((12,)), 16) == pytest.approx((12 / 16, 0, 4 / 16))
    plans = {"a": (Plan({}, {0: (split,), 1: (split,)}),), "b": (keep_plan(),)}
    measured = {"a": {"neurons_per_token": {"0": 8.0}}}
    figure = neurons.neurons(plans, measured, 16)
    assert figure is not None
    (axes,) = figure.axes
    heights = [[bar.get_height() for bar in part] for part in axes.containers]
    assert np.sum(heights, axis=0).tolist() == pytest.approx([100, 100])
    assert axes.lines[0].get_ydata()[0] == pytest.approx(50)
    assert np.isnan(axes.lines[0].get_ydata()[1])
    figure = neurons.expert_neurons(plans, 16)
    assert figure is not None
    assert figure.axes[0].images[0].get_array().tolist() == [[12.5, 50.0], [12.5, 50.0]]
    assert neurons.neurons({"b": (keep_plan(),)}, {}, 16) is None


def test_narrowed_experts_are_counted_without_the_padding() -> None:
    tensor = PlanTensor.of(np.array([[0, 2, 5], [1, -1, -1]]))
    plan = Plan({}, {3: (Narrow("3.neurons", 3, 4),)}, tensors={"3.neurons": tensor})
    assert neurons.narrowed((plan,)) == {3: [3, 1]}


def test_each_method_has_its_panel_of_losses() -> None:
    naee = Plan({"name": "naee"}, {}, {0: {"loss": 8.0, "relative_loss": 0.25}, 1: {"loss": 9.0, "relative_loss": 0.5}})
    figure = losses.losses({"naee 25 %": (naee,), "hc_smoe": (merge_plan(),), "naee + skip": (naee,)})
    assert figure is not None
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes if axes.get_visible()}
    assert list(panels) == ["naee\nloss over the block's output", "hc_smoe\nloss"]
    (drawn,) = panels["naee\nloss over the block's output"].lines  # two labels, one plan
    assert drawn.get_xydata().tolist() == [[0, 0.25], [1, 0.5]]
    assert losses.losses({"reap": (keep_plan(),)}) is None


def test_means_of_a_curve_keep_its_sum_and_ends() -> None:
    x = np.arange(1.0, 101)
    places, values = training.smooth(x, x**2)
    assert len(places) == training.SMOOTH
    assert float(np.mean(values[0])) <= 9
    assert training.smooth(x[:3], x[:3])[1].tolist() == [1, 2, 3]


def test_maps_show_only_lines_with_a_rule() -> None:
    active = {"reap": {"experts_per_token": {"0": 2.0, "2": 1.4}}, "full": {"experts_per_token": {"0": 2.0, "2": 2.0}}}
    figure = activity.experts_run(active, {"reap": (keep_plan(),), "full": ()})
    assert figure is not None
    assert figure.axes[0].images[0].get_array().tolist() == [[2.0, 1.4]]
    assert activity.experts_run(active, {"reap": (merge_plan(),)}) is None
    assert activity.tokens_entering(active, {"reap": (keep_plan(),)}) is None


def test_titles_of_panels_tell_long_names_apart():
    names = [f"moefication 50 % router=oracle blocks={blocks} split=contiguous" for blocks in (8, 32)]
    for name in names:
        lines = style.title(name, 28).splitlines()
        assert " ".join(lines) == name
        assert max(map(len, lines)) <= 28
    assert style.title("full", 28) == "full"
    longer = style.title("x" * 500, 28).splitlines()
    assert len(longer) == style.TITLE_LINES
    assert max(map(len, longer)) <= 28
    assert style.title_inches(["full", *names], 28) == 2 * style.TITLE_LINE
    assert style.title_inches(["full"], 28) == 0
