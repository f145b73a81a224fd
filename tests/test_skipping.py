"""Checkpoints that skip experts by each rule: what runs, against plain loops; padding, caches, kernels, numbers."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from espalier.checkpoints.checkpoint import Checkpoint
from espalier.families import family_of
from espalier.models import runtime
from espalier.plans.operations import NO_ATTENTION_WEIGHTS, Merge, Skip
from espalier.plans.plan import Plan
from espalier.plans.plan_tensors import PlanTensor
from espalier.surgery.apply import apply
from example_plans import NO_SOFTMAX, example_plan, examples
from plain_block import plain_block
from tiny import FAMILIES, ONE_EXPERT, VOCABULARY

pytestmark = pytest.mark.usefixtures("proof_here")

IDS = torch.arange(3 * 10).reshape(3, 10) * 11 % VOCABULARY
RULES = ("skip", "skip_tail", "skip_top_p", "skip_fixed_k", "skip_factor", "skip_protect")
ATTENDED = [name for name in FAMILIES if name not in (*NO_ATTENTION_WEIGHTS, *ONE_EXPERT)]


def padded():
    """Four sequences: whole, padded on the left, padded on the right, of one token."""
    mask = torch.ones(4, 10, dtype=torch.int64)
    mask[1, :4] = 0
    mask[2, 7:] = 0
    mask[3, :9] = 0
    return torch.arange(40).reshape(4, 10) * 7 % 90 + 3, mask  # not 0, the padding, which is embedded as zeros


def most_important(weights, hidden, mask, fraction):
    """Flat numbers of the protected tokens: each sequence's most important, by loops over pairs of its tokens."""
    found = set()
    for row in range(len(mask)):
        tokens = [t for t in range(mask.shape[1]) if mask[row, t]]
        importance = {}
        for j in tokens:
            paid = [float(weights[row, head, i, j]) for head in range(weights.shape[1]) for i in tokens if i >= j]
            importance[j] = sum(abs(x) for x in hidden[row, j].tolist()) * sum(paid) / len(paid)
        number = math.ceil(fraction * len(tokens)) if len(tokens) > 1 else 0
        found |= {row * mask.shape[1] + j for j in sorted(tokens, key=lambda j: -importance[j])[:number]}
    return found


def watched(model, layer, family):
    """Keep what the layer's attention and experts get and give in the next forward pass."""
    seen = {}
    block = runtime.moe_blocks(model, family)[layer]
    attention = runtime.decoder(model).layers[layer].self_attn
    handles = [
        attention.register_forward_hook(lambda _, args, out: seen.__setitem__("attention", out[1])),
        block.register_forward_pre_hook(lambda _, args: seen.__setitem__("hidden", args[0])),
        block.experts.register_forward_hook(lambda _, args, out: seen.update(indices=args[1], output=out)),
    ]
    return seen, handles


@pytest.mark.parametrize("kind", ["skip_protect", "remap_skip_protect"])
@pytest.mark.parametrize("family_name", ATTENDED)
def test_the_most_important_tokens_of_each_sequence_keep_all_experts(family_name, kind, applied):
    source, out, plan = applied(family_name, kind)
    model, family = runtime.load(out), family_of(Checkpoint(out).config)
    ids, mask = padded()
    seen, _ = watched(model, 2, family)
    with torch.inference_mode():
        model(input_ids=ids, attention_mask=mask)
    protected = most_important(seen["attention"], seen["hidden"], mask, 0.3)
    assert len(protected) == 3 + 2 + 3
    real = mask.reshape(-1).nonzero()[:, 0].tolist()
    hidden = seen["hidden"].reshape(40, -1)[real]
    spared = [number for number, t in enumerate(real) if t in protected]
    expected, counts = plain_block(source, 2, plan.layers[2], hidden, plan.tensors, spared)
    none = runtime.moe_blocks(model, family)[2].experts.num_experts
    found = [len(set(row) - {none}) for row in seen["indices"].tolist()]
    assert [found[t] for t in real] == counts
    close = {"rtol": 0, "atol": 1e-5 * expected.abs().max().item()}
    torch.testing.assert_close(seen["output"].reshape(40, -1)[real].double(), expected, **close)
    _, unprotected = plain_block(source, 2, plan.layers[2], hidden, plan.tensors)
    assert unprotected != counts, "the example must protect a token that skips"


