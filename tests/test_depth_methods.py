"""Methods that let tokens skip layers: which layers they choose, what their routers start as, and what is refused."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dense_models import FAMILIES, save_dense
from espalier import conf
from espalier.checkpoints.checkpoint import Checkpoint
from espalier.collecting.stats import Stats
from espalier.errors import UserError
from espalier.methods import build, check, is_for_depth, make_plan
from espalier.plans.plan import Plan
from espalier.surgery.apply import apply
from tiny import VOCABULARY

pytestmark = pytest.mark.usefixtures("proof_here")

METHODS = ("modification", "mod", "random_depth", "layer_drop")
IDS = torch.arange(3 * 10).reshape(3, 10) * 7 % VOCABULARY
LAYERS = 6


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_dense("llama", tmp_path_factory.mktemp("llama") / "model", num_hidden_layers=LAYERS)


def plan_of(name, source, stats=None, **keys):
    shape = Checkpoint(source).any_shape()
    method = build(conf.load("method", name) | keys)
    check(method, shape, None)
    return make_plan(method, stats or Stats.empty(shape), shape, source)


def logits(directory):
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_these_are_all_methods_for_depth():
    found = {name for name in conf.names("method") if name != "none" and is_for_depth(build(_given(name)))}
    assert found == {*METHODS, "depth_rule"}


def _given(name):
    config = conf.load("method", name)
    needed = {"base": "x"} if "base" in config else {}
    return config | needed


@pytest.mark.parametrize("name", METHODS)
def test_layers(name, source):
    ranks = {layer: float(rank) for layer, rank in enumerate([9, 4, 7, 4, 1, 8])}
    arrays = {("attention_rank", layer): {"rank_sum": np.full(4, 12 * rank), "sequences": np.array([12])}
              for layer, rank in ranks.items()}  # fmt: skip
    stats = Stats(Checkpoint(source).any_shape(), (), arrays)
    for keys, expected in (
        ({"layers": "interleave", "count": None}, [1, 3, 5]),
        ({"layers": "last", "count": 2}, [4, 5]),
        ({"layers": "arank", "count": 2}, [1, 4]),
        ({"layers": "arank", "count": 4}, [1, 2, 3, 4]),
        ({"layers": [4, 0]}, [0, 4]),
    ):
        keys = {"count": None} | keys
        assert build(conf.load("method", name) | keys).probes == (
            ("attention_rank",) if "arank" in keys.values() else ()
        )
        plan = plan_of(name, source, stats, **keys)
        assert sorted(plan.layers) == expected
        assert plan.evidence == {layer: {"arank": ranks[layer]} for layer in expected}


def test_routers_start_as_documented(source, tmp_path):
    plan = plan_of("modification", source)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").document("x") == plan.document("x")
    for layer in (1, 3, 5):
        assert plan.tensors[f"{layer}.depth.weight"].read().tolist() == [0.0] * 32
        assert plan.tensors[f"{layer}.depth.bias"].read().tolist() == [4.0]
    apply(source, plan, tmp_path / "near", prove=True)
    apply(source, plan_of("modification", source, init_bias=0.0), tmp_path / "half", prove=True)
    apply(source, plan_of("modification", source, init_bias=20.0), tmp_path / "dense", prove=True)
    expected = logits(source)
    far = [float((logits(tmp_path / out) - expected).abs().max()) for out in ("dense", "near", "half")]
    assert far[0] < 1e-4 < far[1] < 0.2 * far[2]
    one, other = (plan_of("mod", source, seed=seed).tensors["3.depth.first"].read() for seed in (0, 1))
    assert not np.array_equal(one, other)
    assert np.array_equal(one, plan_of("mod", source, seed=0).tensors["3.depth.first"].read())


@pytest.mark.parametrize("family", FAMILIES)
def test_dropped_layers_leave_a_stock_model(family, tmp_path):
    source = save_dense(family, tmp_path / "source", num_hidden_layers=4)
    plan = plan_of("layer_drop", source, layers=[1, 3])
    facts = apply(source, plan, tmp_path / "out", prove=True)
    assert facts["loads_in"] == "stock transformers"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.num_hidden_layers == len(model.model.layers) == 2
    whole = AutoModelForCausalLM.from_pretrained(source)
    assert plan.parameter_counts(Checkpoint(source).any_shape())["stored"] == sum(p.numel() for p in model.parameters())
    whole.model.layers = torch.nn.ModuleList([whole.model.layers[0], whole.model.layers[2]])
    whole.config.num_hidden_layers = 2
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, whole(input_ids=IDS, use_cache=False).logits)


@pytest.mark.parametrize(
    ("family", "settings", "kinds"),
    [
        ("gemma2", {"sliding_window": 4}, ["sliding", "sliding"]),  # of four: sliding, full, sliding, full
        ("qwen2", {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 2}, ["full", "sliding"]),
        ("qwen2", {}, None),
        ("llama", {}, None),
    ],
)
def test_layers_that_stay_keep_the_attention_that_their_old_number_gave_them(family, settings, kinds, tmp_path):
    source = save_dense(family, tmp_path / "source", num_hidden_layers=4, **settings)
    config = json.loads((source / "config.json").read_text())
    config.pop("layer_types", None)  # as published: transformers derives them from the layers' numbers
    (source / "config.json").write_text(json.dumps(config))
    whole = AutoModelForCausalLM.from_pretrained(source)
    apply(source, plan_of("layer_drop", source, layers=[1, 3]), tmp_path / "out", prove=True)
    written = json.loads((tmp_path / "out/config.json").read_text()).get("layer_types")
    assert written == (kinds and [f"{kind}_attention" for kind in kinds])
    keep = [0, 2]
    whole.model.layers = torch.nn.ModuleList([whole.model.layers[n] for n in keep])
    whole.config.num_hidden_layers = 2
    if getattr(whole.config, "layer_types", None):
        whole.config.layer_types = [whole.config.layer_types[n] for n in keep]
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(input_ids=IDS).logits
        torch.testing.assert_close(found, whole(input_ids=IDS, use_cache=False).logits)


def test_what_is_dropped_and_routed_together_needs_code(source, tmp_path):
    drop, route = plan_of("layer_drop", source, layers=[5]), plan_of("modification", source, layers=[1])
    layers = dict(drop.layers) | dict(route.layers)
    apply(source, Plan({"name": "both"}, layers, tensors=route.tensors), tmp_path / "out", prove=True)
    assert Checkpoint(tmp_path / "out").any_shape().decoder.whole[5] == 0
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["num_hidden_layers"] == LAYERS
    assert config["architectures"] == ["EspalierForCausalLM"]


@pytest.mark.parametrize(
    ("name", "keys", "said"),
    [
        ("modification", {"layers": "interlave"}, "did you mean interleave"),
        ("modification", {"layers": "last"}, "needs count"),
        ("modification", {"count": 3}, "count=3 is of last and arank"),
        ("modification", {"layers": [1, 9]}, "9 is none"),
        ("modification", {"layers": [1, 1]}, "named twice"),
        ("modification", {"layers": "last", "count": 7}, "of 6 layers"),
        ("modification", {"layers": "arank", "count": 2}, "0 layers have attention maps"),
        ("modification", {"layers": 3}, "nor a list"),
        ("modification", {"threshold": 1.5}, "threshold=1.5"),
        ("modification", {"cache": "all", "granularity": "attention"}, "saves nothing"),
        ("modification", {"granularity": "heads"}, "granularity=heads"),
        ("mod", {"capacity": 0}, "capacity=0"),
        ("mod", {"predictor": 0}, "predictor=0"),
        ("random_depth", {"capacity": 2}, "capacity=2"),
        ("layer_drop", {"layers": "last", "count": 6}, "Leave one"),
        ("depth_rule", {"threshold": -1}, "threshold=-1"),
        ("depth_rule", {}, "method=modification first"),
        ("depth_rule", {"rule": "random"}, "rule=random"),
    ],
)
def test_refused(name, keys, said, source):
    with pytest.raises(UserError, match=said):
        plan_of(name, source, **keys)


@pytest.mark.parametrize("family", ["llama4_text", "qwen3_next", "jamba", "minimax"])
def test_families_without_softmax_attention_everywhere(family, tiny_model):
    source = tiny_model(family)
    if family == "llama4_text":
        with pytest.raises(UserError, match="chunks of the whole sequence"):
            plan_of("modification", source)
        return
    able = list(Checkpoint(source).any_shape().decoder.attends)
    assert 0 < len(able) < 3
    missing = next(layer for layer in range(3) if layer not in able)
    with pytest.raises(UserError, match=f"{missing} is none; those that can be skipped are"):
        plan_of("modification", source, layers=[missing])
    assert sorted(plan_of("modification", source, layers=[missing], granularity="ffn").layers) == [missing]
    assert sorted(plan_of("modification", source, layers=able).layers) == able


def test_a_routed_model_is_not_routed_or_split_again(source, tmp_path):
    apply(source, plan_of("modification", source), tmp_path / "out", prove=False)
    with pytest.raises(UserError, match="depth cannot follow depth"):
        apply(tmp_path / "out", plan_of("mod", source), tmp_path / "again", prove=False)
    with pytest.raises(UserError, match="split cannot follow depth"):
        apply(
            tmp_path / "out", plan_of("static", source, score="magnitude", ratio=0.5), tmp_path / "again", prove=False
        )
