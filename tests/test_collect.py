"""Every array of every probe against plain loops over tokens and experts, from the weights on disk."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from espalier import observe, runtime
from espalier.collect import collect
from espalier.errors import UserError
from espalier.families import family_of
from espalier.probes import PROBES
from espalier.shape import ModelShape
from plain_block import PlainBlock
from tiny import FAMILIES, VOCABULARY, save_tiny

CHEAP = ("usage", "output_norm", "logit_gram", "gate_ratio")


def shape_of(model, experts=None):
    config = model.config
    family = family_of(config.to_dict())
    return ModelShape(
        family=config.model_type,
        layers=tuple(family.moe_layers(config.to_dict())),
        experts=experts or family.expert_count(config.to_dict()),
        top_k=family.top_k(config.to_dict()),
        hidden=config.hidden_size,
        width=24,
        renormalise=family.renormalise(config.to_dict()),
        expert_parameters=3 * 24 * config.hidden_size,
        router_row_parameters=config.hidden_size,
        total_parameters=sum(p.numel() for p in model.parameters()),
    )


def gather(model, ids, mask, probes=tuple(PROBES), experts=None, **options):
    family = family_of(model.config.to_dict())
    return collect(model, shape_of(model, experts), family, ids, mask, probes, **options)


def padded_batch(seed=0):
    """Four sequences of 9, 5, 1 and 7 tokens, padded on the right to 9."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (4, 9), generator=generator)
    mask = torch.zeros_like(ids)
    for row, length in enumerate((9, 5, 1, 7)):
        mask[row, :length] = 1
    return ids, mask


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    directory = save_tiny(request.param, tmp_path_factory.mktemp(request.param))
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    return directory, model, *padded_batch()


def plain_blocks(directory, ids, mask):
    """What each MoE block does with each unmasked token, by an eager forward pass and one token at a time.

    Returns layer -> list of tokens: logits [E], probability [E], outputs [E, D], chosen (best first), weights, z [D].
    """
    model = AutoModelForCausalLM.from_pretrained(directory, experts_implementation="eager").eval()
    family = family_of(model.config.to_dict())
    inputs = {}
    layers = family.moe_layers(model.config.to_dict())
    for layer, block in runtime.moe_blocks(model, family).items():
        block.register_forward_pre_hook(lambda _, args, layer=layer: inputs.__setitem__(layer, args[0]))
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    blocks = {}
    for layer in layers:
        block = PlainBlock(directory, layer)
        blocks[layer] = []
        for sequence, kept in zip(inputs[layer], mask, strict=True):
            for x, alive in zip(sequence, kept, strict=True):
                if not alive:
                    continue
                logits = block.logits(x)
                outputs = np.array([block.run(expert, x).numpy() for expert in block.experts])
                pairs = block.choose(logits)
                logits = np.array(logits)
                probability = np.exp(logits) / np.exp(logits).sum()
                z = sum(w * outputs[e] for e, w in pairs)
                chosen, routing = zip(*pairs, strict=True)
                blocks[layer].append((logits, probability, outputs, chosen, routing, z))
    return blocks


