"""Models that run: shipped blocks against plain loops over tokens, counting of experts, generation."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from espalier.checkpoints.checkpoint import Checkpoint
from espalier.errors import UserError
from espalier.families import family_of
from espalier.models import runtime
from espalier.plans.operations import Merge, Skip
from espalier.plans.plan import Plan
from espalier.surgery.apply import apply
from example_plans import example_plan, examples, moe_layers
from plain_block import plain_block
from tiny import FAMILIES, ONE_EXPERT, VOCABULARY

IDS = torch.arange(3 * 10).reshape(3, 10) * 11 % VOCABULARY


def routed(block, hidden):
    """Return the routed part of a block, [T, D], and the distinct experts that each token gave to the kernel."""
    seen = {}

    def watch(experts, inputs):
        seen["indices"], seen["none"] = inputs[1:2], experts.num_experts

    handle = block.experts.register_forward_pre_hook(watch)
    router = block.gate if hasattr(block, "gate") else block.router
    beside = [block.e_score_correction_bias] if hasattr(block, "e_score_correction_bias") else []
    with torch.inference_mode():
        first, second, *indices = router(hidden, *beside)
        if indices:
            output = block.experts(hidden, *indices, second)
            (seen["indices"],) = seen["indices"]
        else:  # Llama 4: first are scores [T, E], 0 for all but one
            output = block(hidden)[0] - block.shared_expert(hidden)
            seen["indices"] = torch.stack([row.nonzero()[:, 0] for row in first])
    handle.remove()
    return output, [len(set(row) - {seen["none"]}) for row in seen["indices"].tolist()], seen


@pytest.mark.parametrize(("family_name", "kind"), examples())
def test_block_equals_a_plain_loop_over_tokens(family_name, kind, applied):
    source, out, plan = applied(family_name, kind)
    layer = 2
    hidden = torch.randn(40, 32, generator=torch.Generator().manual_seed(3))
    expected, counts = plain_block(source, layer, plan.layers[layer], hidden, plan.tensors)
    model = runtime.load(out)
    family = family_of(Checkpoint(source).config)
    found, distinct, seen = routed(runtime.moe_blocks(model, family)[layer], hidden)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert distinct == counts
    # Each expert at most once a token: nothing runs twice.
    assert sum((row != seen["none"]).sum().item() for row in seen["indices"]) == sum(counts)
    if kind in ("skip", "keep_skip", "remap_skip") or (kind == "remap" and family_name not in ONE_EXPERT):
        assert 40 < sum(counts) < 80, "the example must skip or share for some tokens, not for all"
    live = runtime.live(runtime.load(source), plan, family)
    reference, _, _ = routed(runtime.moe_blocks(live, family)[layer], hidden)
    torch.testing.assert_close(reference.double(), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("rule", ["remap", "tail", "both"])
def test_block_equals_a_plain_loop_with_four_experts_a_token(rule, tmp_path, tiny_model):
    source = tiny_model("qwen2_moe", top_k=4, experts=10)
    groups = ((0, 4, 9), (1, 2), (3, 5, 7), (6,), (8,))
    merge = Merge(groups, tuple((1 / len(g),) * len(g) for g in groups))
    skip = Skip(0.15, "tail")
    operations = {"remap": (merge,), "tail": (skip,), "both": (merge, skip)}[rule]
    apply(source, Plan({"name": "x"}, dict.fromkeys((0, 2), operations)), tmp_path / "out", prove=False)
    hidden = torch.randn(60, 32, generator=torch.Generator().manual_seed(4))
    expected, counts = plain_block(source, 2, operations, hidden)
    found, distinct, _ = routed(runtime.load(tmp_path / "out").model.layers[2].mlp, hidden)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert distinct == counts
    assert len(set(counts)) >= 3


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_kernel_leaves_out_no_expert_entries(implementation, applied):
    _, out, _ = applied("mixtral", "remap_skip")
    model = runtime.load(out)
    with torch.inference_mode():
        expected = model(input_ids=IDS).logits
        model.set_experts_implementation(implementation)
        found = model(input_ids=IDS).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize(("family_name", "kind"), examples("remap_skip") + [(name, "remap") for name in ONE_EXPERT])
def test_generate_with_left_padding_and_cache_equals_plain_decoding(family_name, kind, applied):
    _, out, _ = applied(family_name, kind)
    model = runtime.load(out)
    prompts, new = [[5, 9, 31, 7, 80, 12], [44, 3, 17]], 6
    ids = torch.tensor([prompts[0], [0, 0, 0, *prompts[1]]])
    mask = torch.tensor([[1] * 6, [0] * 3 + [1] * 3])
    settings = {
        "max_new_tokens": new,
        "min_new_tokens": new,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    with torch.inference_mode():
        generated = model.generate(input_ids=ids, attention_mask=mask, **settings)[:, 6:].tolist()
        for prompt, found in zip(prompts, generated, strict=True):
            sequence = list(prompt)
            for _ in range(new):  # no cache, no padding
                sequence.append(int(model(input_ids=torch.tensor([sequence]), use_cache=False).logits[0, -1].argmax()))
            assert found == sequence[len(prompt) :]


@pytest.mark.parametrize("kind", ["remap_skip", "keep"])
def test_count_active_counts_what_runs_without_padding(kind, applied):
    _, out, plan = applied("qwen2_moe", kind)
    model, family = runtime.load(out), family_of(Checkpoint(out).config)
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    mask[2, 7:] = 0
    hidden = {}
    handles = [
        model.model.layers[layer].mlp.gate.register_forward_pre_hook(
            lambda module, inputs, layer=layer: hidden.update({layer: inputs[0]})
        )
        for layer in (0, 2)
    ]
    with torch.inference_mode(), runtime.count_active(model, family) as counter:
        model(input_ids=IDS, attention_mask=mask)
    for handle in handles:
        handle.remove()
    source = applied("qwen2_moe", kind)[0]
    expected = {}
    for layer in (0, 2):
        _, counts = plain_block(source, layer, plan.layers[layer], hidden[layer])
        chosen = [count for count, kept in zip(counts, mask.reshape(-1).tolist(), strict=True) if kept]
        expected[layer] = sum(chosen) / len(chosen)
    assert counter.means() == pytest.approx(expected)
    assert counter.tokens == {0: 23, 2: 23}
    # A mask that the model does not see: attention differs, the same tokens count.
    with torch.inference_mode(), runtime.count_active(model, family) as counter:
        counter.mask = mask
        model(input_ids=IDS)
        assert counter.tokens == {0: 23, 2: 23}
        counter.mask = mask[:, :3]
        with pytest.raises(ValueError, match="the mask has 9 tokens, the layer runs 30"):
            model(input_ids=IDS)
    assert (
        not any(block.experts._forward_pre_hooks for block in runtime.moe_blocks(model, family).values())
        or kind != "keep"
    )


def test_count_active_follows_generation(applied):
    _, out, _ = applied("olmoe", "keep")
    model, family = runtime.load(out), family_of(Checkpoint(out).config)
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    with torch.inference_mode(), runtime.count_active(model, family) as counter:
        model.generate(IDS[:2, :3], attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert counter.tokens == {0: 9, 1: 9, 2: 9}  # 5 of the prompts, then 2 new ones twice
    assert counter.means() == {0: 2.0, 1: 2.0, 2: 2.0}


def test_moe_blocks_leave_out_dense_layers(tiny_model):
    for family_name in FAMILIES:
        source = tiny_model(family_name)
        model = runtime.load(source)
        assert list(runtime.moe_blocks(model, family_of(Checkpoint(source).config))) == moe_layers(family_name)
        assert not model.training


def test_load_takes_a_dtype_and_needs_whole_weights(tmp_path, tiny_model, applied):
    assert runtime.load(tiny_model("olmoe"), "bfloat16").dtype == torch.bfloat16
    model = runtime.load(applied("olmoe", "remap")[1], torch.bfloat16)
    assert model.model.layers[0].mlp.expert_map.dtype == torch.int64
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        runtime.load(tmp_path)
    # Without its own code a remapped checkpoint is refused rather than misread.
    with pytest.raises(UserError, match=r"mismatched keys .*gate.weight \[8, 32\] \(config.json: \[4, 32\]\)"):
        runtime.load(applied("olmoe", "remap")[1], trust=False)


def test_shipped_model_survives_save_pretrained_and_its_auxiliary_loss(tmp_path, applied):
    _, out, _ = applied("mixtral", "uneven_remap")
    model = runtime.load(out)
    with torch.inference_mode():
        expected = model(input_ids=IDS)
        loss = model(input_ids=IDS, labels=IDS, output_router_logits=True).aux_loss
    assert loss.isfinite()
    model.save_pretrained(tmp_path / "again")
    again, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", trust_remote_code=True, output_loading_info=True
    )
    assert not any(loading.values())
    with torch.inference_mode():
        assert torch.equal(again.eval()(input_ids=IDS).logits, expected.logits)


def test_shipped_model_trains_through_skipped_entries(applied):
    model = runtime.load(applied("qwen3_moe", "remap_skip")[1])
    model(input_ids=IDS, labels=IDS).loss.backward()
    block = model.model.layers[0].mlp
    for parameter in (block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj):
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().max() > 0


def test_live_needs_no_more_than_the_plan_says(tiny_model):
    source = tiny_model("mixtral")
    family = family_of(Checkpoint(source).config)
    before = runtime.load(source).state_dict()
    plan = Plan({"name": "x"}, {1: example_plan("mixtral", "tie").layers[1]})
    after = runtime.live(runtime.load(source), plan, family).state_dict()
    changed = sorted(name for name in before if not torch.equal(before[name], after[name]))
    assert changed == ["model.layers.1.mlp.experts.down_proj", "model.layers.1.mlp.experts.gate_up_proj"]
