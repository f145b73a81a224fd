"""ToMoE: what is learnt and its loss by slow computations, the exported model against the masked one, storage."""

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from dense_models import HIDDEN, LAYERS, WIDTH, save_dense
from espalier import conf
from espalier.checkpoints.checkpoint import Checkpoint
from espalier.collecting.stats import Stats
from espalier.errors import UserError
from espalier.fits.tomoe import MEDIAN, Fit
from espalier.methods import build, make_plan
from espalier.methods.signatures import path, pieces, segments_of
from espalier.models import runtime
from espalier.models.running import Running
from espalier.surgery.apply import apply
from espalier.training.fit import fit

pytestmark = pytest.mark.usefixtures("proof_here")

RUNNING = Running.of(device="cpu", stream="never")
IDS = np.random.default_rng(0).integers(3, 95, (12, 16)).astype(np.int32)
CONFIG = conf.load("method", "tomoe")
SMALL = {"experts": 4, "embedding": 16, "tokens": 60 * 64, "rate": 0.02, "offset": 1.0}


def make(**keys):
    return build(CONFIG | SMALL | keys)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    @cache
    def model(family):
        return save_dense(family, tmp_path_factory.mktemp(family) / "model")

    return model


@pytest.fixture(scope="module")
def learnt(models, tmp_path_factory):
    @cache
    def run(family, **keys):
        return fit(models(family), make(**keys).fit, IDS, None, RUNNING, tmp_path_factory.mktemp("fit"))

    return run


def learner(models, family="llama", **own):
    directory = models(family)
    model = runtime.load(directory, "float32").requires_grad_(False)
    settings = make().fit.own | own
    return Fit(model, Checkpoint(directory).dense_shape(), Checkpoint(directory).dense_family, **settings)


# What is learnt


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_the_loss_by_hand(family, models):
    own = learner(models, family)
    own.noisy = False
    with torch.no_grad():  # so that masks differ
        for decoder in own.decoders:
            decoder.weight.mul_(20)
    ids = torch.tensor(IDS[:2]).long()
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    terms = {name: float(value) for name, value in own(ids, mask).items()}
    with torch.no_grad():
        embeddings = own.embeddings()
        logits = [own.logits(n, embeddings[n]).double().numpy() for n in range(LAYERS)]
        target = own.model(input_ids=ids, attention_mask=mask).logits.double()
        with own.masked(embeddings):
            found = own.model(input_ids=ids, attention_mask=mask).logits.double()
        chosen = [each.argmax(1).reshape(2, -1) for each in own._choices]
    total, count = 0.0, 0
    for b in range(2):
        for t in range(ids.shape[1]):
            if mask[b, t]:
                total -= float((target[b, t].softmax(-1) * found[b, t].log_softmax(-1)).sum())
                count += 1
    assert terms["distill"] == pytest.approx(2 * total / count, rel=1e-5)
    masks = [each - np.log(np.log(2)) > 0 for each in logits]
    rho = np.mean([max(row.sum() for row in each) for each in masks]) / WIDTH
    apart = max(rho + 1e-3, 0.501) / min(rho + 1e-3, 0.501)
    assert terms["budget"] == pytest.approx(16 * np.log(apart), rel=1e-5)
    unions = [each.any(axis=0).mean() for each in masks]
    assert terms["union"] == pytest.approx(3 * sum(np.log(1.001 / (u + 1e-3)) for u in unions) / (2 * LAYERS), rel=1e-5)
    balance = []
    for each in chosen:
        kept = each[mask.bool()].numpy()
        balance.append(sum((kept == e).mean() ** 2 for e in range(4)))
    assert terms["balance"] == pytest.approx(np.mean(balance), rel=1e-5)


