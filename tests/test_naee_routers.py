"""NAEE's re-routing and losses against the real routers and blocks of every family, with experts really removed."""

import copy
from itertools import combinations, product

import numpy as np
import pytest
import torch

from espalier.checkpoints.checkpoint import Checkpoint
from espalier.collecting.collect import collect
from espalier.errors import UserError
from espalier.families import family_of
from espalier.methods.naee import Naee
from espalier.methods.rerouting import Routing, needs_correction, router_of
from espalier.methods.subset_loss import BlockLoss
from espalier.models.experts import ExpertWeights
from espalier.models.runtime import change_block, load, moe_blocks
from espalier.plans.operations import Keep
from tiny import FAMILIES, ONE_EXPERT, VOCABULARY

GROUPED = ("deepseek_v2", "deepseek_v3")
# Their weights depend on experts that are not chosen, or their order does on which are there.
UNBOUNDED = (*GROUPED, "olmoe", "qwen2_moe", "jamba", "phimoe", "ernie4_5_moe")
CHANGES = {"deepseek_v3": {"routed_scaling_factor": 2.5}, "glm4_moe": {"routed_scaling_factor": 1.7}}


def make(family_name, tiny_model, **changes):
    directory = tiny_model(family_name, **(CHANGES.get(family_name, {}) | changes))
    checkpoint = Checkpoint(directory)
    return directory, checkpoint.shape(), checkpoint.family


def rule(shape, directory, layer):
    experts = ExpertWeights(directory)
    correction = experts.correction(layer)
    assert (correction is not None) == needs_correction(shape)
    return router_of(shape, "test", None if correction is None else correction.double().numpy(), experts.margin)


