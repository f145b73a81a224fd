"""Plans: checks, composition, counts against a plain count over experts, and the JSON document."""

import itertools
import json
import subprocess
import sys

import pytest

from espalier.artefacts.store import write_json
from espalier.checkpoints.shape import ModelShape
from espalier.errors import UserError
from espalier.methods.budget import survivors
from espalier.plans.layout import Slot, block_layout, source_layout
from espalier.plans.operations import Keep, Merge, Skip
from espalier.plans.plan import Plan

SHAPE = ModelShape(
    family="mixtral",
    layers=(0, 1, 3),
    experts=6,
    top_k=2,
    hidden=4,
    width=5,
    renormalise=True,
    expert_parameters=60,
    router_row_parameters=4,
    total_parameters=3 * 6 * 64 + 1000,
)
GROUPS = ((0, 2, 5), (1,), (3, 4))
WEIGHTS = ((0.5, 0.25, 0.25), (1.0,), (0.5, 0.5))


def merge(router="remap"):
    return Merge(GROUPS, WEIGHTS, router)


def plan(**layers):
    return Plan({"name": "example"}, {int(key[1:]): operations for key, operations in layers.items()})


@pytest.mark.parametrize(
    ("operations", "message"),
    [
        ((Keep((2, 1)),), r"keep.experts must ascend within 0..5: \[2, 1\]"),
        ((Keep((1, 1, 2)),), "keep.experts must ascend"),
        ((Keep((1, 6)),), "keep.experts must ascend within 0..5"),
        ((Keep((1,)),), "keep leaves 1 of 6 experts, but the router picks top_k=2"),
        ((Keep((1, 2, 4)), Keep((0, 3))), "keep.experts must ascend within 0..2"),
        ((Merge(GROUPS[:2], WEIGHTS[:2]),), "do not hold each of 6 experts once"),
        ((Merge((GROUPS[1], GROUPS[0], GROUPS[2]), WEIGHTS),), "must ascend inside and by their smallest member"),
        ((Merge(GROUPS, ((0.5, 0.5, 0.5), (1.0,), (0.5, 0.5))),), r"weights of group \[0, 2, 5\] do not sum to 1"),
        ((merge("drop"),), "merge.router='drop'; known: remap, slice, tie"),
        ((Merge(((0, 1, 2, 3, 4, 5),), ((1 / 6,) * 6,), "slice"),), "router=slice leaves 1 router rows"),
        (
            (Merge(GROUPS, WEIGHTS, "slice", rows=(5, 1, 2)),),
            r"merge.rows=\[5, 1, 2\] must name a member of each group",
        ),
        ((Merge(GROUPS, WEIGHTS, "slice", rows=(5, 1)),), r"merge.rows=\[5, 1\] must name a member of each group"),
        ((Merge(GROUPS, WEIGHTS, "remap", rows=(5, 1, 4)),), "merge.rows=.*; router=slice"),
        ((Skip(1.5),), "beta=1.5 lies outside 0..1"),
        ((Skip(0.5, "half"),), "skip.rule='half'"),
    ],
)
def test_refuses_operations_that_do_not_fit(operations, message):
    with pytest.raises(UserError, match=message):
        plan(_1=operations).check(SHAPE)


def test_refuses_a_layer_without_experts():
    with pytest.raises(UserError, match=r"layer 2 has no MoE block; layers with one: \[0, 1, 3\]"):
        plan(_2=(Skip(0.1),)).check(SHAPE)


OPERATIONS = {
    "none": (),
    "keep": (Keep((0, 1, 4)),),
    "remap": (merge(),),
    "slice": (merge("slice"),),
    "tie": (merge("tie"),),
    "skip": (Skip(0.4),),
    "keep_skip": (Keep((2, 3)), Skip(0.4)),
    "keep_remap": (Keep((1, 2, 3, 5)), Merge(((0, 3), (1,), (2,)), ((0.5, 0.5), (1.0,), (1.0,)))),
    "one": (Merge(((0, 1, 2, 3, 4, 5),), ((1 / 6,) * 6,)),),
}


@pytest.mark.parametrize("names", [*itertools.product(OPERATIONS, ["none", "keep", "tie"])], ids="-".join)
def test_counts_equal_a_count_over_what_is_left(names):
    chosen = plan(_0=OPERATIONS[names[0]], _3=OPERATIONS[names[1]]).check(SHAPE)
    stored = unique = active = SHAPE.total_parameters - 3 * 6 * 64
    for layer in SHAPE.layers:
        block = block_layout(layer, source_layout(6, None), chosen.layers.get(layer, ()))
        rows = len(block.rows) * 4
        stored += len(block.slots) * 60 + rows
        unique += len(set(block.slots)) * 60 + rows
        active += min(2, len(set(block.slots))) * 60 + rows
        assert chosen.experts_after(layer, SHAPE) == len(set(block.slots))
    assert chosen.parameter_counts(SHAPE) == {"stored": stored, "unique": unique, "active": active}