def test_all_masks_on_is_the_dense_model(models):
    own = learner(models, offset=50.0)
    ids = torch.tensor(IDS[:3]).long()
    with torch.no_grad():
        expected = own.model(input_ids=ids).logits
        with own.masked(own.embeddings()):
            found = own.model(input_ids=ids).logits
        after = own.model(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert torch.equal(after, expected)  # the model is left as it was


def test_noise_is_gumbel_s_and_gradients_pass_straight_through(models):
    own = learner(models)
    torch.manual_seed(0)
    on = torch.stack([own.mask(torch.full((2000,), 0.3)) for _ in range(10)]).mean()
    # P(0.3 + g > 0) with g of Gumbel's distribution: 1 - exp(-exp(0.3))
    assert float(on) == pytest.approx(1 - np.exp(-np.exp(0.3)), abs=0.01)
    own.noisy = False
    logits = torch.tensor([-1.0, 0.5], requires_grad=True)
    mask = own.mask(logits)
    assert mask.tolist() == [0.0, 1.0]
    mask.sum().backward()
    soft = (torch.tensor([-1.0, 0.5]) / 0.4).sigmoid()
    torch.testing.assert_close(logits.grad, soft * (1 - soft) / 0.4)


def test_training_brings_the_masks_to_the_budget_and_uses_every_part(learnt):
    stats, curve = learnt("llama")
    assert curve[-1].terms["budget"] < curve[0].terms["budget"]
    assert curve[-1].loss < curve[0].loss
    widths = [max((row > 0).mean() for row in arrays["logits"]) for _, arrays in stats.layers("tomoe")]
    assert np.mean(widths) == pytest.approx(0.5, abs=0.1)


def test_an_interrupted_fit_ends_with_the_same_numbers(models, learnt, tmp_path, monkeypatch):
    whole, _ = learnt("llama", tokens=8 * 64)
    heard = []

    def log(values, step):
        heard.append(values)
        if len(heard) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("espalier.training.train.TrainingState.due", lambda self: True)
    fitting = make(tokens=8 * 64).fit
    with pytest.raises(KeyboardInterrupt):
        fit(models("llama"), fitting, IDS, None, RUNNING, tmp_path / "state", log=log)
    again, _ = fit(models("llama"), fitting, IDS, None, RUNNING, tmp_path / "state")
    for key, arrays in whole.arrays.items():
        for name, array in arrays.items():
            assert np.array_equal(again.arrays[key][name], array)


# What becomes of it


@pytest.mark.parametrize("family", ["llama", "phi", "gemma2"])
def test_the_exported_model_computes_what_the_masked_one_does(family, models, learnt, tmp_path):
    stats, _ = learnt(family, exact="none")
    directory, shape = models(family), Checkpoint(models(family)).dense_shape()
    plan = make_plan(make(exact="none"), stats, shape, directory)
    apply(directory, plan, tmp_path / "out")
    own = learner(models, family)
    own.noisy = False
    with torch.no_grad():
        for n, (_, arrays) in enumerate(stats.layers("tomoe")):
            own.routers[n].weight.copy_(torch.from_numpy(arrays["router"]))
        kept = {n: torch.from_numpy(arrays["logits"]) - MEDIAN for n, (_, arrays) in enumerate(stats.layers("tomoe"))}
        # r V is one of the embeddings: those of experts are numbered through here.
        own.logits = lambda layer, embeddings, choice=None: choice @ kept[layer]
        with own.masked(torch.eye(4).expand(LAYERS, 4, 4)):
            expected = own.model(input_ids=torch.tensor(IDS).long()).logits
        found = runtime.load(tmp_path / "out")(input_ids=torch.tensor(IDS).long()).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.7])
def test_the_ratio_is_met_by_the_widest_experts(ratio, models, learnt):
    stats, _ = learnt("llama")
    plan = make_plan(make(ratio=ratio), stats, Checkpoint(models("llama")).dense_shape(), models("llama"))
    widest = [max(plan.evidence[layer]["widths"]) for layer in range(LAYERS)]
    assert np.mean(widest) / WIDTH == pytest.approx(1 - ratio, abs=0.5 / WIDTH + 1e-9)
    for layer, operations in plan.layers.items():
        assert operations[0].widest == max(plan.evidence[layer]["widths"])


def test_the_ratio_may_be_met_by_the_average_expert(models, learnt):
    stats, _ = learnt("llama")
    plan = make_plan(make(exact="mean"), stats, Checkpoint(models("llama")).dense_shape(), models("llama"))
    mean = np.mean([plan.evidence[layer]["widths"] for layer in range(LAYERS)])
    assert mean / WIDTH == pytest.approx(0.5, abs=0.5 / WIDTH + 1e-9)
    assert max(plan.evidence[0]["widths"]) > mean


def test_one_expert_is_static_pruning(models, tmp_path):
    shape, directory = Checkpoint(models("llama")).dense_shape(), models("llama")
    method = make(experts=1)
    stats, _ = fit(directory, method.fit, IDS, None, RUNNING, tmp_path / "state")
    plan = make_plan(method, stats, shape, directory)
    assert all(operations[0].router == "none" for operations in plan.layers.values())
    report = apply(directory, plan, tmp_path / "out")
    assert Checkpoint(tmp_path / "out").parameters < Checkpoint(directory).parameters
    assert report["proof"]["max_abs_diff"] is not None