def subsets(shape, removed):
    """Every set of kept experts with equally many of each router group."""
    size = shape.experts // shape.groups
    each = [combinations(range(g * size, (g + 1) * size), size - removed // shape.groups) for g in range(shape.groups)]
    return [tuple(e for part in parts for e in part) for parts in product(*each)]


def routed(block, family, hidden, kept=None):
    """What the stock router gives for `hidden` [T, D]: logits, weights, indices; only `kept` experts are left."""
    block, seen = copy.deepcopy(block), []
    if kept is not None:
        change_block(block, [Keep(kept)], family, True)
    getattr(block, family.router_module).register_forward_hook(lambda _, args, output: seen.append(output))
    with torch.no_grad():
        block(hidden[None])
    return seen[0]


@pytest.mark.parametrize("family_name", FAMILIES)
def test_rerouting_equals_the_real_router_with_rows_removed(family_name, tiny_model):
    directory, shape, family = make(family_name, tiny_model, **({} if family_name in ONE_EXPERT else {"top_k": 2}))
    model = load(directory, torch.float32)
    layer = shape.layers[-1]
    block = moe_blocks(model, family)[layer]
    hidden = torch.randn(60, shape.hidden, generator=torch.Generator().manual_seed(0))
    whole = routed(block, family, hidden)
    logits = whole[1] if family.scales_input else whole[0]
    routing = Routing(rule(shape, directory, layer), logits.numpy())
    rows, factors = np.arange(60), []
    changed = 0
    for kept in [tuple(range(8)), *subsets(shape, 2)[::5], *subsets(shape, 4)[::7]]:
        there = np.zeros((60, 8), bool)
        there[:, kept] = True
        chosen, weights = routing.route(rows, there)
        real = routed(block, family, hidden, None if len(kept) == 8 else kept)
        if family.scales_input:
            expected = {t: {kept[int(real[1][t].argmax())]: 1.0} for t in range(60)}
        else:
            expected = {
                t: {kept[e]: w for e, w in zip(real[2][t].tolist(), real[1][t].tolist(), strict=True)}
                for t in range(60)
            }
        for t in range(60):
            assert set(chosen[t].tolist()) == set(expected[t])
            factors.append([expected[t][e] / w for e, w in zip(chosen[t].tolist(), weights[t], strict=True)])
            changed += set(chosen[t]) != set(routing.route(rows[t : t + 1], np.ones((1, 8), bool))[0][0])
    assert changed > 60
    # One constant, whatever is removed: what the search finds from the statistics.
    expected = {"deepseek_v2": 1.5, "deepseek_v3": 2.5, "glm4_moe": 1.7}.get(family_name, 1.0)
    np.testing.assert_allclose(factors, expected, rtol=2e-5)


@pytest.mark.parametrize("family_name", FAMILIES)
@pytest.mark.parametrize("loss", ["single", "chunked"])
def test_the_search_finds_the_best_of_all_really_pruned_blocks(family_name, loss, tiny_model):
    """Every subset's loss by running the stock block with only its experts, in float64."""
    directory, shape, family = make(family_name, tiny_model)
    ids = torch.randint(3, VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(1))
    model = load(directory, torch.float32)
    layer, removed = shape.layers[-1], 4 if family_name in GROUPED else 2
    block, inputs = moe_blocks(model, family)[layer], []
    handle = block.register_forward_pre_hook(lambda _, args: inputs.append(args[0].clone()))
    with torch.no_grad():
        model(ids)
    handle.remove()
    hidden = inputs[0].double().reshape(1, 36, -1)
    stats = collect(load(directory, torch.float32), shape, family, ids, None, ["residual_gram"], batch_size=2)

    def output(kept=None):
        changed = copy.deepcopy(block).double()
        if kept is not None:
            change_block(changed, [Keep(kept)], family, True)
        with torch.no_grad():
            found = changed(hidden)
        return (found[0] if isinstance(found, tuple) else found).reshape(36, -1)

    z = output()
    error = {kept: (output(kept) - z).square().sum(-1) for kept in subsets(shape, removed)}
    chunks = [range(36)] if loss == "single" else [range(18), range(18, 36)]
    losses = {kept: sum(float(e[list(chunk)].sum()) ** 0.5 for chunk in chunks) for kept, e in error.items()}
    method = Naee(removed / 8, loss, chunk_sequences=2, search="exact")
    method.check(shape, 36)
    plan = method.plan(stats, shape, ExpertWeights(directory)).check(shape)
    evidence, least = plan.evidence[layer], min(losses.values())
    close = {"rel": 2e-4, "abs": 1e-5}  # where the search says exactly 0, a block that runs rounds
    assert evidence["subsets"] == len(losses)
    assert losses[plan.layers[layer][0].experts] == pytest.approx(least, **close)
    assert [e["loss"] for e in evidence["best"]] == pytest.approx(sorted(losses.values())[:5], **close)
    for search in ("greedy", "branch_and_bound"):
        other = Naee(removed / 8, loss, chunk_sequences=2, search=search)
        if search == "branch_and_bound" and family_name in UNBOUNDED:
            with pytest.raises(UserError, match="has a bound for routers that pick"):
                other.check(shape, 36)
            continue
        other = other.plan(stats, shape, ExpertWeights(directory))
        (keep,) = other.layers[layer]
        assert other.evidence[layer]["loss"] == pytest.approx(losses[keep.experts], **close)
        if search == "branch_and_bound":
            assert losses[keep.experts] == pytest.approx(least, **close)
            assert other.evidence[layer]["optimal"]


@pytest.mark.parametrize(
    ("family_name", "changes"),
    [("mixtral", {"experts": 16}), ("qwen2_moe", {"experts": 60, "top_k": 4}), ("llama4_text", {"experts": 16})],
)
def test_among_equal_logits_in_bf16_a_token_chose_what_the_model_ran(family_name, changes, tiny_model):
    directory, shape, family = make(family_name, tiny_model, dtype="bfloat16", **changes)
    model = load(directory, torch.bfloat16)
    for block in moe_blocks(model, family).values():
        getattr(block, family.router_module).weight.data.mul_(0.35)  # logits of deviation 1: more are equal
    ids = torch.randint(3, VOCABULARY, (8, 128), generator=torch.Generator().manual_seed(1))
    stats = collect(model, shape, family, ids, None, ["residual_gram", "inputs"])
    for layer in shape.layers:
        arrays = stats.layer("residual_gram", layer)
        ordered = -np.sort(-arrays["logits"], axis=1)
        assert (ordered[:, shape.top_k - 1] == ordered[:, shape.top_k]).any()
        block = BlockLoss(arrays, np.zeros(1024, int), rule(shape, directory, layer))
        ran = np.sort(stats.layer("inputs", layer)["experts"], axis=1)
        np.testing.assert_array_equal(np.sort(block.chosen, axis=1), ran)


def test_a_router_that_does_not_do_what_the_shape_says_is_refused(tiny_model):
    """Statistics of Mixtral's router, read as those of one with two groups."""
    directory, shape, family = make("mixtral", tiny_model)
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    stats = collect(load(directory, torch.float32), shape, family, ids, None, ["residual_gram"])
    wrong = type(shape).from_document(shape.document() | {"groups": 2})
    with pytest.raises(UserError, match=r"statistics, layer 0: routed anew by its logits, .* Use method=reap"):
        Naee(0.25).plan(stats, wrong)
    unknown = type(shape).from_document(shape.document() | {"router": "hashed"})
    with pytest.raises(UserError, match=r"the router of mixtral \(hashed\) chooses without some"):
        Naee(0.25).check(unknown, 10)


def test_routers_that_need_their_parameters_ask_for_the_checkpoint(tiny_model):
    directory, shape, family = make("minimax_m2", tiny_model)
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    stats = collect(load(directory, torch.float32), shape, family, ids, None, ["residual_gram"])
    with pytest.raises(UserError, match="the router of minimax_m2 needs more than logits"):
        Naee(0.25).plan(stats, shape)
    assert family_of({"model_type": "minimax_m2"}) is family
