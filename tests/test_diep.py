"""DiEP's masks against the same model with scaled down projections, and what is learnt of experts that differ."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from espalier.checkpoints.checkpoint import Checkpoint
from espalier.collecting.stats import Stats
from espalier.errors import UserError
from espalier.fits.diep import Fit, masked
from espalier.methods.diep import Diep
from espalier.models import runtime
from espalier.models.running import Running
from espalier.plans.operations import Keep
from espalier.training.fit import fit as learn
from stats_factory import make_shape
from tiny import FAMILIES

CPU = Running.of(device="cpu", stream="never")
IDS = torch.tensor(np.random.default_rng(0).integers(3, 90, (2, 10)))
MASK = torch.ones_like(IDS)
MASK[0, -3:] = 0


def learner(directory, **own):
    checkpoint = Checkpoint(directory)
    model = runtime.load(directory, "float32").requires_grad_(False)
    return Fit(model, checkpoint.shape(), checkpoint.family, **own)


def drawn_masks(shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return 0.3 + 1.4 * torch.rand(len(shape.layers), shape.experts, generator=generator)


@torch.no_grad()
def scaled(directory, masks, dtype=torch.float64):
    """The model with every expert's down projection (and its bias) times its mask: what masks mean, the plain way."""
    model, checkpoint = runtime.load(directory, dtype), Checkpoint(directory)
    for mask, block in zip(masks, runtime.moe_blocks(model, checkpoint.family).values(), strict=True):
        for name, tensor in block.experts.named_parameters(recurse=False):
            if name.startswith("down_proj"):
                tensor *= mask.to(dtype).view(-1, *[1] * (tensor.dim() - 1))
    return model


def plain_loss(model, original, ids, mask):
    """The two terms of the loss, token by token, from the scaled model and the experts of the original one."""
    changes, handles = [], []
    blocks = [runtime.moe_blocks(m, Checkpoint(d).family) for m, d in (model, original)]
    for layer, block in blocks[0].items():
        before = blocks[1][layer].experts

        def compare(experts, inputs, output, before=before):
            difference = output - before(*inputs)
            if difference.shape[0] != mask.numel():  # Llama 4: every expert on every token
                difference = difference.view(experts.num_experts, -1, difference.shape[-1]).sum(0)
            changes.append(difference[mask.flatten().bool()].square().sum().sqrt())

        handles.append(block.experts.register_forward_hook(compare))
    logits = model[0](input_ids=ids, attention_mask=mask, use_cache=False).logits
    for handle in handles:
        handle.remove()
    losses = [
        -math.log(logits[b, n].softmax(-1)[ids[b, n + 1]])
        for b in range(ids.shape[0])
        for n in range(ids.shape[1] - 1)
        if mask[b, n] and mask[b, n + 1]
    ]
    return sum(losses) / len(losses), float(sum(changes))


@torch.no_grad()
def terms(directory, masks, ids=IDS, mask=MASK):
    return plain_loss(
        (scaled(directory, masks), directory), (runtime.load(directory, torch.float64), directory), ids, mask
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_at_the_start_the_masked_model_is_the_original_and_after_it_again(family, tiny_model):
    fit = learner(tiny_model(family), start=1.0)
    with torch.no_grad():
        before = fit.model(input_ids=IDS, use_cache=False).logits
        norms = []
        masks = dict(zip(fit.shape.layers, fit.masks(), strict=True))
        assert all((mask == 1).all() for mask in masks.values())
        with masked(fit.model, masks, fit.family, norms):
            inside = fit.model(input_ids=IDS, use_cache=False).logits
        after = fit.model(input_ids=IDS, use_cache=False).logits
    assert torch.allclose(inside, before, rtol=1e-5, atol=2e-6)
    assert torch.equal(after, before)
    assert norms == [0.0] * len(fit.shape.layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_scale_what_experts_add_in_every_family(family, tiny_model):
    directory = tiny_model(family)
    fit = learner(directory, start=1.0, penalty=0.5)
    masks = drawn_masks(fit.shape)
    with torch.no_grad():
        fit.alpha.copy_(masks.log())
        fit.beta.copy_(masks.mean(1))
        assert torch.allclose(fit.masks(), masks, rtol=1e-5)
        found = fit(IDS, MASK)
    lm, change = terms(directory, masks)
    assert found["lm"].item() == pytest.approx(lm, rel=1e-4)
    assert found["output"].item() == pytest.approx(0.5 * change, rel=1e-4)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "llama4_text", "gpt_oss"])
