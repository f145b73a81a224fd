"""Expert outputs in every layout, and the residual Gram against blocks that are really pruned."""

import copy
from itertools import combinations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from espalier.checkpoints.shape import ModelShape
from espalier.collecting.collect import collect
from espalier.errors import UserError
from espalier.families import family_of
from espalier.models import runtime
from espalier.models.observe import expert_output, observe
from tiny import CLASSIC, FAMILIES, VOCABULARY, save_tiny

# Those whose weights are a softmax of the chosen logits or of all: what subset searches can recompute.
SOFTMAX = (*CLASSIC, "gpt_oss", "granitemoe", "jamba", "minimax", "qwen3_next")
SCALED = ("llama4_text",)  # the router's weight multiplies the experts' input
RENORMALISED = ("mixtral", "qwen3_moe", "gpt_oss", "granitemoe", "minimax", "qwen3_next")


def tiny_model(model_type, directory, **changes):
    model = AutoModelForCausalLM.from_pretrained(save_tiny(model_type, directory, **changes)).eval()
    return model, family_of(model.config.to_dict()), 8


def moe_layers(model, family):
    return tuple(runtime.moe_blocks(model, family))


def shape(model, family, experts):
    config = model.config
    return ModelShape(
        family.model_type, moe_layers(model, family), experts, family.top_k(config.to_dict()), config.hidden_size, 24,
        family.renormalise(config.to_dict()), 1, 1, 1,
    )  # fmt: skip


@pytest.mark.parametrize("model_type", FAMILIES)
def test_expert_output_equals_the_eager_block(model_type, tmp_path):
    model, family, experts_count = tiny_model(model_type, tmp_path)
    model.config._experts_implementation = "eager"
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    for layer in moe_layers(model, family):
        experts = getattr(runtime.decoder(model).layers[layer], family.module).experts
        for e in range(experts_count):
            with torch.no_grad():
                if family.scales_input:  # runs all of them on one batch each
                    expected = experts(x.repeat(experts_count, 1)).view(experts_count, 5, -1)[e]
                else:
                    expected = experts(x, torch.full((5, 1), e), torch.ones(5, 1))
                got = expert_output(experts, x, e)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if name not in SCALED])
def test_a_trace_says_what_the_block_did(model_type, tmp_path):
    model, family, experts_count = tiny_model(model_type, tmp_path)
    ids = torch.randint(3, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(2))
    eager = copy.deepcopy(model)
    eager.config._experts_implementation = "eager"
    inputs, outputs, traces = {}, {}, {}
    layers = moe_layers(model, family)
    for n in layers:
        experts = getattr(runtime.decoder(eager).layers[n], family.module).experts
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


def test_a_trace_of_a_router_that_scales_the_input(tmp_path):
    """Llama 4: x, the sigmoid of the largest logit, and what its expert makes of their product."""
    model, family, count = tiny_model("llama4_text", tmp_path)
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(2))
    layers, seen, traces = moe_layers(model, family), {}, {}
    assert layers == (0, 2)
    with torch.no_grad():
        hooks = [
            model.model.layers[n].feed_forward.register_forward_hook(
                lambda _, args, output, n=n: seen.__setitem__(n, (args[0].reshape(18, -1), *output))
            )
            for n in layers
        ]
        expected = model(ids).logits
        for hook in hooks:
            hook.remove()
        with observe(model, layers, family, lambda trace: traces.__setitem__(trace.layer, trace)) as observers:
            for observer in observers:
                observer.expect(torch.arange(18), 0)
            assert torch.equal(model(ids).logits, expected)
        for n in layers:
            block, trace = model.model.layers[n].feed_forward, traces[n]
            x, output, logits = seen[n]
            scores = torch.sigmoid(x @ block.router.weight.T)  # [T, E]
            best = scores.argmax(-1)
            assert torch.equal(trace.hidden, x)
            assert torch.equal(trace.logits, logits)
            assert torch.equal(trace.indices[:, 0], best)
            torch.testing.assert_close(trace.weights[:, 0], scores.amax(-1))
            torch.testing.assert_close(trace.block_output().float(), output - block.shared_expert(x))
            for e in range(count):
                scaled = expert_output(block.experts, x * scores[:, e : e + 1], e)
                torch.testing.assert_close(trace.candidates()[e], scaled)
                torch.testing.assert_close(trace.outputs()[e], expert_output(block.experts, x, e))
                torch.testing.assert_close(trace.routed[best == e, 0], scaled[best == e])
                assert not torch.allclose(scaled, scores[:, e : e + 1] * trace.outputs()[e])  # f(s x) is not s f(x)
            dense = trace.outputs(), trace.candidates()
            part = trace.rows(torch.tensor([7, 2]))
            assert torch.equal(part.outputs(), dense[0][:, [7, 2]])
            assert torch.equal(part.candidates(), dense[1][:, [7, 2]])
            cold = trace.rows(slice(3, 5))
            cold._outputs = cold._candidates = None
            torch.testing.assert_close(cold.candidates(), dense[1][:, 3:5])


