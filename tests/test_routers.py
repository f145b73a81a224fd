"""How routers choose: what the shape says of them, plans and ratios that suit their groups, methods that refuse."""

import json

import pytest

from espalier.checkpoints.checkpoint import Checkpoint
from espalier.checkpoints.shape import ModelShape
from espalier.collecting.stats import Stats
from espalier.errors import UserError
from espalier.methods import check
from espalier.methods.budget import survivors
from espalier.methods.reap import Reap
from espalier.methods.soft_count import SoftCount
from espalier.plans.operations import Keep, Merge, Skip
from espalier.plans.plan import Plan
from espalier.surgery.apply import apply
from espalier.surgery.prove import prove
from tiny import save_tiny


def edit_config(directory, **changes):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("family_name", "changes", "expected"),
    [
        ("mixtral", {}, ("softmax", 1, 1, 1)),
        ("gpt_oss", {}, ("softmax", 1, 1, 1)),
        ("jamba", {}, ("softmax", 1, 1, 1)),
        ("deepseek_v2", {}, ("softmax within groups times 1.5", 2, 1, 1)),
        ("deepseek_v2", {"topk_method": "greedy", "routed_scaling_factor": 1.0}, ("softmax", 1, 1, 1)),
        ("deepseek_v2", {"topk_method": "greedy"}, ("softmax times 1.5", 1, 1, 1)),
        ("deepseek_v3", {}, ("sigmoid with a correction bias", 2, 1, 2)),
        ("deepseek_v3", {"n_group": 4, "topk_group": 3}, ("sigmoid with a correction bias", 4, 3, 2)),
        ("glm4_moe", {}, ("sigmoid with a correction bias", 1, 1, 2)),
        ("ernie4_5_moe", {}, ("softmax with a correction bias", 1, 1, 1)),
        ("minimax_m2", {}, ("sigmoid with a correction bias", 1, 1, 1)),
        ("phimoe", {}, ("sparsemixer", 1, 1, 1)),
    ],
)
def test_the_shape_says_how_the_router_chooses(family_name, changes, expected, tiny_model):
    shape = Checkpoint(tiny_model(family_name, **changes)).shape()
    assert (shape.router, shape.groups, shape.groups_chosen, shape.group_least) == expected
    assert ModelShape.from_document(json.loads(json.dumps(shape.document()))) == shape


def test_statistics_of_an_older_shape_are_read(tiny_model):
    document = Checkpoint(tiny_model("mixtral")).shape().document()
    for key in ("groups_chosen", "group_least", "router", "idle_parameters"):
        del document[key]
    assert ModelShape.from_document(document) == Checkpoint(tiny_model("mixtral")).shape()


def test_the_router_of_phimoe_picks_two(tmp_path):
    source = save_tiny("phimoe", tmp_path)
    edit_config(source, num_experts_per_tok=4)
    with pytest.raises(UserError, match="num_experts_per_tok=4, but the phimoe router picks 2 whatever it says"):
        Checkpoint(source).shape()


def test_other_keys_of_k_and_impossible_groups(tmp_path):
    source = save_tiny("ernie4_5_moe", tmp_path / "ernie")
    config = json.loads((source / "config.json").read_text())
    del config["moe_k"]
    (source / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 3}))
    assert Checkpoint(source).shape().top_k == 3
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"ernie4_5_moe has none of the keys \['moe_k', 'num_experts_per_tok'\]"):
        Checkpoint(source).shape()
    source = save_tiny("deepseek_v3", tmp_path / "deepseek")
    edit_config(source, n_group=3)
    with pytest.raises(UserError, match="8 experts cannot be divided into 3 router groups"):
        Checkpoint(source).shape()


def merge(*firsts):
    """A merge whose groups begin with `firsts`; the other experts join the last one."""
    rest = sorted(set(range(8)) - set(firsts))
    assert rest[0] > firsts[-1] or not rest
    groups = [(e,) for e in firsts[:-1]] + [(firsts[-1], *rest)]
    return Merge(tuple(groups), tuple((1 / len(group),) * len(group) for group in groups), "slice")


