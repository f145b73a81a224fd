"""Expert outputs in every layout, and the residual Gram against blocks that are really pruned."""

import copy
from itertools import combinations

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from espalier.collect import collect
from espalier.errors import UserError
from espalier.families import Family, family_of
from espalier.observe import expert_output, observe
from espalier.shape import ModelShape
from tiny import COMMON, FAMILIES, VOCABULARY, save_tiny

# Families without a file of their own, for the layouts: transposed, interleaved and biased; fused on disk; a router
# that is a linear layer.
OTHERS = {
    "gpt_oss": ("mlp", "router", {"num_local_experts": 6, "intermediate_size": 24, "head_dim": 8, "layer_types": None}),
    "granitemoe": ("block_sparse_moe", "router", {"num_local_experts": 6, "intermediate_size": 24}),
    "phimoe": ("mlp", "router", {"num_local_experts": 6, "intermediate_size": 24, "sliding_window": None}),
}


def other_model(model_type):
    module, router, own = OTHERS[model_type]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **{**COMMON, **{k: v for k, v in own.items() if v is not None}})
        model = AutoModelForCausalLM.from_config(config).eval()
        for name, parameter in model.named_parameters():
            if "bias" in name or "router" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    family = Family(
        model_type, type(model).__name__, "", (), (), ("num_local_experts",), module=module, router_module=router
    )
    return model, family, config.num_local_experts


def tiny_model(model_type, directory, **changes):
    model = AutoModelForCausalLM.from_pretrained(save_tiny(model_type, directory, **changes)).eval()
    return model, family_of(model.config.to_dict()), model.config.num_experts


def moe_layers(model, family):
    blocks = ((n, getattr(layer, family.module)) for n, layer in enumerate(model.base_model.layers))
    return tuple(n for n, block in blocks if hasattr(block, "experts"))


def shape(model, family, experts):
    config = model.config
    return ModelShape(
        family.model_type, moe_layers(model, family), experts, 2, config.hidden_size, 24,
        family.renormalise(config.to_dict()), 1, 1, 1,
    )  # fmt: skip


@pytest.mark.parametrize("model_type", [*FAMILIES, *OTHERS])
def test_expert_output_equals_the_eager_block(model_type, tmp_path):
    made = other_model(model_type) if model_type in OTHERS else tiny_model(model_type, tmp_path)
    model, family, experts_count = made
    model.config._experts_implementation = "eager"
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    for layer in moe_layers(model, family):
        experts = getattr(model.base_model.layers[layer], family.module).experts
        for e in range(experts_count):
            with torch.no_grad():
                expected = experts(x, torch.full((5, 1), e), torch.ones(5, 1))
                got = expert_output(experts, x, e)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model_type", [*FAMILIES, *OTHERS])