def test_an_expert_without_neurons_gets_its_best(models):
    shape = Checkpoint(models("llama")).dense_shape()
    logits = np.full((4, WIDTH), -5.0, np.float32)
    logits[:3] = np.random.default_rng(0).normal(0, 1, (3, WIDTH))
    logits[3, 7] = -4.0
    router = np.zeros((4, HIDDEN), np.float32)
    stats = Stats(shape, (), {("tomoe", n): {"logits": logits, "router": router} for n in range(LAYERS)})
    plan = make_plan(make(exact="none"), stats, shape, models("llama"))
    assert plan.evidence[0]["widths"][3] == 1


# Storage


def test_segments_are_signatures():
    masks = np.random.default_rng(2).random((5, 200)) < 0.5
    masks[:, 17] = False
    neurons, segments, units = segments_of(masks)
    assert sorted(neurons) == [n for n in range(200) if n != 17 and masks[:, n].any()]
    starts = np.cumsum([0, *segments])
    for expert, unit in enumerate(units):
        stored = [n for s in unit for n in neurons[starts[s] : starts[s + 1]]]
        assert sorted(stored) == np.flatnonzero(masks[expert]).tolist()
    kinds = {tuple(masks[:, n]) for n in neurons}
    assert len(segments) == len(kinds)
    with pytest.raises(ValueError, match="an expert has no neuron"):
        segments_of(np.zeros((2, 5), bool))


def test_experts_of_all_signatures_lie_in_few_pieces():
    """All 255 sets of eight experts: a Gray code leaves 16 pieces an expert in the mean, an order by chance 64."""
    masks = np.array([[n >> expert & 1 for n in range(1, 256)] for expert in range(8)], bool)
    _, _, units = segments_of(masks)
    assert pieces(units) <= 20


def test_a_path_is_an_order_and_not_longer_than_by_chance():
    signatures = np.unique(np.random.default_rng(1).random((40, 6)) < 0.5, axis=0)
    order = path(signatures, np.ones(len(signatures), int))
    assert sorted(order) == list(range(len(signatures)))

    def steps(order):
        return (signatures[order][1:] != signatures[order][:-1]).sum()

    chance = [steps(np.random.default_rng(n).permutation(len(signatures))) for n in range(50)]
    assert steps(order) < min(chance)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("ratio", 1.5, "is not a fraction in"),
        ("experts", 0, "is not a whole number >= 1"),
        ("embedding", 18, "is not a multiple of 4. Use 16"),
        ("temperature", 0, "is not a number above 0"),
        ("budget", "much", "is not a number"),
        ("exact", 1, "known: mean, none, widest"),
        ("tokens", 0, "is not a whole number >= 1"),
    ],
)
def test_bad_values_are_refused(key, value, message):
    with pytest.raises(UserError, match=rf"conf/method/tomoe.yaml: {key}={value};? {message}"):
        make(**{key: value})


def test_too_few_tokens_are_refused(models, tmp_path):
    with pytest.raises(UserError, match=r"conf/method/tomoe.yaml: tokens=60 is less than one step of 64"):
        fit(models("llama"), make(tokens=60).fit, IDS, None, RUNNING, tmp_path)


def test_the_plan_says_what_it_was_made_with(models, learnt):
    stats, _ = learnt("llama")
    plan = make_plan(make(), stats, Checkpoint(models("llama")).dense_shape(), models("llama"))
    assert plan.method == {key: value for key, value in (CONFIG | SMALL).items() if key != "_target_"}
    assert json.loads(json.dumps(plan.document()))["layers"]["0"][0]["op"] == "split"
    assert replace(plan.layers[0][0]) == plan.layers[0][0]


# The prior


def activations(own, family, ids, mask):
    """Inputs [T, D] and activations times columns' norms [T, F] of each FFN, from plain forwards."""
    inputs, found = [[] for _ in range(LAYERS)], [[] for _ in range(LAYERS)]
    with torch.no_grad():
        for row, real in zip(ids, mask, strict=True):
            for layer in range(LAYERS):
                ffn = own.model.model.layers[layer].mlp
                handle = ffn.register_forward_pre_hook(lambda module, args, n=layer: inputs[n].append(args[0][0]))
                own.model(input_ids=row[None, : int(real.sum())])
                handle.remove()
                x = inputs[layer][-1]
                if family == "phi":
                    inner, down = ffn.activation_fn(ffn.fc1(x)), ffn.fc2
                else:
                    inner, down = torch.nn.functional.silu(ffn.gate_proj(x)) * ffn.up_proj(x), ffn.down_proj
                found[layer].append(inner * down.weight.norm(dim=0))
    return [torch.cat(part).numpy() for part in inputs], [torch.cat(part).numpy() for part in found]