def test_gradients_equal_finite_differences(family, tiny_model):
    directory = tiny_model(family)
    fit = learner(directory, start=1.0, penalty=0.02)
    with torch.no_grad():
        fit.alpha.copy_(drawn_masks(fit.shape).log())
        fit.beta.copy_(torch.linspace(0.8, 1.2, len(fit.beta)))

    def slow(name, place, shift):
        values = {"alpha": fit.alpha.detach().double().clone(), "beta": fit.beta.detach().double().clone()}
        values[name][place] += shift
        masks = fit.shape.experts * values["alpha"].softmax(-1) * values["beta"][:, None]
        lm, change = terms(directory, masks)
        return lm + 0.02 * change

    for name, step, places in (("alpha", 0, ((0, 0), (1, 3), (0, 6))), ("beta", 3, ((0,), (1,)))):
        fit.zero_grad()
        sum(fit(IDS, MASK, step).values()).backward()
        still = {"alpha": fit.beta, "beta": fit.alpha}[name]
        assert still.grad is None
        for place in places:
            slope = (slow(name, place, 5e-3) - slow(name, place, -5e-3)) / 1e-2
            assert getattr(fit, name).grad[place].item() == pytest.approx(slope, rel=2e-3, abs=2e-5), (name, place)


def test_three_updates_of_alpha_come_before_each_of_beta(tiny_model):
    fit = learner(tiny_model("mixtral"), alternate=3)
    updated = []
    for step in range(8):
        fit.zero_grad()
        sum(fit(IDS, None, step).values()).backward()
        updated.append("alpha" if fit.beta.grad is None else "beta")
        assert (fit.alpha.grad is None) == (fit.beta.grad is not None)
    assert updated == ["alpha"] * 3 + ["beta"] + ["alpha"] * 3 + ["beta"]


def stats_of(alpha, beta, **changes):
    shape = replace(make_shape(len(alpha[0]), layers=tuple(range(len(alpha)))), **changes)
    arrays = {
        ("diep", layer): {"alpha": np.array(a, np.float32), "beta": np.array([b], np.float32)}
        for layer, (a, b) in enumerate(zip(alpha, beta, strict=True))
    }
    return Stats(shape, (), arrays), shape


def test_the_plan_keeps_the_largest_products_of_all_layers():
    alpha, beta = [[0.0, 1.0, 2.0, -1.0], [0.0, 0.1, 0.0, 0.2]], [1.0, 0.7]
    stats, shape = stats_of(alpha, beta)
    scores = {}
    for layer in (0, 1):
        total = sum(math.exp(a) for a in alpha[layer])
        for e in range(4):
            scores[layer, e] = beta[layer] * math.exp(alpha[layer][e]) / total
    plan = Diep(0.5).plan(stats, shape).check(shape)
    assert plan.evidence[0]["scores"] == pytest.approx([scores[0, e] for e in range(4)])
    assert plan.layers == {0: (Keep((1, 2)),), 1: (Keep((1, 3)),)}
    # 5 of 8 have to stay: the two best of each layer for the router, and the best of the others.
    best = max((0, 0), (0, 3), (1, 0), (1, 2), key=scores.__getitem__)
    kept = {0: {1, 2}, 1: {1, 3}}
    kept[best[0]].add(best[1])
    stats, shape = stats_of([*alpha, alpha[0], alpha[0]], [*beta, 1e-3, 1e-3])
    plan = Diep(0.25).plan(stats, shape).check(shape)
    lefts = [len(operation.experts) for (operation,) in plan.layers.values()]
    assert lefts == [4, 4, 2, 2]
    plan = Diep(0.25, budget="uniform").plan(stats, shape).check(shape)
    assert [len(operation.experts) for (operation,) in plan.layers.values()] == [3, 3, 3, 3]