def plain_probes(tokens):
    """All probes' arrays of one layer by loops."""
    experts, hidden = tokens[0][2].shape
    chosen_k = len(tokens[0][3])
    a = {
        "usage": {
            "counts": np.zeros(experts),
            "top2_counts": np.zeros(experts),
            "gate_sum": np.zeros(experts),
            "probability_sum": np.zeros(experts),
        },
        "output_norm": {
            "counts": np.zeros(experts),
            "norm_sum": np.zeros(experts),
            "gate_norm_sum": np.zeros(experts),
            "probability_norm_sum": np.zeros(experts),
        },
        "mean_output": {
            "counts": np.zeros(experts),
            "all_tokens": np.zeros((experts, hidden)),
            "routed": np.zeros((experts, hidden)),
        },
        "logit_gram": {"gram": np.zeros((experts, experts)), "sum": np.zeros(experts)},
        "gate_ratio": {"ratio": [], "tail": []},
        "residual_gram": {"gram": [], "cross": [], "norm": [], "logits": [], "token": []},
    }
    for t, (logits, probability, outputs, chosen, routing, z) in enumerate(tokens):
        for e in sorted(range(experts), key=lambda e: -logits[e])[:2]:
            a["usage"]["top2_counts"][e] += 1
        for e, w in zip(chosen, routing, strict=True):
            norm = sum(v * v for v in outputs[e]) ** 0.5
            for probe in ("usage", "output_norm", "mean_output"):
                a[probe]["counts"][e] += 1
            a["usage"]["gate_sum"][e] += w
            a["output_norm"]["norm_sum"][e] += norm
            a["output_norm"]["gate_norm_sum"][e] += w * norm
            a["output_norm"]["probability_norm_sum"][e] += probability[e] * norm
            a["mean_output"]["routed"][e] += outputs[e]
        for e in range(experts):
            a["usage"]["probability_sum"][e] += probability[e]
            a["mean_output"]["all_tokens"][e] += outputs[e] / len(tokens)
            a["logit_gram"]["sum"][e] += logits[e]
            for f in range(experts):
                a["logit_gram"]["gram"][e, f] += logits[e] * logits[f]
        a["gate_ratio"]["ratio"].append(routing[1] / routing[0])
        a["gate_ratio"]["tail"].append([sum(routing[i:]) / sum(routing) for i in range(1, chosen_k)])
        r = a["residual_gram"]
        r["gram"].append(
            [np.dot(outputs[e] - z, outputs[f] - z) for e in range(experts) for f in range(experts) if e <= f]
        )
        r["cross"].append([np.dot(outputs[e] - z, z) for e in range(experts)])
        r["norm"].append(np.dot(z, z))
        r["logits"].append(logits)
        r["token"].append(t)
    for e in range(experts):
        if a["mean_output"]["counts"][e]:
            a["mean_output"]["routed"][e] /= a["mean_output"]["counts"][e]
    ordered = sorted(a["gate_ratio"]["ratio"])
    position = [q / 100 * (len(ordered) - 1) for q in range(101)]
    below = [int(p) for p in position]
    a["gate_ratio"]["quantiles"] = [
        ordered[b] + (p - b) * (ordered[min(b + 1, len(ordered) - 1)] - ordered[b])
        for b, p in zip(below, position, strict=True)
    ]
    return a


def assert_close(got, expected, where):
    """Equal up to the rounding of float32 activations, whose products err relative to the largest."""
    expected = np.array(expected)
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=5e-6 * np.abs(expected).max(), err_msg=where)


def assert_equal_stats(one, other, exact=False):
    assert one.sequence_tokens == other.sequence_tokens
    assert one.arrays.keys() == other.arrays.keys()
    for key, named in one.arrays.items():
        for name, array in named.items():
            again = other.arrays[key][name]
            assert array.dtype == again.dtype
            if exact or array.dtype == np.int64:
                np.testing.assert_array_equal(array, again, err_msg=f"{key} {name}")
            else:
                assert_close(array, again, f"{key} {name}")


def test_every_array_equals_plain_loops(case):
    directory, model, ids, mask = case
    stats = gather(model, ids, mask, batch_size=3)
    assert stats.sequence_tokens == (9, 5, 1, 7)
    assert stats.probes == set(PROBES)
    for layer, tokens in plain_blocks(directory, ids, mask).items():
        expected = plain_probes(tokens)
        for probe, arrays in expected.items():
            got = stats.layer(probe, layer)
            assert got.keys() == arrays.keys()
            for name, array in arrays.items():
                where = f"{probe} {layer} {name}"
                assert_close(got[name], array, where)


def test_dtypes_and_layers_are_the_contract(case):
    _, model, ids, mask = case
    stats = gather(model, ids, mask)
    expected = {
        "counts": np.int64, "top2_counts": np.int64, "token": np.int64,
        "ratio": np.float32, "tail": np.float32, "norm": np.float32, "logits": np.float32, "cross": np.float32,
    }  # fmt: skip
    for (probe, layer), arrays in stats.arrays.items():
        assert layer in shape_of(model).layers
        for name, array in arrays.items():
            dtype = np.float32 if (probe, name) == ("residual_gram", "gram") else expected.get(name, np.float64)
            assert array.dtype == dtype, (probe, name)