def test_layout_follows_the_operations():
    block = block_layout(0, source_layout(6, None), OPERATIONS["keep_remap"])
    assert block.slots == (Slot(((1, 0.5), (5, 0.5))), Slot(((2, 1.0),)), Slot(((3, 1.0),)))
    assert block.rows == (1, 2, 3, 5)
    assert block.expert_map == (0, 1, 2, 0)
    tied = block_layout(0, source_layout(6, None), (merge("tie"),))
    assert tied.slots[0] == tied.slots[2] == tied.slots[5] == Slot(((0, 0.5), (2, 0.25), (5, 0.25)))
    assert block_layout(0, source_layout(6, None), (merge("slice"),)).rows == (0, 1, 3)
    chosen = block_layout(0, source_layout(6, None), (Merge(GROUPS, WEIGHTS, "slice", rows=(5, 1, 4)),))
    assert chosen.rows == (1, 4, 5)  # the stored experts follow their rows
    assert [slot.parts[0][0] for slot in chosen.slots] == [1, 3, 0]
    with pytest.raises(UserError, match="layer 0: merge cannot follow skip"):
        block_layout(0, source_layout(6, None), (Skip(0.1), merge()))
    with pytest.raises(UserError, match="layer 0: keep cannot follow a merge"):
        block_layout(0, source_layout(6, None), (merge(), Keep((0, 1))))


def test_composition_keeps_the_sources_ids():
    first = Plan({"name": "reap", "ratio": 0.5}, {0: (Keep((0, 2, 3, 5)),)}, {0: {"loss": 1.0}}, {"id": "base"})
    later = Plan({"name": "naee_skip"}, {0: (Keep((1, 3)), Skip(0.3)), 1: (Skip(0.2),)}, {0: {"beta": 0.3}})
    both = first.then(later)
    assert both.layers == {0: (Keep((2, 5)), Skip(0.3)), 1: (Skip(0.2),)}
    assert both.method == {"name": "reap", "ratio": 0.5, "then": {"name": "naee_skip"}}
    assert both.evidence == {0: {"loss": 1.0, "beta": 0.3}}
    assert both.model == {"id": "base"}
    assert first.evidence == {0: {"loss": 1.0}}, "composition must not change its parts"
    with pytest.raises(UserError, match="layer 0: keep cannot follow merge"):
        plan(_0=(merge(),)).then(plan(_0=(Keep((0, 1)),)))


def test_document_survives_json(tmp_path):
    original = Plan(
        {"name": "hc_smoe", "ratio": 0.5},
        {0: (merge("tie"),), 3: (Keep((1, 2)), Skip(0.25, "tail"))},
        {0: {"loss": 0.5}},
        {"id": "org/model", "revision": "abc", "family": "mixtral"},
        {"stored": 10.0},
    )
    original.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == original
    document = json.loads((tmp_path / "plan.json").read_text())
    assert document["format"] == "espalier.plan/1"
    assert document["layers"]["3"] == [
        {"op": "keep", "experts": [1, 2]},
        {"op": "skip", "beta": 0.25, "rule": "tail"},
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "espalier.plan/9"}, "format is 'espalier.plan/9', expected espalier.plan/1"),
        ({"layers": {"0": [{"op": "kep", "experts": [0]}]}}, "layer 0: unknown operation 'kep'; did you mean keep"),
        ({"layers": {"0": [{"op": "keep", "expert": [0]}]}}, "layer 0: keep: .*unexpected keyword argument 'expert'"),
    ],
)
def test_refuses_documents_it_does_not_know(change, message, tmp_path):
    write_json(tmp_path / "plan.json", plan(_0=(Keep((0, 1)),)).document() | change)
    with pytest.raises(UserError, match=message):
        Plan.load(tmp_path / "plan.json")


def test_survivors_of_a_ratio():
    assert [survivors(r, SHAPE, "conf") for r in (0.17, 0.25, 0.5, 0.6)] == [5, 4, 3, 2]
    for ratio, message in [
        (0.9, r"conf/method/x.yaml: ratio=0.9 leaves 1 of 6 experts, but the router picks top_k=2. Use ratio <= 0.666"),
        (0.01, "removes none of 6 experts"),
        (0, "not a fraction"),
        (1, "not a fraction"),
        ("half", "not a fraction"),
    ]:
        with pytest.raises(UserError, match=message):
            survivors(ratio, SHAPE, "conf/method/x.yaml")
    grouped = ModelShape.from_document(SHAPE.document() | {"groups": 2})
    with pytest.raises(UserError, match="not a multiple of the 2 router groups"):
        survivors(0.5, grouped, "conf")


def test_planning_needs_no_torch():
    names = ("plans.plan", "plans.layout", "checkpoints.checkpoint", "surgery.card", "surgery.apply")
    modules = ", ".join(f"espalier.{name}" for name in names)
    program = f"import sys, {modules}; assert not {{'torch', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
