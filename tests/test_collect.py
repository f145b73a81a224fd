"""Every array of every probe against plain loops over tokens and experts, from the weights on disk."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from espalier.checkpoints.shape import ModelShape
from espalier.collecting.collect import collect
from espalier.errors import UserError
from espalier.families import family_of
from espalier.models import observe, runtime
from espalier.probes import PROBES
from plain_block import PlainBlock
from tiny import FAMILIES, VOCABULARY, save_tiny

CHEAP = ("usage", "output_norm", "logit_gram", "routing")
# Those that leave the attention as it is; not every family has weights of it. The others: test_skipping.py.
PASSIVE = tuple(name for name, probe in PROBES.items() if not getattr(probe, "attention", False))
SCALED = ("llama4_text",)  # the router's weight multiplies the experts' input


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


def gather(model, ids, mask, probes=None, experts=None, **options):
    family = family_of(model.config.to_dict())
    probes = PASSIVE if probes is None else probes
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

    Returns layer -> list of tokens: logits [E], probability [E], outputs [E, D], chosen (best first), weights, z [D],
    routed [E, D] (what the expert's weight in the block's sum multiplies if it is chosen) and those weights, the
    input x [D], inner activations [E, F] of what is routed.
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
                chosen, routing = zip(*block.choose(logits), strict=True)
                routed, inside, scales = outputs, routing, [1] * len(logits)
                if block.family in SCALED:
                    scales = [1 / (1 + np.exp(-logit)) for logit in logits]
                    routed = np.array(
                        [block.run(expert, s * x).numpy() for expert, s in zip(block.experts, scales, strict=True)]
                    )
                    inside = (1.0,) * len(chosen)
                inner = [block.inner(expert, s * x).numpy() for expert, s in zip(block.experts, scales, strict=True)]
                logits = np.array(logits)
                probability = np.exp(logits) / np.exp(logits).sum()
                z = sum(w * routed[e] for e, w in zip(chosen, inside, strict=True))
                blocks[layer].append(
                    (logits, probability, outputs, chosen, routing, z, routed, inside, x.double().numpy(), inner)
                )
    return blocks


def plain_probes(tokens):
    """All probes' arrays of one layer by loops."""
    experts, hidden = tokens[0][2].shape
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
        "mean_output": {"all_tokens": np.zeros((experts, hidden))},
        "routed_moments": {name: np.zeros(experts) for name in ("counts", "gate_sum", "largest", "smallest")}
        | {name: np.zeros((experts, hidden)) for name in ("sum", "square_sum", "gate_sum_outputs")},
        "neuron_energy": {name: np.zeros((experts, 24)) for name in ("square_sum", "square_max")},
        "logit_gram": {"gram": np.zeros((experts, experts)), "sum": np.zeros(experts)},
        "coactivation": {"counts": np.zeros((experts, experts))},
        "routing": {"weights": [], "experts": [], "probability": []},
        "inputs": {"hidden": [], "experts": [], "weights": [], "token": []},
        "residual_gram": {"gram": [], "cross": [], "norm": [], "logits": [], "token": []},
    }
    for t, (logits, probability, outputs, chosen, routing, z, routed, inside, x, inner) in enumerate(tokens):
        for e in sorted(range(experts), key=lambda e: -logits[e])[:2]:
            a["usage"]["top2_counts"][e] += 1
        for e, w, added in zip(chosen, routing, inside, strict=True):
            norm = sum(v * v for v in routed[e]) ** 0.5
            m = a["routed_moments"]
            for n, value in enumerate(routed[e]):
                m["largest"][e] = value if n == m["counts"][e] == 0 else max(m["largest"][e], value)
                m["smallest"][e] = value if n == m["counts"][e] == 0 else min(m["smallest"][e], value)
                m["sum"][e, n] += value
                m["square_sum"][e, n] += value * value
                m["gate_sum_outputs"][e, n] += added * value
            m["gate_sum"][e] += w
            for n, value in enumerate(inner[e]):
                phi = added * value
                a["neuron_energy"]["square_sum"][e, n] += phi * phi
                a["neuron_energy"]["square_max"][e, n] = max(a["neuron_energy"]["square_max"][e, n], phi * phi)
            for other in chosen:
                a["coactivation"]["counts"][e, other] += 1
            for probe in ("usage", "output_norm", "routed_moments"):
                a[probe]["counts"][e] += 1
            a["usage"]["gate_sum"][e] += w
            a["output_norm"]["norm_sum"][e] += norm
            a["output_norm"]["gate_norm_sum"][e] += added * norm
            a["output_norm"]["probability_norm_sum"][e] += probability[e] * norm
        for e in range(experts):
            a["usage"]["probability_sum"][e] += probability[e]
            a["mean_output"]["all_tokens"][e] += outputs[e] / len(tokens)
            a["logit_gram"]["sum"][e] += logits[e]
            for f in range(experts):
                a["logit_gram"]["gram"][e, f] += logits[e] * logits[f]
        a["routing"]["weights"].append(routing)
        a["routing"]["experts"].append(chosen)
        a["routing"]["probability"].append([probability[e] for e in chosen])
        for name, value in (("hidden", x), ("token", t)):
            a["inputs"][name].append(value)
        dense = np.zeros(experts)
        dense[list(chosen)] = routing
        a["inputs"]["weights"].append(dense)  # a column for each expert
        a["inputs"]["experts"].append(dense > 0)
        r = a["residual_gram"]
        r["gram"].append(
            [np.dot(routed[e] - z, routed[f] - z) for e in range(experts) for f in range(experts) if e <= f]
        )
        r["cross"].append([np.dot(routed[e] - z, z) for e in range(experts)])
        r["norm"].append(np.dot(z, z))
        r["logits"].append(logits)
        r["token"].append(t)
    return a