def test_the_fit_does_not_depend_on_the_ratio_nor_the_budget():
    assert Diep(0.25).fit == Diep(0.5, budget="uniform").fit
    for key, value in (("penalty", 0.1), ("start", 1.0), ("rate", 0.1), ("epochs", 2), ("seed", 1), ("alternate", 2)):
        assert Diep(0.25, **{key: value}).fit != Diep(0.25).fit, key


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"budget": "most"}, r"budget=most is not available; available: uniform, global"),
        ({"penalty": -1}, r"penalty=-1 is not a number of at least 0"),
        ({"start": 0}, r"start=0 is not a number above 0"),
        ({"alternate": 0}, r"alternate=0 is not a whole number >= 1"),
        ({"epochs": 0}, r"epochs=0 is not a whole number >= 1"),
        ({"batch": "all"}, r"batch='all' is not a whole number >= 1"),
        ({"rate": 0}, r"rate=0 is not a number above 0"),
        ({"seed": -1}, r"seed=-1 is not a whole number >= 0"),
    ],
)
def test_bad_values_are_refused(keys, message):
    with pytest.raises(UserError, match=f"^conf/method/diep.yaml: {message}"):
        Diep(0.25, **keys)


def without_expert(directory, out, expert):
    """A copy of a model in which one expert of every layer adds nothing, though the router chooses it."""
    model, checkpoint = runtime.load(directory), Checkpoint(directory)
    with torch.no_grad():
        for block in runtime.moe_blocks(model, checkpoint.family).values():
            block.experts.down_proj[expert] = 0
    model.save_pretrained(out)
    return out


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3", "llama4_text"])
def test_an_expert_that_adds_nothing_is_dropped_first(family, tiny_model, tmp_path):
    directory = without_expert(tiny_model(family), tmp_path / "model", 3)
    ids = np.random.default_rng(2).integers(3, 90, (16, 16))
    fitting = Diep(0.5, rate=0.05, epochs=10, batch=4).fit
    stats, curve = learn(directory, fitting, ids, None, CPU, tmp_path / "state")
    assert sum(step.loss for step in curve[-4:]) < sum(step.loss for step in curve[:4])
    for layer, learnt in stats.layers("diep"):
        assert learnt["alpha"].argmin() == 3, layer
    plan = Diep(0.25).plan(stats, stats.shape)
    assert all(3 not in operations[0].experts for operations in plan.layers.values())


def test_permuting_the_experts_of_a_model_permutes_what_is_learnt(tiny_model, tmp_path):
    order = [3, 0, 7, 5, 1, 6, 2, 4]  # new expert i is the old order[i]
    model = runtime.load(tiny_model("mixtral"))
    with torch.no_grad():
        for block in runtime.moe_blocks(model, Checkpoint(tiny_model("mixtral")).family).values():
            for tensor in (block.experts.gate_up_proj, block.experts.down_proj, block.gate.weight):
                tensor.copy_(tensor[order].clone())
    model.save_pretrained(tmp_path / "permuted")
    ids = np.random.default_rng(3).integers(3, 90, (6, 12))
    fitting = Diep(0.5, epochs=2, batch=3).fit
    before, after = (
        learn(directory, fitting, ids, None, CPU, tmp_path / f"state{number}")[0]
        for number, directory in enumerate((tiny_model("mixtral"), tmp_path / "permuted"))
    )
    for (_, old), (_, new) in zip(before.layers("diep"), after.layers("diep"), strict=True):
        assert new["alpha"] == pytest.approx(old["alpha"][order], rel=1e-3, abs=1e-5)
        assert new["beta"] == pytest.approx(old["beta"], rel=1e-5)


def test_experts_out_of_reach_are_told(tiny_model, monkeypatch):
    fit = learner(tiny_model("mixtral"))
    for block in runtime.moe_blocks(fit.model, fit.family).values():
        monkeypatch.setattr(block.experts, "forward", lambda hidden, indices, weights: hidden)
    with pytest.raises(UserError, match=r"^model: 3 MoE blocks do not use transformers' experts interface"):
        fit(IDS, None)
