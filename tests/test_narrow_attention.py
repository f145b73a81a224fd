"""Attention that loses dimensions: written checkpoints against plain masks, identity, storage, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dense_models import EVEN, FAMILIES, HIDDEN, LAYERS, LINEAR, WIDTH, live_split, made_once, split_plan
from espalier.checkpoints.checkpoint import Checkpoint
from espalier.errors import UserError
from espalier.models import runtime
from espalier.models.stream import StreamedModel
from espalier.plans.narrow_attention import ROLES, NarrowAttention, dimensions_of
from espalier.plans.plan import Plan
from espalier.plans.plan_tensors import PlanTensor
from espalier.plans.split import Split, Threshold
from espalier.surgery.apply import apply
from espalier.surgery.prove import prove
from tiny import VOCABULARY

pytestmark = pytest.mark.usefixtures("proof_here")

IDS = torch.arange(3 * 10).reshape(3, 10) * 7 % VOCABULARY
KINDS = ("pairs", "values", "both", "with_split")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return made_once(tmp_path_factory)


def plan_of(directory, kind, keep=0.6, offset=0.3):
    """Random pairs and masks of values in every layer; with_split also splits the FFNs."""
    shape = Checkpoint(directory).dense_shape()
    plan = split_plan(Split(**EVEN, router="linear", k=2, tensors_of=LINEAR))
    layers, tensors = {}, dict(plan.tensors)
    for layer in range(LAYERS):
        rng = np.random.default_rng(layer)
        own = {}
        if kind != "values":
            kept = np.sort(rng.permutation(shape.pairs)[: max(1, round(keep * shape.pairs))])
            tensors[f"{layer}.pairs"] = PlanTensor.of(kept)
            own |= {"pairs": f"{layer}.pairs", "kept": len(kept)}
        if kind != "pairs":
            names = {role: f"{layer}.values.{role}" for role in ROLES}
            own |= {"values": names, "embedding": 6, "offset": offset}
            for role, size in NarrowAttention(**own).value_shapes(HIDDEN, 2 * shape.pairs).items():
                tensors[names[role]] = PlanTensor.of(rng.normal(0, 1.0, size))
        narrow = NarrowAttention(**own)
        layers[layer] = (*plan.layers[layer], narrow) if kind == "with_split" else (narrow,)
    return Plan({"name": "example"}, layers, tensors=tensors)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_computes_what_the_plan_says(family, kind, models, tmp_path):
    source = models(family)
    plan = plan_of(source, kind)
    apply(source, plan, tmp_path / "out", prove=False)
    live = AutoModelForCausalLM.from_pretrained(source)
    live_split(live, plan, Checkpoint(source).dense_family)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    expected = logits(live)
    torch.testing.assert_close(logits(written), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, logits(AutoModelForCausalLM.from_pretrained(source)), atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_pair_and_dimension_kept_is_the_identity(family, models, tmp_path):
    source = models(family)
    apply(source, plan_of(source, "both", keep=1.0, offset=1e6), tmp_path / "out", prove=False)
    assert torch.equal(logits(runtime.load(tmp_path / "out")), logits(runtime.load(source)))


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi"])
def test_files_lose_what_the_plan_counts(family, models, tmp_path):
    source = models(family)
    shape, plan = Checkpoint(source).dense_shape(), plan_of(source, "both")
    apply(source, plan, tmp_path / "out", prove=False)
    stored = sum(p.numel() for p in runtime.load(tmp_path / "out").parameters())
    assert Checkpoint(tmp_path / "out").parameters == stored
    assert plan.parameter_counts(shape) == {"stored": stored, "unique": stored, "active": stored}
    before, after = runtime.load(source), runtime.load(tmp_path / "out")
    for layer in range(LAYERS):
        old, new = before.model.layers[layer].self_attn, after.model.layers[layer].self_attn
        assert new.q_proj.weight.shape[0] < old.q_proj.weight.shape[0]
        assert new.v_proj.weight.shape == old.v_proj.weight.shape
    assert shape.pair_parameters * shape.pairs * LAYERS == sum(
        getattr(layer.self_attn, name).weight.numel()
        + (0 if getattr(layer.self_attn, name).bias is None else getattr(layer.self_attn, name).bias.numel())
        for layer in before.model.layers
        for name in ("q_proj", "k_proj")
    )


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_it_generates_and_streams_and_is_proven(family, models, tmp_path):
    source, plan = models(family), plan_of(models(family), "with_split")
    report = apply(source, plan, tmp_path / "out")
    assert report["proof"]["max_abs_diff"] <= 1e-4 * report["proof"]["max_abs_logit"]
    assert "error" not in prove(source, tmp_path / "out", plan, streamed=True)
    model = runtime.load(tmp_path / "out")
    with torch.no_grad():
        out = model.generate(
            IDS[:1], attention_mask=torch.ones_like(IDS[:1]), max_new_tokens=6, do_sample=False, eos_token_id=None,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        whole = model(input_ids=out.sequences[:, :-1]).logits[:, IDS.shape[1] - 1 :]
    torch.testing.assert_close(torch.stack(out.logits, dim=1), whole, rtol=1e-4, atol=1e-5)
    assert StreamedModel(tmp_path / "out", torch.float32).weights.unexpected == []


def test_masks_stay_in_float32(models, tmp_path):
    apply(models("llama"), plan_of(models("llama"), "values"), tmp_path / "out", prove=False)
    model = runtime.load(tmp_path / "out", "bfloat16")
    attention = model.model.layers[0].self_attn.v_proj
    assert (attention.weight.dtype, attention.router.decode.dtype) == (torch.bfloat16, torch.float32)
    assert torch.isfinite(logits(model)).all()
    # Cast as a whole afterwards their weights are rounded; they still compute in float32.
    hidden, router = torch.randn(7, HIDDEN), attention.router
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(parameter.bfloat16())
        expected = router(hidden)
        model.bfloat16()
        assert router.decode.dtype == torch.bfloat16
        assert torch.equal(router(hidden), expected)
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize(("head", "rotary"), [(8, 8), (8, 4), (16, 8), (10, 6)])
def test_pairs_are_what_the_rotation_turns_together(head, rotary):
    """Turned by a rotary embedding, only the dimensions of a pair mix; the others are paired among themselves."""
    seen = []
    for pair in range(head // 2):
        first, second = dimensions_of([pair], head, rotary)
        seen += [first, second]
        assert (first < rotary) == (second < rotary)
        if first < rotary:
            assert second - first == rotary // 2  # transformers' rotate_half
    assert sorted(seen) == list(range(head))
    assert dimensions_of(list(range(head // 2)), head, rotary) == list(range(head))


def test_what_does_not_fit_is_refused(models, tmp_path):
    source = models("llama")
    shape, good = Checkpoint(source).dense_shape(), plan_of(source, "pairs")
    pairs = shape.pairs

    def message(*operations):
        with pytest.raises(UserError) as error:
            apply(source, Plan({}, {0: operations}, tensors=good.tensors), tmp_path / "out")
        return str(error.value)

    narrow = good.layers[0][0]
    assert f"kept={pairs + 1} is not a number of pairs in 1..{pairs}" in message(replace(narrow, kept=pairs + 1))
    assert "needs pairs with kept, or values, or both" in message(NarrowAttention())
    assert "with embedding=0" in message(NarrowAttention(values={"enter": "x"}))
    assert "takes one split and one narrow_attention" in message(narrow, narrow)
    assert "takes one split and one narrow_attention" in message(narrow, Threshold(0.2))
    assert "'0.pairs' of narrow_attention is I32" in message(replace(narrow, kept=narrow.kept + 1))
    apply(source, good, tmp_path / "once", prove=False)
    assert json.loads((tmp_path / "once/config.json").read_text())["espalier"]["attention"]["head"] == 2 * pairs
    with pytest.raises(UserError, match="narrow_attention cannot follow"):
        apply(tmp_path / "once", good, tmp_path / "twice", prove=False)
    assert shape.width == WIDTH