@pytest.mark.parametrize(
    ("family_name", "kind"),
    [(name, kind) for kind in RULES[2:5] for name in ("qwen3_moe", "gpt_oss", "granitemoe")]
    + [("deepseek_v3", "skip_factor"), ("deepseek_v2", "skip_top_p"), ("mixtral", "remap_skip_factor")],
)
def test_generate_with_left_padding_and_cache_equals_plain_decoding(family_name, kind, applied):
    model = runtime.load(applied(family_name, kind)[1])
    for prompt, found in zip(*generated(model), strict=True):
        sequence = list(prompt)
        for _ in found:  # no cache, no padding
            with torch.inference_mode():
                sequence.append(int(model(input_ids=torch.tensor([sequence]), use_cache=False).logits[0, -1].argmax()))
        assert found == sequence[len(prompt) :]


def generated(model, new=6):
    prompts = [[5, 9, 31, 7, 80, 12], [44, 3, 17], [60]]
    ids = torch.tensor([[0] * (6 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (6 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    with torch.inference_mode():
        found = model.generate(input_ids=ids, attention_mask=mask, eos_token_id=None, **settings)
    return prompts, found[:, 6:].tolist()


@pytest.mark.parametrize("family_name", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_protection_is_of_the_prompt_with_left_padding_or_without(family_name, applied):
    """Alone and with a cache: the prompt at once, protected, then a token at a time, which no later one can look at."""
    model = runtime.load(applied(family_name, "skip_protect")[1])
    for prompt, found in zip(*generated(model), strict=True):
        given, cache, own = prompt, None, []
        for _ in found:
            with torch.inference_mode():
                output = model(input_ids=torch.tensor([given]), past_key_values=cache, use_cache=True)
            given, cache = [int(output.logits[0, -1].argmax())], output.past_key_values
            own += given
        assert found == own


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
@pytest.mark.parametrize("kind", RULES[2:])
def test_every_kernel_leaves_out_what_the_rule_drops(kind, implementation, applied):
    model = runtime.load(applied("mixtral", kind)[1])
    with torch.inference_mode():
        expected = model(input_ids=IDS).logits
        model.set_experts_implementation(implementation)
        found = model(input_ids=IDS).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("family_name", [name for name in FAMILIES if name not in (*ONE_EXPERT, "gpt_oss")])
@pytest.mark.parametrize("skip", [Skip(rule="fixed_k", k=2), Skip(rule="top_p", p=1.0), Skip(0.0)])
def test_keeping_all_is_the_stock_model_bit_for_bit(family_name, skip, tiny_model, tmp_path):
    if family_name in NO_SOFTMAX and skip.p is not None:
        return
    source = tiny_model(family_name)
    layers = dict.fromkeys(Checkpoint(source).shape().layers, (skip,))
    apply(source, Plan({"name": "x"}, layers), tmp_path / "out", prove=False)
    assert Checkpoint(tmp_path / "out").config["architectures"] == ["EspalierForCausalLM"]
    with torch.inference_mode():
        expected = runtime.load(source)(input_ids=IDS).logits
        assert torch.equal(runtime.load(tmp_path / "out")(input_ids=IDS).logits, expected)


@pytest.mark.parametrize(("family_name", "total"), [("mixtral", 1.0), ("qwen3_moe", 1.0), ("deepseek_v3", 2.5)])
def test_a_lone_survivor_has_the_whole_weight_exactly(family_name, total, tiny_model, tmp_path):
    source = tiny_model(family_name, **({"routed_scaling_factor": 2.5} if total != 1 else {}))
    layers = {layer: (Skip(rule="fixed_k", k=1),) for layer in Checkpoint(source).shape().layers}
    apply(source, Plan({"name": "x"}, layers), tmp_path / "out", prove=False)
    model, seen = runtime.load(tmp_path / "out"), []
    family = family_of(Checkpoint(source).config)
    for block in runtime.moe_blocks(model, family).values():
        block.experts.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    with torch.inference_mode():
        model(input_ids=IDS)
    for weights in seen:
        assert weights.max(dim=-1).values.unique().tolist() == [total]
        assert weights.min(dim=-1).values.unique().tolist() == [0.0]


@pytest.mark.parametrize(("family_name", "kind"), examples(*RULES)[: 2 * len(RULES)])
def test_count_active_sees_what_each_rule_runs(family_name, kind, applied):
    source, out, plan = applied(family_name, kind)
    model, family = runtime.load(out), family_of(Checkpoint(out).config)
    ids, mask = padded()
    seen, _ = watched(model, 2, family)
    with torch.inference_mode(), runtime.count_active(model, family) as counter:
        model(input_ids=ids, attention_mask=mask)
    protected = most_important(seen["attention"], seen["hidden"], mask, 0.3) if "protect" in kind else ()
    _, counts = plain_block(source, 2, plan.layers[2], seen["hidden"].reshape(40, -1), plan.tensors, protected)
    kept = [count for count, real in zip(counts, mask.reshape(-1).tolist(), strict=True) if real]
    assert counter.means()[2] == pytest.approx(sum(kept) / len(kept))


@pytest.mark.parametrize("rule", ["ratio", "factor", "top_p", "fixed_k", "tail"])
@pytest.mark.parametrize("merged", [False, True])
def test_block_equals_a_plain_loop_with_four_experts_a_token(rule, merged, tmp_path, tiny_model):
    source = tiny_model("qwen2_moe", top_k=4, experts=10)
    groups = ((0, 4, 9), (1, 2), (3, 5, 7), (6,), (8,))
    merge = Merge(groups, tuple((1 / len(g),) * len(g) for g in groups))
    skip = {
        "ratio": Skip(0.4),
        "factor": Skip(0.4, factor="f"),
        "top_p": Skip(rule="top_p", p=0.4),
        "fixed_k": Skip(rule="fixed_k", k=3),
        "tail": Skip(0.3, "tail"),
    }[rule]
    size = 5 if merged else 10
    factor = torch.rand(size, size, generator=torch.Generator().manual_seed(5)).numpy() * 2
    tensors = {"f": PlanTensor.of(factor)} if rule == "factor" else {}
    operations = (merge, skip) if merged else (skip,)
    plan = Plan({"name": "x"}, dict.fromkeys((0, 2), operations), tensors=tensors)
    apply(source, plan, tmp_path / "out", prove=False)
    hidden = torch.randn(60, 32, generator=torch.Generator().manual_seed(4))
    expected, counts = plain_block(source, 2, operations, hidden, tensors)
    block = runtime.load(tmp_path / "out").model.layers[2].mlp
    seen = []
    block.experts.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    with torch.inference_mode():
        _, weights, indices = block.gate(hidden)
        found = block.experts(hidden, indices, weights)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert [len(set(row) - {size}) for row in seen[0].tolist()] == counts
    assert len(set(counts)) >= (1 if rule == "fixed_k" and not merged else 2)


def test_the_factor_is_no_parameter_and_stays_in_float32(applied, tmp_path):
    source, out, plan = applied("mixtral", "skip_factor")
    assert Checkpoint(out).parameters == Checkpoint(source).parameters
    factor = torch.from_numpy(plan.tensors["0.factor"].read())
    model = runtime.load(out, torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.model.layers[0].mlp.skip_factor, factor)
    model.save_pretrained(tmp_path / "again")
    again, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", trust_remote_code=True, output_loading_info=True
    )
    assert not any(loading.values())
    assert torch.equal(again.model.layers[0].mlp.skip_factor.float(), factor)


def test_layers_of_different_sizes_take_their_part_of_the_factor(tiny_model, tmp_path):
    source = tiny_model("mixtral")
    pruned = example_plan("mixtral", "uneven_keep")  # 4, 4 and 6 experts
    apply(source, pruned, tmp_path / "pruned", prove=False)
    shape = Checkpoint(tmp_path / "pruned").shape()
    tensors = example_plan("mixtral", "skip_factor").tensors
    tensors = {name: PlanTensor.of(tensor.read()[:6, :6]) for name, tensor in tensors.items()}
    skip = Plan({"name": "x"}, {n: (Skip(0.6, factor=f"{n}.factor"),) for n in range(3)}, tensors=tensors).check(shape)
    report = apply(tmp_path / "pruned", skip, tmp_path / "out")
    assert "error" not in report["proof"]
    entries = Checkpoint(tmp_path / "out").entries
    sizes = [entries[f"model.layers.{n}.block_sparse_moe.skip_factor"].shape for n in range(3)]
    assert sizes == [(4, 4), (4, 4), (6, 6)]


def test_attention_without_weights_is_told(applied):
    out = applied("mixtral", "skip_protect")[1]
    assert AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).config._attn_implementation == "eager"
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, attn_implementation="sdpa")
    with pytest.raises(RuntimeError, match="which only attn_implementation='eager' gives"):
        model(input_ids=IDS)
    other = applied("mixtral", "skip")[1]  # protects none: any implementation
    assert AutoModelForCausalLM.from_pretrained(other, trust_remote_code=True).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kind", ["skip_factor", "skip_protect", "skip_top_p"])
def test_the_proofs_hold(kind, applied):
    from espalier.surgery.prove import TOLERANCE, prove

    source, out, plan = applied("qwen3_moe", kind)
    for streamed in (False, True):
        report = prove(source, out, plan, streamed)
        assert "error" not in report
        assert report["max_abs_diff"] <= TOLERANCE * report["max_abs_logit"]
