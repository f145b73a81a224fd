"""Layers that tokens may skip: written checkpoints against the plainest way to run them; caches, padding, causality."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from dense_models import FAMILIES as DENSE
from dense_models import made_once
from depth_plans import KINDS, depth_plan, token_by_token
from espalier.checkpoints.checkpoint import Checkpoint
from espalier.modeling.routed_depth import Call, largest
from espalier.surgery.apply import apply
from espalier.surgery.prove import prove
from tiny import FAMILIES as EXPERTS
from tiny import VOCABULARY

IDS = torch.arange(3 * 10).reshape(3, 10) * 7 % VOCABULARY
CAUSAL = [kind for kind in KINDS if not kind.startswith("top_k")]


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_model):
    dense = made_once(tmp_path_factory)
    return lambda family: dense(family) if family in DENSE else tiny_model(family)


@pytest.fixture(scope="module")
def routed(models, tmp_path_factory):
    """Return make(family, kind) -> (directory, plan): a tiny model that was routed."""
    made = {}

    def make(family, kind):
        if (family, kind) not in made:
            source, out = models(family), tmp_path_factory.mktemp(f"{family}-{kind}") / "out"
            plan = depth_plan(kind, Checkpoint(source).any_shape())
            apply(source, plan, out, prove=False)
            made[family, kind] = out, plan
        return made[family, kind]

    return make


def load(directory, attention=None):
    given = {} if attention is None else {"attn_implementation": attention}
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, **given).eval()


def logits(model, ids=IDS, **given):
    with torch.no_grad():
        return model(input_ids=ids, **given).logits


def set_backend(model, backend):
    for module in model.modules():
        if hasattr(module, "depth_router"):
            module.backend = backend


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", [*DENSE, *EXPERTS])
def test_what_is_written_computes_what_the_plan_says(family, kind, models, routed):
    if family == "llama4_text":
        pytest.skip("refused, see below")
    out, plan = routed(family, kind)
    report = prove(models(family), out, plan)
    assert "error" not in report
    assert report["tokens"] > 0
    assert plan.parameter_counts(Checkpoint(models(family)).any_shape())["stored"] == Checkpoint(out).parameters


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi", "mixtral", "deepseek_v3", "gpt_oss"])
def test_cached_decoding_equals_the_full_forward(family, kind, routed):
    model = load(routed(family, kind)[0])
    expected = logits(model)
    for first in (1, 4):
        found = token_by_token(model, IDS, first=first)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def padded(rows, side="left"):
    """Return ids and mask [B, L] of sequences of unequal length."""
    length = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), length).long(), torch.zeros(len(rows), length).long()
    for b, row in enumerate(rows):
        place = slice(length - len(row), None) if side == "left" else slice(0, len(row))
        ids[b, place], mask[b, place] = row, 1
    return ids, mask


ROWS = [IDS[0, :10], IDS[1, :3], IDS[2, :7]]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("drop")])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "gpt_oss"])
def test_a_padded_batch_is_its_sequences_one_by_one(family, kind, routed):
    model = load(routed(family, kind)[0])
    expected = [logits(model, ids=row[None])[0] for row in ROWS]
    for side in ("left", "right"):
        ids, mask = padded(ROWS, side)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        found = logits(model, ids=ids, attention_mask=mask, position_ids=positions)
        for b, row in enumerate(expected):
            torch.testing.assert_close(found[b][mask[b].bool()], row, rtol=1e-4, atol=1e-4)
    if kind.startswith("top_k"):
        return
    ids, mask = padded(ROWS)
    for first in (1, 8):
        found = token_by_token(model, ids, mask, first)
        for b, row in enumerate(expected):
            torch.testing.assert_close(found[b][mask[b].bool()], row, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["threshold", "threshold_attention", "mask_attention", "threshold_ffn", "all_keys"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi", "mixtral", "minimax"])
def test_both_ways_to_compute_agree_and_so_do_their_gradients(family, kind, routed):
    model = load(routed(family, kind)[0])
    found = []
    for backend in ("compact", "masked"):
        set_backend(model, backend)
        model.zero_grad()
        output = model(input_ids=IDS, use_cache=False).logits
        output.square().sum().backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append((output.detach(), grads))
    (first, grads), (second, others) = found
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)
    assert len(grads) == len(others)
    for one, other in zip(grads, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max() + 1))


@pytest.mark.parametrize("kind", ["mask", "mask_attention", "threshold", "threshold_ffn", "all_keys"])
def test_gates_of_tokens_that_do_not_enter_learn_by_straight_through_only(kind, routed):
    model = load(routed("llama", kind)[0])
    routers = [module.depth_router for module in model.modules() if hasattr(module, "depth_router")]
    values = []
    for through in (False, True):
        for router in routers:
            router.straight_through, router.threshold = through, 1.0  # nothing enters
        model.zero_grad()
        output = model(input_ids=IDS, use_cache=False).logits
        output.square().sum().backward()
        values.append(output.detach())
        slopes = [0.0 if router.weight.grad is None else float(router.weight.grad.abs().max()) for router in routers]
        if kind in ("mask", "mask_attention") or not through:
            assert all((slope > 0) == through for slope in slopes)
        else:  # the gate itself multiplies what a token that does not enter would get
            assert all(slope > 0 for slope in slopes)
    torch.testing.assert_close(values[1], values[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_only_top_k_looks_at_later_tokens(kind, routed):
    model = load(routed("llama", kind)[0])
    changed = IDS.clone()
    changed[:, 6:] = (changed[:, 6:] + 11) % VOCABULARY
    before, after = logits(model)[:, :6], logits(model, ids=changed)[:, :6]
    if kind.startswith("top_k"):
        assert not torch.allclose(before, after, atol=1e-3)
    else:
        torch.testing.assert_close(before, after, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", [f for f in (*DENSE, *EXPERTS) if f != "llama4_text"])
def test_all_tokens_and_gates_at_one_give_the_dense_model(family, models, tmp_path):
    source = models(family)
    plan = depth_plan("all_kept", Checkpoint(source).any_shape())
    plan = replace(plan, layers={layer: (replace(o[0], weights="mask"),) for layer, o in plan.layers.items()})
    apply(source, plan, tmp_path / "out", prove=False)
    dense = AutoModelForCausalLM.from_pretrained(source).eval()
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(dense), rtol=1e-5, atol=1e-5)


GREEDY = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0}


def without_cache(model, ids, mask, new):
    """Return ids with `new` greedy tokens behind them, the whole sequence run again for each."""
    for _ in range(new):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        scores = logits(model, ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)[:, -1]
        scores[:, 2] = -torch.inf  # the end of the text, which min_new_tokens forbids
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, torch.ones(len(mask), 1).long()], dim=1)
    return ids


@pytest.mark.parametrize(
    "kind", ["threshold", "threshold_attention", "threshold_ffn", "all_keys", "predictor", "random"]
)
@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_generate(family, kind, routed):
    model = load(routed(family, kind)[0])
    ids, mask = padded(ROWS)
    expected = without_cache(model, ids, mask, 8)
    found = model.generate(ids, attention_mask=mask, **GREEDY)
    assert found.tolist() == expected.tolist()
    torch.manual_seed(0)
    sampled = model.generate(ids, attention_mask=mask, **GREEDY | {"do_sample": True, "top_k": 5})
    torch.manual_seed(0)
    again = model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY | {"do_sample": True, "top_k": 5})
    assert sampled.tolist() == again.tolist()


@pytest.mark.parametrize("kind", ["threshold", "threshold_attention", "random"])
def test_beams_and_assisted_decoding(kind, routed):
    model, draft = load(routed("llama", kind)[0]), load(routed("llama", "threshold_ffn")[0])
    ids, mask = padded(ROWS)
    beams = GREEDY | {"num_beams": 3}
    found = model.generate(ids, attention_mask=mask, **beams)
    assert found.tolist() == model.generate(ids, attention_mask=mask, use_cache=False, **beams).tolist()
    one = IDS[:1]
    expected = model.generate(one, **GREEDY)
    assert model.generate(one, assistant_model=draft, **GREEDY).tolist() == expected.tolist()
    assert model.generate(one, prompt_lookup_num_tokens=3, **GREEDY).tolist() == expected.tolist()


@pytest.mark.parametrize("kind", ["nothing_kept", "nothing_kept_attention", "drop_attention"])
def test_beams_where_no_token_has_entered_a_layer(kind, routed):
    model = load(routed("llama", kind)[0])
    ids, mask = padded(ROWS)
    beams = GREEDY | {"num_beams": 3}
    found = model.generate(ids, attention_mask=mask, **beams)
    assert found.tolist() == model.generate(ids, attention_mask=mask, use_cache=False, **beams).tolist()


@pytest.mark.parametrize("kind", ["threshold", "top_k", "predictor"])
def test_under_autocast_routers_compute_in_float32(kind, routed):
    router = load(routed("llama", kind)[0]).model.layers[0].depth_router
    call, states = Call(), torch.randn(3, 50, 32)
    router.predict = kind == "top_k"
    with torch.no_grad():
        kept, gates, predicted = router(states, call)[0], router.gates, router.predicted
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(router(states, call)[0], kept)
    assert torch.equal(router.gates, gates)
    assert (predicted is None and router.predicted is None) or torch.equal(router.predicted, predicted)


@pytest.mark.parametrize("kind", ["threshold", "top_k", "predictor"])
def test_cast_as_a_whole_routers_compute_in_float32(kind, routed):
    """As model.half() casts them; a checkpoint that is loaded in half precision keeps them in float32."""
    model = load(routed("llama", kind)[0])
    router, call, states = model.model.layers[0].depth_router, Call(), torch.randn(3, 50, 32)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(parameter.bfloat16())
        kept = router(states, call)[0]
        model.bfloat16()
        assert torch.equal(router(states, call)[0], kept)
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("kind", ["threshold", "threshold_attention", "threshold_ffn", "all_keys"])
def test_projections_may_give_another_dtype_than_the_states_have(kind, routed):
    """As under CUDA's autocast, which leaves copying by index alone."""
    model = load(routed("llama", kind)[0])
    for layer in model.model.layers:
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.register_forward_hook(lambda module, inputs, output: output.bfloat16())
    found = logits(model)
    set_backend(model, "masked")
    expected = logits(model, use_cache=False)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.03 * float(expected.abs().max()))


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_a_layer_may_lie_on_another_device_than_the_mask(routed):
    """On a second GPU, say: fake tensors know which devices do not go together."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    router, call = load(routed("llama", "random")[0]).model.layers[0].depth_router, Call()
    with torch.no_grad(), FakeTensorMode():
        call.real, call.positions = torch.ones(3, 10).bool(), torch.ones(3, 10).long()
        assert router(torch.empty(3, 10, 32, device="cuda"), call)[0].device.type == "cuda"
    assert largest(torch.empty(3, 10, device="meta"), torch.ones(3, 10).bool(), 0.5).device.type == "meta"


def test_a_layer_caches_the_tokens_that_entered_and_no_others(routed):
    model = load(routed("llama", "threshold")[0])
    output = model(input_ids=IDS, use_cache=True)
    for layer, cached in zip(model.model.layers, output.past_key_values.layers, strict=True):
        kept = layer.depth_router.kept.sum(1)
        assert 0 < int(kept.min()) < IDS.shape[1]
        assert cached.lengths == kept.tolist()
        assert cached.keys.shape[2] == cached.values.shape[2] == int(kept.max())
        assert cached.get_seq_length() == IDS.shape[1]
    alone = model(input_ids=IDS[:1], use_cache=True).past_key_values
    stored = sum(layer.keys.numel() for layer in alone.layers)
    kept = sum(int(layer.depth_router.kept.sum()) for layer in model.model.layers)
    assert stored == kept * 2 * 8  # key heads x dimensions of one


@pytest.mark.parametrize("kind", ["threshold", "threshold_attention", "all_keys", "random"])
def test_sliding_windows(kind, tmp_path):
    from dense_models import save_dense

    source = save_dense("mistral", tmp_path / "source", sliding_window=4)
    plan = depth_plan(kind, Checkpoint(source).any_shape())
    apply(source, plan, tmp_path / "out", prove=False)
    assert "error" not in prove(source, tmp_path / "out", plan)
    for attention in ("sdpa", "eager"):
        model = load(tmp_path / "out", attention)
        for first in (1, 7):
            torch.testing.assert_close(token_by_token(model, IDS, first=first), logits(model), rtol=1e-4, atol=1e-4)
        if kind in ("threshold", "random"):
            cache = model(input_ids=IDS[:1], use_cache=True).past_key_values
            assert all(layer.keys.shape[2] < 4 for layer in cache.layers)


def test_what_cannot_be_done_is_said(routed):
    from transformers import StaticCache

    model = load(routed("llama", "threshold")[0])
    with pytest.raises(ValueError, match="DynamicCache"):
        model(input_ids=IDS, past_key_values=StaticCache(model.config, max_cache_len=20), use_cache=True)
    with pytest.raises(ValueError, match="attention mask of 3 x 10 tokens"):
        model(input_ids=IDS, attention_mask=torch.ones(3, 1, 10, 10).bool())
    set_backend(model, "masked")
    with pytest.raises(ValueError, match="takes no cache"):
        model(input_ids=IDS, use_cache=True)


@pytest.mark.parametrize("attention", ["flex_attention", "flash_attention_2"])
def test_attention_that_takes_no_masks_is_refused(attention, routed):
    with pytest.raises((ValueError, ImportError)):
        load(routed("llama", "threshold")[0], attention)
