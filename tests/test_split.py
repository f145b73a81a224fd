"""Split FFNs: written checkpoints against the plainest way to run them, both back ends, and what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from dense_models import (
    EVEN,
    FAMILIES,
    KINDS,
    LAYERS,
    LINEAR,
    STOCK,
    WIDTH,
    live_split,
    made_once,
    save_dense,
    split_plan,
)
from espalier import dense_families
from espalier.checkpoints.checkpoint import Checkpoint
from espalier.errors import UserError
from espalier.modeling import sparse_ffn
from espalier.modeling.sparse_ffn import SparseFFN
from espalier.models import runtime
from espalier.models.live_split import LiveSplit
from espalier.plans.operations import Keep
from espalier.plans.plan import Plan
from espalier.plans.split import Split, Threshold
from espalier.surgery.apply import apply
from espalier.surgery.prove import LENGTH, ROWS, prove
from tiny import VOCABULARY, save_tiny

pytestmark = pytest.mark.usefixtures("proof_here")

IDS = torch.arange(3 * 10).reshape(3, 10) * 7 % VOCABULARY


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return made_once(tmp_path_factory)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def sparse(model):
    return [layer.mlp for layer in model.model.layers]


def set_backend(model, backend):
    for ffn in sparse(model):
        ffn.backend = backend


def test_every_family_is_tested():
    assert sorted(FAMILIES) == dense_families.names()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_computes_what_the_plan_says(family, kind, models, tmp_path):
    source, plan = models(family), split_plan(KINDS[kind])
    shape = Checkpoint(source).dense_shape()
    apply(source, plan.check(shape), tmp_path / "out", prove=False)
    live = runtime.load(source)
    live_split(live, plan, Checkpoint(source).dense_family)
    expected = logits(live)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=kind not in STOCK).eval()
    assert (type(model).__name__ == "EspalierForCausalLM") == (kind not in STOCK)
    for backend in ("auto", "masked", "grouped"):
        if kind not in STOCK:
            set_backend(model, backend)
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    # One token at a time, with a cache.
    with torch.inference_mode():
        cache, found = None, []
        for place in range(IDS.shape[1]):
            output = model(input_ids=IDS[:1, place : place + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            found.append(output.logits)
    torch.testing.assert_close(torch.cat(found, dim=1), expected[:1], rtol=1e-4, atol=2e-5)
    assert plan.parameter_counts(shape)["stored"] == Checkpoint(tmp_path / "out").parameters


@pytest.mark.parametrize("kind", ["dsmoe", "tomoe", "cmoe"])
def test_it_proves_itself_and_runs_in_bf16(kind, tmp_path):
    source = save_dense("llama", tmp_path / "source", torch.bfloat16)
    report = apply(source, split_plan(KINDS[kind]), tmp_path / "out")
    assert report["proof"]["max_abs_diff"] <= report["proof"]["tolerance"] * report["proof"]["max_abs_logit"]
    assert report["loads_in"] == "transformers with trust_remote_code"
    model = runtime.load(tmp_path / "out")
    assert sparse(model)[0].router.get_parameter("weight" if kind != "cmoe" else "gate").dtype == torch.float32
    generated = model.generate(IDS[:2], max_new_tokens=4, do_sample=False)
    assert generated.shape == (2, IDS.shape[1] + 4)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_wrong_tensor_fails_the_proof(streamed, models, tmp_path):
    source, plan = models("llama"), split_plan(KINDS["tomoe"])
    apply(source, plan, tmp_path / "out", prove=False)
    assert "error" not in prove(source, tmp_path / "out", plan, streamed)
    other = split_plan(KINDS["tomoe"], seed=5)
    assert "logits differ" in prove(source, tmp_path / "out", other, streamed)["error"]


def test_tokens_after_one_that_rounding_decides_are_left_out_of_the_proof(models, tmp_path, monkeypatch):
    source, plan = models("llama"), split_plan(KINDS["oracle_neurons"])
    apply(source, plan, tmp_path / "out", prove=False)
    own = LiveSplit._token

    def undecided(self, x):
        row = own(self, x)
        self.decided[-1] = len(self.decided) % LENGTH != 6  # the sixth token of each sequence
        return row

    monkeypatch.setattr(LiveSplit, "_token", undecided)
    report = prove(source, tmp_path / "out", plan)
    assert (report["tokens"], "error" in report) == (ROWS * 5, False)
    other = split_plan(replace(KINDS["oracle_neurons"], k=9))
    assert "logits differ" in prove(source, tmp_path / "out", other)["error"]


@pytest.mark.parametrize("family", FAMILIES)
def test_all_units_on_is_the_dense_model(family, models, tmp_path):
    split = Split(**EVEN, router="linear", k=4, tensors_of=LINEAR)
    apply(models(family), split_plan(split), tmp_path / "out", prove=False)
    expected = logits(runtime.load(models(family)))
    model = runtime.load(tmp_path / "out")
    for backend in ("masked", "grouped"):
        set_backend(model, backend)
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def make_ffn(kind, **changes):
    """A sparse FFN with random weights, of hidden size 32."""
    stock = torch.nn.Module()
    for name, size in {"gate_proj": (32, WIDTH), "up_proj": (32, WIDTH), "down_proj": (WIDTH, 32)}.items():
        setattr(stock, name, torch.nn.Linear(*size, bias=False))
    stock.act_fn = torch.nn.SiLU()
    torch.manual_seed(1)
    split = replace(KINDS[kind], **changes)
    modules = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj", "activation": "act_fn"}
    ffn = SparseFFN(stock, modules, split.settings())
    for parameter in ffn.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return ffn


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["dsmoe", "tomoe", "cmoe"])
def test_pieces_and_rows_that_are_copied_give_the_same(kind, dtype, copied, monkeypatch):
    taken = []
    own = sparse_ffn._taken
    monkeypatch.setattr(sparse_ffn, "_taken", lambda weight, rows: (taken.append(len(rows)), own(weight, rows))[1])
    monkeypatch.setattr(sparse_ffn, "PIECE", 2**40 if copied else 0)
    monkeypatch.setattr(sparse_ffn, "COMPILED", 2**40 if copied else -(2**20))
    monkeypatch.setattr(sparse_ffn, "COPIED", 3 * 32 * dtype.itemsize * 5)  # five neurons at once
    ffn = make_ffn(kind).to(dtype)
    ffn.router.float()
    hidden = torch.randn(23, 32, dtype=dtype)
    with torch.inference_mode():
        ffn.backend = "grouped"
        found = ffn(hidden)
        single = torch.cat([ffn(token[None]) for token in hidden])
        ffn.backend = "masked"
        expected = ffn(hidden)
    many = any(len(ffn._merged(tuple(unit), 0)) > 1 for unit in ffn.units)
    assert bool(taken) == (copied and many)
    assert not taken or max(taken) == 5
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    torch.testing.assert_close(single, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["dsmoe", "tomoe", "cmoe"])
def test_adapters_count_in_training_and_inference(kind):
    from peft import LoraConfig, inject_adapter_in_model

    ffn = make_ffn(kind)
    names = ["gate_proj", "up_proj", "down_proj"]
    inject_adapter_in_model(LoraConfig(r=2, target_modules=names, init_lora_weights=False), ffn)
    merged = make_ffn(kind).eval()
    with torch.no_grad():
        merged.router.load_state_dict(ffn.router.state_dict())
        for name in names:
            layer = getattr(ffn, name)
            getattr(merged, name).weight.copy_(layer.base_layer.weight + layer.get_delta_weight("default"))
    hidden = torch.randn(23, 32)
    ffn.train()(hidden).square().sum().backward()
    assert all(float(p.grad.abs().max()) > 0 for name, p in ffn.named_parameters() if ".lora_" in name)
    with torch.inference_mode():
        for rows in (hidden, hidden[:1]):
            merged.backend = "grouped"
            torch.testing.assert_close(ffn.eval()(rows), merged(rows), rtol=1e-4, atol=1e-4)


def test_rows_are_copied_by_numbers_that_lie_where_the_weights_do(monkeypatch):
    """A GPU takes no others; the device `meta` would."""
    own, devices = sparse_ffn._taken, []
    monkeypatch.setattr(sparse_ffn, "_taken", lambda weight, rows: (devices.append(rows.device), own(weight, rows))[1])
    monkeypatch.setattr(sparse_ffn, "PIECE", 2**40)
    ffn = make_ffn("tomoe")
    unit = next(tuple(unit) for unit in ffn.units if len(ffn._merged(tuple(unit), 0)) > 1)
    for name in ("cpu", "meta", "cpu"):
        weight = ffn.to_empty(device=name).up_proj.weight
        devices.clear()
        ffn._unit(weight.new_empty(5, 32), weight.new_empty(5, 1), unit)
        assert set(devices) == {torch.device(name)}


@pytest.mark.parametrize("kind", ["dsmoe", "tomoe", "mlp", "cmoe", "analytic"])
def test_under_autocast_routers_compute_in_float32_and_the_rest_does_not(kind, monkeypatch):
    monkeypatch.setattr(sparse_ffn, "UNIT", 0)
    monkeypatch.setattr(sparse_ffn, "PIECE", 0)
    ffn, hidden = make_ffn(kind).eval(), torch.randn(40, 32)
    for backend in ("masked", "grouped"):
        ffn.backend = backend
        with torch.no_grad():
            weights, expected = ffn.router(hidden, ffn._activation), ffn(hidden)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert torch.equal(ffn.router(hidden, ffn._activation), weights)
                found = ffn(hidden)
        assert not torch.equal(found.float(), expected)
        torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.03 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["dsmoe", "tomoe", "mlp", "cmoe", "analytic"])
def test_cast_as_a_whole_a_router_computes_in_float32_with_rounded_weights(kind):
    """As model.half() casts it; a checkpoint that is loaded in half precision keeps its routers in float32."""
    cast, rounded = make_ffn(kind).eval().bfloat16(), make_ffn(kind).eval()
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.bfloat16())
    hidden = torch.randn(40, 32).bfloat16()
    with torch.no_grad():
        weights = rounded.router(hidden, rounded._activation)
        assert torch.equal(cast.router(hidden, cast._activation), weights)
        expected = rounded(hidden.float())
        for cast.backend in ("masked", "grouped"):
            torch.testing.assert_close(cast(hidden).float(), expected, rtol=0, atol=0.03 * float(expected.abs().max()))


def test_grouping_is_left_where_it_would_take_longer(monkeypatch):
    ffn, calls = make_ffn("dsmoe", threshold=0.5).eval(), []
    monkeypatch.setattr(ffn, "_masked", lambda hidden, weights: calls.append(len(hidden)) or hidden)
    with torch.inference_mode():
        ffn(torch.randn(23, 32))  # so small that calls take longer than products
        assert calls == [23]
        monkeypatch.setattr(sparse_ffn, "UNIT", 0)
        monkeypatch.setattr(sparse_ffn, "PIECE", 0)
        ffn(torch.randn(230, 32))
        ffn(torch.randn(1, 32))
    assert calls == [23]


def test_gradients_are_those_of_the_formula():
    """DSMoE, equations 10 to 16: blocks that do not run have no gradient, their gates have."""
    ffn = make_ffn("dsmoe").train()
    x = torch.randn(5, 32)
    ffn(x).square().sum().backward()
    got = {name: p.grad.clone() for name, p in ffn.named_parameters()}
    ffn.zero_grad()
    q = (x @ ffn.router.weight.T).sigmoid()
    chosen = (q > 0.5).float()
    passed = (q * chosen).detach() + q - q.detach()
    output = 0
    for block in range(4):
        rows = slice(12 * block, 12 * block + 12)
        inner = torch.nn.functional.silu(x @ ffn.gate_proj.weight[rows].T) * (x @ ffn.up_proj.weight[rows].T)
        output = output + inner @ ffn.down_proj.weight[:, rows].T * passed[:, block : block + 1]
    (output * 4 / chosen.sum(1, keepdim=True)).square().sum().backward()
    for name, parameter in ffn.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("straight_through", [True, False])
def test_gates_of_blocks_that_do_not_run_learn_only_straight_through(straight_through):
    ffn = make_ffn("dsmoe").train()
    ffn.router.straight_through = straight_through
    with torch.no_grad():
        ffn.router.weight[2] = 0  # its gate is 0.5 on every token, which is not over the threshold
    ffn(torch.randn(6, 32)).sum().backward()
    assert bool(ffn.router.weight.grad[2].any()) == straight_through
    assert not ffn.up_proj.weight.grad[24:36].any()


def test_a_token_for_which_no_gate_fires_runs_the_largest():
    ffn = make_ffn("dsmoe", threshold=0.9999).eval()
    x = torch.randn(7, 32)
    with torch.no_grad():
        weights = ffn.router(x, None)
        best = (x @ ffn.router.weight.T).argmax(1)
        assert torch.isfinite(ffn(x)).all()
    assert ((weights != 0).sum(1) == 1).all()
    assert (weights.argmax(1) == best).all()
    assert (ffn.active_neurons(weights) == 12).all()


@pytest.mark.parametrize("kind", ["dsmoe", "two_overlapping", "cmoe", "threshold_one"])
def test_active_neurons_are_counted_once(kind):
    ffn = make_ffn(kind).eval()
    with torch.no_grad():
        weights = ffn.router(torch.randn(20, 32), ffn.act_fn)
    counted = ffn.active_neurons(weights).tolist()
    for row, found in zip(weights, counted, strict=True):
        used = {s for unit, weight in enumerate(row.tolist()) if weight for s in ffn.units[unit]}
        used |= set(range(ffn.shared))
        assert found == sum(ffn.segments[s] for s in used)


def test_another_threshold_is_a_plan_of_its_own(models, tmp_path):
    apply(models("llama"), split_plan(KINDS["dsmoe"]), tmp_path / "half", prove=False)
    later = Plan({"name": "threshold"}, {layer: (Threshold(0.8),) for layer in range(LAYERS)})
    report = apply(tmp_path / "half", later, tmp_path / "less")
    assert "error" not in report["proof"]
    model, before = runtime.load(tmp_path / "less"), runtime.load(tmp_path / "half")
    for ffn in sparse(before):
        ffn.router.threshold = 0.8
    assert torch.equal(logits(model), logits(before))
    whole = json.loads((tmp_path / "less" / "plan.json").read_text())["layers"]["0"]
    assert [operation["op"] for operation in whole] == ["split", "threshold"]
    with pytest.raises(UserError, match=r"layer 0: split cannot follow split"):
        apply(tmp_path / "half", split_plan(KINDS["dsmoe"]), tmp_path / "twice")
    (tmp_path / "half" / "plan.json").unlink()
    with pytest.raises(UserError, match=r"layer 0 was split already, split cannot follow; only another threshold can"):
        apply(tmp_path / "half", split_plan(KINDS["dsmoe"]), tmp_path / "twice")


BAD = {
    "neurons is missing": Split((20,)),
    "segments hold 60 neurons; the FFN has 48": Split((60,)),
    r"units use 3 segments; those that are not shared are 4": Split(
        (12, 12, 12, 12), ((0,), (1,), (2,)), router="linear", k=1, tensors_of={"weight": "0.w"}
    ),
    r"units\[0\]=\[1, 0\] must be ascending segments": Split(
        (24, 24), ((1, 0),), router="linear", k=1, tensors_of={"weight": "0.w"}
    ),
    r"k=5 is not a whole number in 1..4": replace(KINDS["tomoe"], k=5),
    r"choose=threshold takes threshold, and that only": replace(KINDS["dsmoe"], k=2),
    r"threshold=1.5 lies outside": replace(KINDS["dsmoe"], threshold=1.5),
    r"router=linear needs \['weight'\]": replace(KINDS["dsmoe"], tensors_of={}),
    r"router='liner'; did you mean linear": replace(KINDS["dsmoe"], router="liner"),
    r"weights=score needs router=analytic": replace(KINDS["tomoe"], weights="score"),
    r"level=neurons is of router=oracle only": replace(KINDS["tomoe"], level="neurons"),
    r"shared=9, of 4 segments": replace(KINDS["cmoe"], shared=9),
    r"hidden_units=0 is of router=mlp": replace(KINDS["mlp"], hidden_units=0),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_what_contradicts_itself_is_refused(message, models):
    with pytest.raises(UserError, match=f"plan, layer 0: split.*{message}"):
        BAD[message].check(0, Checkpoint(models("llama")).dense_shape())


def test_each_kind_of_model_has_its_operations(models, tmp_path):
    dense, moe = Checkpoint(models("llama")), Checkpoint(save_tiny("mixtral", tmp_path))
    with pytest.raises(UserError, match=r"layer 0: keep is for Mixture-of-Experts models; family llama is dense"):
        Plan({"name": "x"}, {0: (Keep((0, 1)),)}).check(dense.dense_shape())
    with pytest.raises(UserError, match=r"layer 0: split is for the FFN of a dense model; family mixtral has experts"):
        Plan({"name": "x"}, {0: (KINDS["dsmoe"],)}).check(moe.shape())
    with pytest.raises(
        UserError, match=r"model_type='mixtral' is no dense family that Espalier can split; known: gemma"
    ):
        moe.dense_shape()


def test_a_plan_survives_its_file(models, tmp_path):
    plan = split_plan(KINDS["tomoe"])
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded.layers == plan.layers
    assert loaded.check(Checkpoint(models("llama")).dense_shape()).document() == plan.document()


def test_a_checkpoint_is_not_larger_than_the_model_and_its_routers(models, tmp_path):
    apply(models("llama"), split_plan(KINDS["tomoe"]), tmp_path / "out", prove=False)
    routers = LAYERS * 4 * 32
    dropped = LAYERS * (WIDTH - KINDS["tomoe"].width) * 3 * 32
    assert Checkpoint(tmp_path / "out").parameters == Checkpoint(models("llama")).parameters + routers - dropped


@pytest.mark.parametrize("gap", [0, 32])
@pytest.mark.parametrize("kind", ["tomoe", "two_overlapping", "cmoe", "llama_moe", "dsmoe", "threshold_one"])
def test_a_single_token_in_bf16_reads_rows_wherever_they_lie(kind, gap, monkeypatch):
    """Segments apart from each other, in and out of reach of one piece, against the formula in float64."""
    monkeypatch.setattr("espalier.modeling.sparse_ffn.GAP", gap)
    monkeypatch.setattr("espalier.modeling.sparse_ffn.ALIGN", 4)
    ffn = make_ffn(kind).bfloat16().eval()
    ffn.router.float()
    rows = torch.randn(20, 32, generator=torch.Generator().manual_seed(3)).bfloat16()
    seen = set()
    with torch.inference_mode():
        for x in rows:
            weights = ffn.router(x[None], ffn.act_fn)
            seen.add(tuple(weights[0].nonzero()[:, 0].tolist()))
            gate, up = ffn.gate_proj.weight.double() @ x.double(), ffn.up_proj.weight.double() @ x.double()
            inner = torch.nn.functional.silu(gate) * up * ffn.neuron_weights(weights)[0]
            expected = ffn.down_proj.weight.double() @ inner
            found = ffn(x[None])[0].double()
            assert float((found - expected).abs().max()) <= 0.03 * float(expected.abs().max())
    assert len(seen) > 1