def test_three_chosen_experts(tmp_path):
    directory = save_tiny("qwen2_moe", tmp_path, experts=5, top_k=3)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    ids, mask = padded_batch(1)
    stats = gather(model, ids, mask)
    for layer, tokens in plain_blocks(directory, ids, mask).items():
        for probe, arrays in plain_probes(tokens).items():
            for name, array in arrays.items():
                got = stats.layer(probe, layer)[name]
                assert_close(got, array, f"{probe} {name}")


def test_the_batch_size_changes_nothing(case):
    _, model, ids, mask = case
    one = gather(model, ids, mask, batch_size=1)
    assert_equal_stats(one, gather(model, ids, mask, batch_size=3))
    assert_equal_stats(one, gather(model, ids, mask, batch_size=100))


def test_small_chunks_change_nothing(case, monkeypatch):
    _, model, ids, mask = case
    whole = gather(model, ids, mask)
    monkeypatch.setattr(observe, "CHUNK_BYTES", 8 * 8 * 32 * 4)  # 4 tokens of 8 experts, D=32
    assert_equal_stats(whole, gather(model, ids, mask))
    alone = gather(model, ids, mask, ["residual_gram"])
    for layer in whole.shape.layers:
        np.testing.assert_allclose(
            alone.layer("residual_gram", layer)["gram"],
            whole.layer("residual_gram", layer)["gram"],
            rtol=2e-5,
            atol=2e-6,
        )


def test_what_is_padded_does_not_matter(case):
    _, model, ids, mask = case
    stats = gather(model, ids, mask)
    other = torch.where(mask.bool(), ids, (ids + 17) % VOCABULARY)
    assert_equal_stats(stats, gather(model, other, mask.numpy()))
    wider = F.pad(ids, (0, 3), value=5), F.pad(mask, (0, 3))
    assert_equal_stats(stats, gather(model, *wider))


def test_no_mask_is_a_mask_of_ones(case):
    _, model, ids, _ = case
    stats = gather(model, ids.numpy().astype(np.int32), None)
    assert stats.sequence_tokens == (9, 9, 9, 9)
    assert_equal_stats(stats, gather(model, ids, torch.ones_like(ids)), exact=True)


def test_the_same_pass_gives_the_same_bytes(case):
    _, model, ids, mask = case
    assert_equal_stats(gather(model, ids, mask), gather(model, ids, mask), exact=True)


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_the_model_is_left_as_it_was(case, implementation):
    directory, _, ids, mask = case
    model = AutoModelForCausalLM.from_pretrained(directory, experts_implementation=implementation).train()
    model.eval()
    with torch.no_grad():
        before = model.base_model(ids, mask).last_hidden_state
    model.train()
    seen = []
    handle = model.base_model.register_forward_hook(lambda *call: seen.append(call[2].last_hidden_state))
    gather(model, ids, mask, batch_size=4)
    handle.remove()
    if implementation == "grouped_mm":
        assert torch.equal(seen[0], before)  # bit for bit, also while it is observed
    else:
        torch.testing.assert_close(seen[0], before)
    assert model.training
    assert model.config._experts_implementation == implementation
    for module in model.modules():
        assert not hasattr(module, "espalier_observer")
        assert not module._forward_hooks or "router" not in str(module._forward_hooks)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model.base_model(ids, mask).last_hidden_state, before)


def test_the_model_is_left_as_it_was_after_an_error(case):
    _, model, ids, mask = case

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gather(model, ids, mask, progress=stop)
    assert model.config._experts_implementation == "grouped_mm"
    assert not any(hasattr(module, "espalier_observer") for module in model.modules())


def test_one_forward_pass_feeds_all_probes(case):
    _, model, ids, mask = case
    calls, steps = [], []
    handle = model.base_model.register_forward_hook(lambda *call: calls.append(1))
    gather(model, ids, mask, batch_size=3, progress=lambda done, total: steps.append((done, total)))
    handle.remove()
    assert len(calls) == 2
    assert steps == [(3, 4), (4, 4)]