@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("family", ["llama", "phi"])
def test_a_prior_starts_from_what_is_active_on_an_experts_tokens(family, experts, models):
    """With decoders that say nothing; every token belongs to the centre that its direction is nearest to."""
    own = learner(models, family, prior=3.0, offset=-MEDIAN, target=0.25, experts=experts)
    ids = torch.tensor(IDS).long()
    mask = torch.ones_like(ids)
    mask[3, 5:] = 0
    own.prepare(ids, mask)
    with torch.no_grad():
        for decoder in own.decoders:
            decoder.weight.zero_()
    inputs, found = activations(own, family, ids, mask)
    for layer, arrays in own.arrays().items():
        x, energy = inputs[layer].astype(np.float64), found[layer].astype(np.float64) ** 2
        centres = arrays["router"] / np.linalg.norm(arrays["router"], axis=1, keepdims=True)
        scale = np.linalg.norm(arrays["router"], axis=1) * np.linalg.norm(x, axis=1).mean()
        assert scale == pytest.approx(np.full(experts, 20.0), rel=1e-4)
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        # k-means compares with the centres before they are made as long as 1
        means = np.stack([unit[(unit @ centres.T).argmax(1) == e].mean(0) for e in range(experts)])
        own_cluster = ((unit[:, None] - means) ** 2).sum(-1).argmin(1)
        for e in range(experts):
            tokens = energy[own_cluster == e]
            mean = (tokens.sum(0) + 64 * energy.mean(0)) / (len(tokens) + 64)
            expected = np.zeros(WIDTH, bool)
            expected[np.argsort(-mean)[: WIDTH // 4]] = True
            assert ((arrays["logits"][e] > 0) != expected).sum() <= (0 if experts == 1 else 2)


def test_more_clusters_than_tokens_are_refused(models):
    own = learner(models, prior=1.0, experts=4)
    with pytest.raises(UserError, match="3 tokens cannot be put into 4 clusters"):
        own.prepare(torch.tensor(IDS[:1, :3]).long(), None)


def test_without_a_prior_nothing_is_measured(models):
    own = learner(models)
    own.prepare(torch.tensor(IDS).long(), None)
    assert not own.known_neurons.any()


def test_all_of_it_is_moved_to_the_model_s_device(models):
    own = learner(models, attention="pairs").to("meta")
    embeddings = torch.empty(2 * LAYERS, 4, SMALL["embedding"], device="meta")
    assert own.logits(0, own.of_ffns(embeddings)[0]).shape == (4, WIDTH)
    assert own.pair_logits(0, embeddings).shape == (own.shape.pairs,)


# Attention


def wild(own):
    """Decoders that keep and leave out in about equal parts."""
    with torch.no_grad():
        for decoder in (*own.decoders, *own.head_decoders):
            decoder.weight.mul_(20)


@pytest.mark.parametrize("attention", ["pairs", "all"])
@pytest.mark.parametrize("family", ["llama", "phi"])
def test_the_budget_counts_attention(family, attention, models):
    own = learner(models, family, attention=attention, offset=0.0)
    own.noisy = False
    wild(own)
    ids = torch.tensor(IDS[:2]).long()
    seen = {}
    handles = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs, n=n: seen.update({n: kwargs["hidden_states"] if kwargs else args[0]}),
            with_kwargs=True,
        )
        for n, layer in enumerate(own.model.model.layers)
    ]
    with torch.no_grad():
        budget = float(own(ids, None)["budget"])
        embeddings = own.embeddings()
        used = whole = 0.0
        for n, layer in enumerate(own.model.model.layers):
            # the last call saw the masked model's inputs: the loss runs the plain one first
            widest = max(int((row + MEDIAN > 0).sum()) for row in own.logits(n, embeddings[2 * n + 1]))
            mean = embeddings[2 * n].mean(0)
            decode = torch.nn.functional.linear(
                torch.nn.functional.gelu(own.head_norms[n](mean)), own.head_decoders[n].weight
            )
            heads = own.model.config
            size = heads.num_attention_heads + heads.num_key_value_heads
            bias = layer.self_attn.q_proj.bias is not None
            pair = 2 * size * (HIDDEN + bias)
            pairs = own.shape.pairs
            used += widest * own.shape.neuron_parameters + pair * int((decode[-pairs:] + MEDIAN > 0).sum())
            whole += WIDTH * own.shape.neuron_parameters + pair * pairs
            if attention == "all":
                entered = own.head_norms[n](own.entries[n](seen[n]) + mean)
                values = own.head_decoders[n](torch.nn.functional.gelu(entered))[..., : 2 * pairs] + 3.0
                used += pair / 2 * int((values + MEDIAN > 0).sum(-1).max())
                whole += pair / 2 * 2 * pairs
    for handle in handles:
        handle.remove()
    assert budget == pytest.approx(16 * abs(np.log((used / whole + 1e-3) / (0.5 + 1e-3))), rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "phi", "qwen3"])