def test_a_trace_says_what_the_block_did(model_type, tmp_path):
    model, family, experts_count = other_model(model_type) if model_type in OTHERS else tiny_model(model_type, tmp_path)
    ids = torch.randint(3, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(2))
    eager = copy.deepcopy(model)
    eager.config._experts_implementation = "eager"
    inputs, outputs, traces = {}, {}, {}
    layers = moe_layers(model, family)
    for n in layers:
        experts = getattr(eager.base_model.layers[n], family.module).experts
        experts.register_forward_hook(
            lambda _, args, out, n=n: inputs.__setitem__(n, args) or outputs.__setitem__(n, out)
        )
    with torch.no_grad():
        reference = eager(ids).logits
        with observe(model, layers, family, lambda trace: traces.__setitem__(trace.layer, trace)) as observers:
            for observer in observers:
                observer.expect(torch.arange(12), 0)
            torch.testing.assert_close(model(ids).logits, reference, rtol=1e-4, atol=1e-5)
    for n in layers:
        hidden, indices, weights = inputs[n]
        trace = traces[n]
        torch.testing.assert_close(trace.hidden, hidden.reshape(12, -1), rtol=1e-4, atol=1e-5)
        assert torch.equal(trace.indices, indices)
        torch.testing.assert_close(trace.weights, weights, rtol=1e-4, atol=1e-5)
        assert trace.logits.shape == (12, experts_count)
        expected = outputs[n].reshape(12, -1).double()
        torch.testing.assert_close(trace.block_output(), expected, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            dense = trace.outputs()
            for e in range(experts_count):
                torch.testing.assert_close(
                    dense[e], expert_output(trace.experts, trace.hidden, e), rtol=1e-5, atol=1e-6
                )
        part = trace.rows(torch.tensor([7, 2]))
        assert torch.equal(part.outputs(), dense[:, [7, 2]])
        assert part.token.tolist() == [7, 2]


def prune(block, kept):
    """The stock block with only the experts `kept`: router rows and stacked weights sliced."""
    pruned = copy.deepcopy(block)
    index = torch.tensor(kept)
    pruned.gate.weight = torch.nn.Parameter(block.gate.weight[index])
    pruned.experts.gate_up_proj = torch.nn.Parameter(block.experts.gate_up_proj[index])
    pruned.experts.down_proj = torch.nn.Parameter(block.experts.down_proj[index])
    pruned.gate.num_experts = pruned.experts.num_experts = len(kept)
    return pruned


@pytest.mark.parametrize("model_type", FAMILIES)
def test_residual_gram_gives_the_error_of_a_pruned_block(model_type, tmp_path):
    """w^T H w + 2 (s-1) w^T b + (s-1)^2 |z|^2 is ||z' - z||^2 of the block that runs with the kept experts only."""
    model, family, count = tiny_model(model_type, tmp_path)
    ids = torch.randint(3, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(3))
    stats = collect(model, shape(model, family, count), family, ids, None, ["residual_gram"], batch_size=2)
    layer = moe_layers(model, family)[-1]
    block, inputs = model.model.layers[layer].mlp, []
    handle = block.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        model(ids)
    handle.remove()
    x = inputs[0].double()
    block = block.double()
    block.experts.config._experts_implementation = "eager"  # grouped_mm has no float64
    arrays = stats.layer("residual_gram", layer)
    subsets = [subset for size in (2, 5, 7, 8) for subset in combinations(range(count), size)]
    order = np.random.default_rng(0).permutation(len(subsets))[:25]
    shrunk = False
    for kept in [subsets[n] for n in order] + [tuple(range(count))]:
        with torch.no_grad():
            actual = (prune(block, kept)(x) - block(x)).reshape(21, -1).square().sum(-1).numpy()
        for t in range(21):
            upper = np.zeros((count, count))
            upper[np.triu_indices(count)] = arrays["gram"][t]
            gram = upper + np.triu(upper, 1).T
            logits = arrays["logits"][t].astype(np.float64)
            probability = {e: np.exp(logits[e]) / sum(np.exp(logits[f]) for f in kept) for e in kept}
            best = sorted(kept, key=lambda e: -logits[e])[:2]
            w = np.zeros(count)
            w[best] = [probability[e] for e in best]
            if model_type in ("mixtral", "qwen3_moe"):
                w /= w.sum()
            s = w.sum()
            shrunk |= abs(s - 1) > 0.01
            error = w @ gram @ w + 2 * (s - 1) * (w @ arrays["cross"][t]) + (s - 1) ** 2 * arrays["norm"][t]
            np.testing.assert_allclose(error, actual[t], rtol=1e-4, atol=1e-5 * arrays["norm"][t] + 1e-9)
    assert shrunk == (model_type in ("olmoe", "qwen2_moe"))


def test_a_class_outside_the_experts_interface_is_refused(tmp_path):
    model, family, count = tiny_model("mixtral", tmp_path)
    model.model.layers[1].mlp.experts = torch.nn.Identity()
    with pytest.raises(UserError, match=r"layer 1: Identity does not use transformers' experts interface"):
        collect(model, shape(model, family, count), family, torch.ones(1, 2).long(), None, ["usage"])
    assert model.config._experts_implementation == "grouped_mm"
    assert not hasattr(model.model.layers[0].mlp.experts, "espalier_observer")