def test_no_expert_runs_that_no_probe_needs(case, monkeypatch):
    """Dense probes run each pair of token and expert once, the others only those that the router chose."""
    _, model, ids, mask = case
    rows = []
    real = observe.expert_output
    monkeypatch.setattr(observe, "expert_output", lambda m, x, e: rows.append(len(x)) or real(m, x, e))
    gather(model, ids, mask, CHEAP)
    assert rows == []
    layers, tokens = len(shape_of(model).layers), int(mask.sum())
    gather(model, ids, mask)
    assert sum(rows) == layers * tokens * (8 - 2)


def test_many_experts_keep_evenly_strided_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr("espalier.probes.GRAM_TOKENS", 8)
    directory = save_tiny("olmoe", tmp_path, experts=17, num_hidden_layers=1)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    ids, mask = padded_batch(2)
    rows = []
    real = observe.expert_output
    monkeypatch.setattr(observe, "expert_output", lambda m, x, e: rows.append(len(x)) or real(m, x, e))
    stats = gather(model, ids, mask, ["residual_gram"], batch_size=3)
    assert sum(rows) == 8 * (17 - 2)  # the other tokens run no expert more
    got = stats.layer("residual_gram", 0)
    np.testing.assert_array_equal(got["token"], np.arange(0, 22, 3))
    expected = plain_probes(plain_blocks(directory, ids, mask)[0])["residual_gram"]
    for name in ("gram", "cross", "norm", "logits"):
        assert_close(got[name], expected[name][::3], name)
    both = gather(model, ids, mask, ["residual_gram", "mean_output"], batch_size=3)
    assert_close(both.layer("residual_gram", 0)["gram"], got["gram"], "shared")


def test_bfloat16(tmp_path):
    directory = save_tiny("mixtral", tmp_path, torch.bfloat16)
    ids, mask = padded_batch()
    half = gather(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16), ids, mask)
    full = gather(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32), ids, mask)
    mean, reference = (s.layer("mean_output", 0)["all_tokens"] for s in (half, full))
    assert np.linalg.norm(mean - reference) < 0.02 * np.linalg.norm(reference)
    assert half.layer("residual_gram", 2)["gram"].dtype == np.float32


def test_skipped_experts_do_not_count(tmp_path):
    """An index equal to E is no expert: what a skipping checkpoint's code puts there is left out."""
    directory = save_tiny("mixtral", tmp_path)
    ids, mask = padded_batch()
    stock = AutoModelForCausalLM.from_pretrained(directory).eval()
    plain = gather(stock, ids, mask)
    skipping = AutoModelForCausalLM.from_pretrained(directory).eval()

    def skip_second(experts, args):
        hidden, indices, weights = args
        skipped = (weights[:, 1] < 0.6 * weights[:, 0]).nonzero()[:, 0]
        indices, weights = indices.clone(), weights.clone()
        indices[skipped, 1], weights[skipped, 0], weights[skipped, 1] = experts.num_experts, 1.0, 0.0
        return hidden, indices, weights

    experts = skipping.model.layers[0].mlp.experts
    experts._is_expert_parallel = True
    experts.register_forward_pre_hook(skip_second)
    stats = gather(skipping, ids, mask)
    ratio = plain.layer("gate_ratio", 0)["ratio"]
    kept = int((ratio >= 0.6).sum())
    assert 0 < kept < 22
    for probe in ("usage", "output_norm", "mean_output"):
        assert stats.layer(probe, 0)["counts"].sum() == 22 + kept
    np.testing.assert_allclose(stats.layer("usage", 0)["gate_sum"].sum(), 22, rtol=1e-6)
    np.testing.assert_array_equal(stats.layer("gate_ratio", 0)["ratio"], ratio)  # the router's own weights
    np.testing.assert_allclose(
        stats.layer("mean_output", 0)["all_tokens"], plain.layer("mean_output", 0)["all_tokens"], rtol=1e-5, atol=1e-7
    )
    firsts = np.zeros(8)
    for _, _, outputs, chosen, routing, _ in plain_blocks(directory, ids, mask)[0]:
        for e in chosen[: 1 if routing[1] < 0.6 * routing[0] else 2]:
            firsts[e] += np.linalg.norm(outputs[e])
    np.testing.assert_allclose(stats.layer("output_norm", 0)["norm_sum"], firsts, rtol=1e-5)