def comparable(probe, got, expected):
    """Give the weights and experts of `inputs`, which come in the router's order, a column for each expert."""
    if probe != "inputs":
        return got
    weights = np.zeros(np.shape(expected["weights"]))
    np.put_along_axis(weights, got["experts"], got["weights"], axis=1)
    chosen = np.zeros(weights.shape)
    np.put_along_axis(chosen, got["experts"], 1, axis=1)
    return got | {"weights": weights, "experts": chosen}


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
    assert stats.probes == set(PASSIVE)
    for layer, tokens in plain_blocks(directory, ids, mask).items():
        expected = plain_probes(tokens)
        for probe in stats.probes:
            arrays = expected[probe]
            got = stats.layer(probe, layer)
            assert got.keys() == arrays.keys()
            got = comparable(probe, got, arrays)
            for name, array in arrays.items():
                where = f"{probe} {layer} {name}"
                assert_close(got[name], array, where)


def test_dtypes_and_layers_are_the_contract(case):
    _, model, ids, mask = case
    stats = gather(model, ids, mask)
    expected = {
        "counts": np.int64, "top2_counts": np.int64, "token": np.int64,
        "experts": np.int32, "weights": np.float32, "probability": np.float32, "hidden": np.float32,
        "norm": np.float32, "logits": np.float32, "cross": np.float32,
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
                got = comparable(probe, stats.layer(probe, layer), arrays)
                assert_close(got[name], array, f"{probe} {name}")


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
    directory, model, ids, mask = case
    own = model.config.model_type in SCALED  # outside transformers' experts interface
    implementation = "eager" if own else implementation
    model = AutoModelForCausalLM.from_pretrained(directory, experts_implementation=implementation).train()
    model.eval()
    with torch.no_grad():
        before = runtime.decoder(model)(ids, mask).last_hidden_state
    model.train()
    seen = []
    handle = runtime.decoder(model).register_forward_hook(lambda *call: seen.append(call[2].last_hidden_state))
    gather(model, ids, mask, batch_size=4)
    handle.remove()
    if implementation == "grouped_mm" or own:
        assert torch.equal(seen[0], before)  # bit for bit, also while it is observed
    else:
        torch.testing.assert_close(seen[0], before)
    assert model.training
    assert model.config._experts_implementation == implementation
    for module in model.modules():
        assert not hasattr(module, "espalier_observer")
        assert not any("Observer" in str(hook) for hook in module._forward_hooks.values())
    model.eval()
    with torch.no_grad():
        assert torch.equal(runtime.decoder(model)(ids, mask).last_hidden_state, before)


def test_the_model_is_left_as_it_was_after_an_error(case):
    _, model, ids, mask = case
    implementation = model.config._experts_implementation

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gather(model, ids, mask, progress=stop)
    assert model.config._experts_implementation == implementation != observe.NAME
    assert not any(hasattr(module, "espalier_observer") or module._forward_hooks for module in model.modules())


def test_one_forward_pass_feeds_all_probes(case):
    _, model, ids, mask = case
    calls, steps = [], []
    handle = runtime.decoder(model).register_forward_hook(lambda *call: calls.append(1))
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
    shape, tokens = shape_of(model), int(mask.sum())
    gather(model, ids, mask)
    once = 8 - shape.top_k + (8 if shape.family in SCALED else 0)  # there f(x) is not what the block runs
    assert sum(rows) == len(shape.layers) * tokens * once


def test_many_experts_keep_evenly_strided_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr("espalier.collecting.sampling.GRAM_TOKENS", 8)
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
    weights = plain.layer("routing", 0)["weights"]
    ratio = weights[:, 1] / weights[:, 0]
    kept = int((ratio >= 0.6).sum())
    assert 0 < kept < 22
    for probe in ("usage", "output_norm", "routed_moments"):
        assert stats.layer(probe, 0)["counts"].sum() == 22 + kept
    np.testing.assert_allclose(stats.layer("usage", 0)["gate_sum"].sum(), 22, rtol=1e-6)
    np.testing.assert_array_equal(stats.layer("routing", 0)["weights"], weights)  # the router's own
    np.testing.assert_allclose(
        stats.layer("mean_output", 0)["all_tokens"], plain.layer("mean_output", 0)["all_tokens"], rtol=1e-5, atol=1e-7
    )
    firsts = np.zeros(8)
    for _, _, outputs, chosen, routing, *_ in plain_blocks(directory, ids, mask)[0]:
        for e in chosen[: 1 if routing[1] < 0.6 * routing[0] else 2]:
            firsts[e] += np.linalg.norm(outputs[e])
    np.testing.assert_allclose(stats.layer("output_norm", 0)["norm_sum"], firsts, rtol=1e-5)


def test_a_merged_checkpoint_feeds_only_what_its_router_means(tmp_path):
    directory = save_tiny("olmoe", tmp_path)
    ids, mask = padded_batch()
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    expected = gather(model, ids, mask, ["routing"]).layer("routing", 0)
    for layer in model.model.layers:
        experts = layer.mlp.experts
        experts.gate_up_proj.data, experts.down_proj.data = experts.gate_up_proj.data[:4], experts.down_proj.data[:4]
        experts.num_experts = 4
        experts.register_forward_pre_hook(lambda _, args: (args[0], args[1] % 4, args[2]))
    found = gather(model, ids, mask, ["routing"], experts=4).layer("routing", 0)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
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