def test_a_score_that_rounds_to_nothing_chooses_no_expert(tmp_path):
    model, family, count = tiny_model("llama4_text", tmp_path)
    with torch.no_grad():
        for layer in (0, 2):
            model.model.layers[layer].feed_forward.router.weight.mul_(1e4)
            model.model.layers[layer].feed_forward.router.weight[1:] = model.model.layers[
                layer
            ].feed_forward.router.weight[0]
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(2))
    blocks, scores = runtime.moe_blocks(model, family), {}
    hooks = [
        block.router.register_forward_hook(lambda _, args, output, n=n: scores.__setitem__(n, output[0]))
        for n, block in blocks.items()
    ]
    stats = collect(model, shape(model, family, count), family, ids, None, ["usage", "output_norm", "residual_gram"])
    for hook in hooks:
        hook.remove()
    for n in blocks:
        ran = int((scores[n] > 0).any(-1).sum())
        assert 0 < ran < 18
        assert stats.layer("usage", n)["counts"].sum() == ran
        assert (stats.layer("residual_gram", n)["norm"] > 0).sum() == ran


def prune(block, router_name, kept):
    """The stock block with only the experts `kept`: rows of the router and of the stacked experts."""
    pruned = copy.deepcopy(block)
    for module in (getattr(pruned, router_name), pruned.experts):
        for name, tensor in list(module.named_parameters()):
            setattr(module, name, torch.nn.Parameter(tensor[list(kept)]))
        module.num_experts = len(kept)
    return pruned


def output_of(block, x):
    """The output of a block; GPT-OSS and Llama 4 give the router's weights or logits besides."""
    output = block(x)
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("model_type", [*SOFTMAX, *SCALED])
def test_residual_gram_gives_the_error_of_a_pruned_block(model_type, tmp_path):
    """w^T H w + 2 (s-1) w^T b + (s-1)^2 |z|^2 is ||z' - z||^2 of the block that runs with the kept experts only."""
    model, family, count = tiny_model(model_type, tmp_path)
    ids = torch.randint(3, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(3))
    stats = collect(model, shape(model, family, count), family, ids, None, ["residual_gram"], batch_size=2)
    layer = moe_layers(model, family)[-1]
    block, inputs, chosen = getattr(model.model.layers[layer], family.module), [], family.top_k(model.config.to_dict())
    handle = block.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        model(ids)
    handle.remove()
    x = inputs[0].double()
    block = block.double()
    if model_type not in SCALED:
        block.experts.config._experts_implementation = "eager"  # grouped_mm has no float64
    arrays = stats.layer("residual_gram", layer)
    subsets = [subset for size in (2, 5, 7, 8) for subset in combinations(range(count), size)]
    order = np.random.default_rng(0).permutation(len(subsets))[:25]
    shrunk = False
    for kept in [subsets[n] for n in order] + [tuple(range(count))]:
        with torch.no_grad():
            change = output_of(prune(block, family.router_module, kept), x) - output_of(block, x)
            actual = change.reshape(21, -1).square().sum(-1).numpy()
        for t in range(21):
            upper = np.zeros((count, count))
            upper[np.triu_indices(count)] = arrays["gram"][t]
            gram = upper + np.triu(upper, 1).T
            logits = arrays["logits"][t].astype(np.float64)
            probability = {e: np.exp(logits[e]) / sum(np.exp(logits[f]) for f in kept) for e in kept}
            best = sorted(kept, key=lambda e: -logits[e])[:chosen]
            w = np.zeros(count)
            w[best] = [probability[e] for e in best]
            if model_type in RENORMALISED or model_type in SCALED:  # what these add has its weight inside
                w /= w.sum()
            s = w.sum()
            shrunk |= abs(s - 1) > 0.01
            error = w @ gram @ w + 2 * (s - 1) * (w @ arrays["cross"][t]) + (s - 1) ** 2 * arrays["norm"][t]
            np.testing.assert_allclose(error, actual[t], rtol=1e-4, atol=1e-5 * arrays["norm"][t] + 1e-9)
    assert shrunk == (model_type in SOFTMAX and model_type not in RENORMALISED)


def test_a_class_outside_the_experts_interface_is_refused(tmp_path):
    model, family, count = tiny_model("mixtral", tmp_path)
    model.model.layers[1].mlp.experts = torch.nn.Identity()
    with pytest.raises(UserError, match=r"layer 1: Identity does not use transformers' experts interface"):
        collect(model, shape(model, family, count), family, torch.ones(1, 2).long(), None, ["usage"])
    assert model.config._experts_implementation == "grouped_mm"
    assert not hasattr(model.model.layers[0].mlp.experts, "espalier_observer")