def test_a_merged_checkpoint_feeds_only_what_its_router_means(tmp_path):
    directory = save_tiny("olmoe", tmp_path)
    ids, mask = padded_batch()
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    expected = gather(model, ids, mask, ["gate_ratio"]).layer("gate_ratio", 0)["ratio"]
    for layer in model.model.layers:
        experts = layer.mlp.experts
        experts.gate_up_proj.data, experts.down_proj.data = experts.gate_up_proj.data[:4], experts.down_proj.data[:4]
        experts.num_experts = 4
        experts.register_forward_pre_hook(lambda _, args: (args[0], args[1] % 4, args[2]))
    stats = gather(model, ids, mask, ["gate_ratio"], experts=4)
    np.testing.assert_array_equal(stats.layer("gate_ratio", 0)["ratio"], expected)
    with pytest.raises(UserError, match=r"layer 0: the router has 8 rows for 4 experts .* probe usage has no meaning"):
        gather(model, ids, mask, ["usage"], experts=4)


def broken(tmp_path, change):
    model = AutoModelForCausalLM.from_pretrained(save_tiny("qwen2_moe", tmp_path)).eval()
    with torch.no_grad():
        change(model.model.layers[2].mlp)
    return model


def test_a_weight_that_is_not_finite_is_named(tmp_path):
    model = broken(tmp_path, lambda mlp: mlp.experts.down_proj[5].fill_(float("nan")))
    with pytest.raises(UserError, match=r"layers\.2\.mlp\.experts\.down_proj holds NaN .* 1 of 8 experts .*expert 5"):
        gather(model, *padded_batch(), ["usage"])
    model = broken(tmp_path, lambda mlp: mlp.gate.weight[3, 1].fill_(-float("inf")))
    with pytest.raises(UserError, match=r"layers\.2\.mlp\.gate\.weight .*first: row 3"):
        gather(model, *padded_batch(), ["usage"])


def test_outputs_that_are_not_finite_name_the_layer(tmp_path):
    def explode(mlp):
        mlp.experts.gate_up_proj.mul_(1e18)
        mlp.experts.down_proj.mul_(1e18)

    with pytest.raises(UserError, match=r"layer 2: .* not finite on calibration tokens \(dtype float32\)"):
        gather(broken(tmp_path, explode), *padded_batch(), ["usage"])


def test_a_result_that_is_not_finite_names_layer_and_probe(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_tiny("qwen2_moe", tmp_path)).eval()
    ids = torch.full((1, 1), 7)
    (unused, *_) = np.flatnonzero(gather(model, ids, None, ["usage"]).layer("usage", 2)["counts"] == 0)
    experts = model.model.layers[2].mlp.experts
    experts.gate_up_proj.data[unused] *= 1e18
    experts.down_proj.data[unused] *= 1e18
    gather(model, ids, None, CHEAP)  # no chosen expert is broken
    with pytest.raises(
        UserError, match=r"layer 2: probe mean_output gave \d+ values of all_tokens that are not finite"
    ):
        gather(model, ids, None, ["mean_output"])


def test_mistakes_are_one_line(case):
    _, model, ids, mask = case
    with pytest.raises(UserError, match=r"probe 'usgae' is unknown; did you mean usage\?"):
        gather(model, ids, mask, ["usgae"])
    mask = mask.clone()
    mask[2] = 0
    with pytest.raises(UserError, match="sequence 2 has no unmasked token"):
        gather(model, ids, mask, ["usage"])


def test_top_1_has_no_ratio(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_tiny("mixtral", tmp_path, top_k=1)).eval()
    with pytest.raises(UserError, match="top_k=1"):
        gather(model, *padded_batch(), ["gate_ratio"])
    assert gather(model, *padded_batch(), ["usage"]).layer("usage", 0)["counts"].sum() == 22