def test_all_of_attention_kept_is_the_dense_model(family, models):
    own = learner(models, family, attention="all", offset=50.0)
    ids = torch.tensor(IDS[:3]).long()
    with torch.no_grad():
        expected = own.model(input_ids=ids).logits
        own.value_logits = lambda layer, embeddings, hidden: torch.full((*hidden.shape[:-1], 2 * own.shape.pairs), 50.0)
        with own.masked(own.embeddings()):
            found = own.model(input_ids=ids).logits
        after = own.model(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert torch.equal(after, expected)


@pytest.mark.parametrize("family", ["llama", "phi", "qwen3", "gemma2"])
def test_exported_attention_computes_what_the_masked_one_does(family, models, tmp_path):
    directory, shape = models(family), Checkpoint(models(family)).dense_shape()
    method = make(attention="all", exact="none", offset=0.0)
    own = learner(models, family, attention="all", offset=0.0, experts=4)
    wild(own)
    own.noisy = False
    arrays = {("tomoe", layer): named for layer, named in own.arrays().items()}
    plan = make_plan(method, Stats(shape, (16,), arrays), shape, directory)
    apply(directory, plan, tmp_path / "out")
    kept = [plan.evidence[layer]["pairs"] for layer in range(LAYERS)]
    assert 0 < sum(kept) < LAYERS * shape.pairs
    with torch.no_grad():
        with own.masked(own.embeddings()):
            expected = own.model(input_ids=torch.tensor(IDS).long()).logits
        found = runtime.load(tmp_path / "out")(input_ids=torch.tensor(IDS).long()).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ratio", [0.3, 0.5])
def test_the_ratio_is_of_ffns_queries_and_keys(ratio, models, learnt):
    stats, curve = learnt("llama", attention="all")
    assert curve[-1].terms["budget"] < curve[0].terms["budget"]
    shape = Checkpoint(models("llama")).dense_shape()
    plan = make_plan(make(ratio=ratio, attention="all"), stats, shape, models("llama"))
    used = sum(
        max(found["widths"]) * shape.neuron_parameters + found["pairs"] * shape.pair_parameters
        for found in plan.evidence.values()
    )
    whole = LAYERS * (WIDTH * shape.neuron_parameters + shape.pairs * shape.pair_parameters)
    assert used / whole == pytest.approx(1 - ratio, abs=0.5 * shape.pair_parameters / whole + 1e-9)


def test_a_prior_ranks_pairs_by_queries_times_keys(models):
    own = learner(models, attention="pairs", prior=3.0, offset=-MEDIAN, target=0.25)
    ids = torch.tensor(IDS).long()
    own.prepare(ids, None)
    with torch.no_grad():
        for decoder in own.head_decoders:
            decoder.weight.zero_()
    with torch.no_grad():
        states = own.model(input_ids=ids, output_hidden_states=True).hidden_states
    heads, keys, head = 4, 2, 2 * own.shape.pairs
    assert (own.model.config.num_attention_heads, own.model.config.num_key_value_heads) == (heads, keys)
    for layer, arrays in own.arrays().items():
        block = own.model.model.layers[layer]
        x = block.input_layernorm(states[layer]).flatten(0, 1)
        q, k = block.self_attn.q_proj(x).view(-1, heads, head), block.self_attn.k_proj(x).view(-1, keys, head)
        worth = np.zeros(own.shape.pairs)
        for h in range(heads):
            for d in range(head):
                product = q[:, h, d].norm() * k[:, h // (heads // keys), d].norm()
                worth[d % own.shape.pairs] += float(product)
        assert set(np.flatnonzero(arrays["pairs"] > 0)) == set(np.argsort(-worth)[: own.shape.pairs // 4])
