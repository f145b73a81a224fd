"""Progressive pruning against a slow model that is really pruned, layer by layer, every subset run."""

import copy
from itertools import combinations

import numpy as np
import pytest
import torch

import espalier
from espalier.artefacts.store import Store
from espalier.checkpoints.checkpoint import Checkpoint
from espalier.collecting.collect import collect_checkpoint
from espalier.collecting.sequential import plan_sequentially
from espalier.methods import is_sequential
from espalier.methods.naee import Naee
from espalier.models.experts import ExpertWeights
from espalier.models.running import Running
from espalier.models.runtime import change_block, load, moe_blocks
from espalier.plans.operations import Keep
from espalier.plans.plan import Plan
from espalier.workflow import graph
from tiny import VOCABULARY

pytestmark = pytest.mark.usefixtures("proof_here")

RUNNING = Running.of(device="cpu", collect_batch_size=2)
FAMILIES = ("mixtral", "olmoe", "deepseek_v2", "qwen2_moe", "gpt_oss", "llama4_text", "minimax_m2", "ernie4_5_moe")
IDS = torch.randint(3, VOCABULARY, (5, 9), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
MASK[1, 5:] = 0
MASK[4, 2:] = 0


def block_outputs(model, family, layer):
    """Input and output of a layer's MoE block on all tokens, [45, D] each, in float64."""
    block, seen = moe_blocks(model, family)[layer], []

    def see(_, args, output):
        output = output[0] if isinstance(output, tuple) else output
        seen.extend(x.detach().clone().reshape(-1, x.shape[-1]).double() for x in (args[0], output))

    handle = block.register_forward_hook(see)
    with torch.no_grad():
        model(IDS, attention_mask=MASK)
    handle.remove()
    return seen[0], seen[1]


def run(block, hidden):
    with torch.no_grad():
        output = block(hidden[None])
    output = output[0] if isinstance(output, tuple) else output
    return output.reshape(-1, output.shape[-1])


def removed_from(family_name):
    return 4 if family_name == "deepseek_v2" else 2


def candidates(shape, removed):
    found = combinations(range(8), 8 - removed)
    size = 8 // shape.groups
    return [k for k in found if len({sum(e // size == g for e in k) for g in range(shape.groups)}) == 1]


@pytest.mark.parametrize("family_name", FAMILIES)
def test_progressive_equals_really_pruning_one_layer_after_another(family_name, tiny_model):
    """Target: the uncompressed model's whole block, shared expert included, on the original stream."""
    directory = tiny_model(family_name)
    checkpoint = Checkpoint(directory)
    shape, family, removed = checkpoint.shape(), checkpoint.family, removed_from(family_name)
    method = Naee(removed / 8, mode="progressive", search="exact")
    assert is_sequential(method)
    plan = plan_sequentially(method, directory, "float32", RUNNING, IDS, MASK)
    original, pruned = load(directory, torch.float32), load(directory, torch.float32)
    rows = MASK.flatten().nonzero()[:, 0]
    for layer in shape.layers:
        _, target = block_outputs(original, family, layer)
        hidden, _ = block_outputs(pruned, family, layer)
        whole = moe_blocks(pruned, family)[layer]
        losses = {}
        for kept in candidates(shape, removed):
            block = copy.deepcopy(whole).double()
            change_block(block, [Keep(kept)], family, True)
            losses[kept] = float((run(block, hidden[rows]) - target[rows]).norm())
        (keep,) = plan.layers[layer]
        evidence = plan.evidence[layer]
        close = {"rel": 1e-3, "abs": 3e-4 * float(target[rows].norm())}  # Gram matrices are float32
        assert losses[keep.experts] == pytest.approx(min(losses.values()), **close)
        assert evidence["loss"] == pytest.approx(losses[keep.experts], **close)
        assert evidence["tokens"] == len(rows)
        change_block(whole, [keep], family, True)


@pytest.mark.parametrize("family_name", ["mixtral", "olmoe", "gpt_oss"])
def test_the_first_layer_is_that_of_layerwise_pruning_and_later_ones_are_not(family_name, tiny_model):
    directory = tiny_model(family_name)
    method = Naee(0.5)
    stats = collect_checkpoint(directory, "float32", RUNNING, IDS, MASK, method.probes)
    shape = Checkpoint(directory).shape()
    layerwise = method.plan(stats, shape, ExpertWeights(directory))
    progressive = plan_sequentially(Naee(0.5, mode="progressive"), directory, "float32", RUNNING, IDS, MASK)
    assert progressive.layers[0] == layerwise.layers[0]
    assert progressive.evidence[0]["loss"] == pytest.approx(layerwise.evidence[0]["loss"], rel=1e-3)
    assert progressive.evidence[0]["relative_loss"] == pytest.approx(layerwise.evidence[0]["relative_loss"], rel=1e-3)
    # Later layers also inherit the error of those before, whatever they keep.
    for layer in shape.layers[1:]:
        assert progressive.evidence[layer]["loss"] > 1.01 * layerwise.evidence[layer]["loss"]
    assert progressive.method["mode"] == "progressive"
    assert not is_sequential(method)


def test_the_number_of_sequences_in_a_batch_changes_nothing_but_rounding(tiny_model):
    directory = tiny_model("mixtral")
    method = Naee(0.5, mode="progressive")
    one = plan_sequentially(method, directory, "float32", RUNNING, IDS, MASK)
    running = Running.of(device="cpu", collect_batch_size=5)
    seen = []
    other = plan_sequentially(
        method, directory, "float32", running, IDS, MASK, progress=lambda done, total: seen.append((done, total))
    )
    assert one.layers == other.layers
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_one_call_prunes_progressively(tiny_model, tmp_path):
    """`compress` writes the plan that the pass over the layers makes, and proves the checkpoint against it."""
    directory = tiny_model("mixtral")
    np.savez(tmp_path / "tokens.npz", input_ids=IDS.numpy(), attention_mask=MASK.numpy())
    espalier.compress(
        directory,
        "naee",
        tmp_path / "tokens.npz",
        tmp_path / "out",
        dtype="float32",
        batch_size=2,
        device="cpu",
        results=tmp_path / "results",
        ratio=0.5,
        mode="progressive",
    )
    written = Plan.load(tmp_path / "out" / "plan.json")
    expected = plan_sequentially(Naee(0.5, mode="progressive"), directory, "float32", RUNNING, IDS, MASK)
    assert written.layers == expected.layers
    assert written.method["mode"] == "progressive"


def test_its_plan_hangs_on_the_tokens_and_has_no_statistics_of_its_own(tmp_path):
    sweep = "sweep=[{method: naee, method.mode: [layerwise, progressive]}]"
    nodes = {node.id: node for node in graph.expand("demo", [sweep], Store(tmp_path)).nodes}
    plans = {node.config["mode"]: node for node in nodes.values() if node.stage == "plan"}
    parents = {mode: [nodes[id].stage for id in plan.parents] for mode, plan in plans.items()}
    assert parents == {"layerwise": ["fetch", "probe"], "progressive": ["fetch", "tokens"]}
    assert plans["progressive"].config["dtype"] == "float32"
    reports = [node for node in nodes.values() if node.stage == "report"]
    assert "probe" in [nodes[id].stage for id in reports[0].parents]  # usage, for its figures