@pytest.mark.parametrize(
    ("family_name", "changes", "operation", "message"),
    [
        (
            "deepseek_v3",
            {},
            Keep((0, 1, 2, 4)),
            r"keep leaves \[3, 1\] experts in the 2 router groups\. Leave the same",
        ),
        ("deepseek_v2", {}, Keep((0, 1, 2, 4)), r"keep leaves \[3, 1\] experts"),
        ("deepseek_v3", {}, Keep((0, 4)), "keep leaves 1 in each router group, but the router scores .* best 2"),
        ("deepseek_v3", {"top_k": 3}, Keep((0, 1, 4, 5)), "keep leaves 2 in each .* picks top_k=3 from 1 of 2 groups"),
        ("deepseek_v2", {"top_k": 3}, Keep((0, 1, 4, 5)), "keep leaves .* picks top_k=3 from 1 of 2 groups"),
        ("glm4_moe", {"top_k": 1}, Keep((3,)), "keep leaves 1 in each router group"),
        ("deepseek_v3", {}, merge(0, 1, 2), r"merge with router=slice leaves \[3, 0\] experts"),
        ("deepseek_v3", {}, merge(0, 1, 2, 3, 4), r"merge with router=slice leaves \[4, 1\] experts"),
    ],
)
def test_plans_that_break_the_groups_are_refused(family_name, changes, operation, message, tiny_model):
    shape = Checkpoint(tiny_model(family_name, **changes)).shape()
    with pytest.raises(UserError, match=f"plan, layer 1: {message}"):
        Plan({"name": "x"}, {1: (operation,)}).check(shape)


def test_plans_that_keep_the_groups_run(tiny_model, tmp_path):
    source = tiny_model("deepseek_v3", n_group=4, topk_group=2, top_k=3, experts=16)
    shape = Checkpoint(source).shape()
    keep = Keep((0, 3, 4, 5, 9, 10, 12, 15))
    plan = Plan({"name": "x"}, {1: (keep, Skip(0.1, "tail")), 2: (keep,)}).check(shape)
    apply(source, plan, tmp_path / "out", prove=False)
    assert "error" not in prove(source, tmp_path / "out", plan)
    # A remapped router keeps its rows, and so its groups.
    groups = (tuple(range(16)),)
    Plan({"name": "x"}, {1: (Merge(groups, ((1 / 16,) * 16,), "remap"),)}).check(shape)
    with pytest.raises(UserError, match=r"keep leaves \[2, 2, 1, 1\] experts"):
        Plan({"name": "x"}, {1: (keep, Keep((0, 1, 2, 3, 4, 6)))}).check(shape)


def test_ratios_that_suit_the_groups(tiny_model):
    shape = Checkpoint(tiny_model("deepseek_v3", n_group=4, topk_group=2, top_k=3, experts=16)).shape()
    assert survivors(0.25, shape, "conf") == 12
    with pytest.raises(
        UserError, match=r"ratio=0\.3 leaves 11 experts, not a multiple of the 4 router groups\. Use ratio"
    ):
        survivors(0.3, shape, "conf")
    with pytest.raises(UserError) as caught:
        survivors(0.75, shape, "conf")
    assert str(caught.value) == (
        "conf: ratio=0.75 leaves 4 experts, 1 in each router group, but the router scores a group by its best 2. "
        "Use ratio=0.5, 0.25."
    )
    for ratio in (0.5, 0.25):
        survivors(ratio, shape, "conf")


@pytest.mark.parametrize(
    ("family_name", "changes", "method", "message"),
    [
        ("glm4_moe", {}, SoftCount(0.5), "router of glm4_moe is sigmoid with a correction bias. Use method=reap"),
        ("minimax_m2", {}, Reap(0.5, "published"), "router of minimax_m2 is sigmoid .* Use weights=model"),
    ],
)
def test_methods_that_need_a_softmax_refuse_other_routers(family_name, changes, method, message, tiny_model):
    shape = Checkpoint(tiny_model(family_name, **changes)).shape()
    with pytest.raises(UserError, match=message):
        check(method, shape, None)  # before anything is collected
    with pytest.raises(UserError, match=message):
        method.plan(Stats(shape, (1,), {}), shape)
