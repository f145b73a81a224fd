"""Experts on a CPU against plain loops, and the life of weights that are packed."""

import copy
import gc
import itertools
import random
import threading
import types
import warnings
import weakref

import pytest
import torch
from torch import nn
from transformers.integrations.moe import use_experts_implementation

from espalier import kernels
from espalier.errors import UserError
from espalier.kernels import cpu_experts, expert_layout, experts, grouped, packed, register, sorted_rows
from espalier.models import runtime
from example_plans import examples
from tiny import FAMILIES

IDS = torch.tensor([[5, 9, 31, 7, 80, 12, 44, 3], [17, 23, 90, 61, 4, 8, 8, 70]])
STOCK = [name for name in FAMILIES if name != "llama4_text"]  # that one has no experts implementation to set
KINDS = ("keep", "tie", "remap", "few", "remap_skip", "skip_top_p", "constant_skip", "keep_narrow")
LAYOUTS = {
    "plain": {},
    "transposed": {"is_transposed": True},
    "biased": {"has_bias": True},
    "gpt_oss": {"is_concatenated": False, "is_transposed": True, "has_bias": True},
    "no_gate": {"has_gate": False},
    "no_gate_biased": {"has_gate": False, "has_bias": True},
    "normed": {"has_post_expert_norm": True},
}
BFLOAT16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # else such experts run as plain products
needs_bfloat16 = pytest.param(
    torch.bfloat16, marks=pytest.mark.skipif(not BFLOAT16, reason="the processor has no bfloat16 products to pack for")
)
SIZES = [(100, 600, 8, 2), (600, 100, 8, 8), (32, 24, 1, 1), (32, 40, 64, 8), (32, 24, 8, 1)]  # D, F, E, K


@pytest.fixture(autouse=True)
def pack_small_ones(monkeypatch):
    """Pack what is too small to gain by it, and warn again of what a test before had a warning of."""
    monkeypatch.setattr(packed, "least", lambda dtype: 0)
    register()
    packed._warn.cache_clear()


def make(layout="plain", hidden=32, width=24, number=8, dtype=torch.float32, act_fn=nn.functional.silu):
    """A module with transformers' experts interface, and random weights."""
    flags = LAYOUTS[layout]

    @use_experts_implementation(**flags)
    class Experts(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts, self.act_fn = number, act_fn
            gated, transposed = flags.get("has_gate", True), flags.get("is_transposed", False)
            name, rows = ("gate_up_proj", 2 * width) if gated else ("up_proj", width)
            shapes = {name: (number, rows, hidden), "down_proj": (number, hidden, width)}
            for name, shape in shapes.items():
                shape = (shape[0], shape[2], shape[1]) if transposed else shape
                self.register_parameter(name, nn.Parameter(torch.randn(shape) * 0.2))
                if flags.get("has_bias"):
                    rows = shape[2 if transposed else 1]
                    self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(number, rows)))
            if flags.get("has_post_expert_norm"):
                self.post_expert_norm = nn.LayerNorm(hidden)

        def forward(self, hidden_states, top_k_index, top_k_weights):
            return "the module's own loop"

        if layout == "gpt_oss":

            def _apply_gate(self, gate_up):
                gate, up = gate_up[..., ::2].clamp(max=1.0), gate_up[..., 1::2].clamp(min=-1.0, max=1.0)
                return (up + 1) * gate * torch.sigmoid(1.702 * gate)

    torch.manual_seed(number)
    module = Experts(types.SimpleNamespace(_experts_implementation="espalier")).to(dtype).eval()
    if layout == "gpt_oss":
        module.alpha, module.limit = 1.702, 1.0
    return module


def routes(tokens, hidden=32, number=8, slots=2, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(tokens, number, generator=generator).topk(slots, dim=-1)
    return torch.randn(tokens, hidden, generator=generator).to(dtype), chosen.indices, chosen.values


def is_packed(model):
    return [packed.KEY in module.__dict__ for module in model.modules() if hasattr(module, "has_gate")]


def check(module, hidden, indices, weights, packs=True):
    packs = packs and (BFLOAT16 or module.down_proj.dtype is not torch.bfloat16)
    expected = cpu_experts.reference(module, hidden, indices, weights)
    with torch.inference_mode():
        found = module(hidden, indices, weights)
        assert all(is_packed(module)) == packs
        assert torch.equal(module(hidden, indices, weights), found)
    assert found.dtype == hidden.dtype
    error = 1e-5 if hidden.dtype == torch.float32 else 2e-2
    largest = expected.abs().max().item() if len(expected) else 0
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=error * max(1, largest))
    return found


def logits(model):
    with torch.inference_mode():
        return model(input_ids=IDS).logits


# What is computed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype):
    module = make(layout, dtype=dtype)
    for tokens in (0, 1, 2, 70):
        check(module, *routes(tokens, dtype=dtype))
    held = module.__dict__.get(packed.KEY)
    whole = held.layout if held else expert_layout.layout_of(module)
    assert (whole.activation, whole.limit, whole.shift) == (
        ("swish", 1.0, 1.0) if layout == "gpt_oss" else ("silu", None, 0.0)
    )


@pytest.mark.parametrize(("hidden", "width", "number", "slots"), SIZES)
def test_sizes(hidden, width, number, slots):
    module = make("biased", hidden, width, number)
    for tokens in (1, 3, 300):
        check(module, *routes(tokens, hidden, number, slots))


@pytest.mark.parametrize("act_fn", [nn.functional.gelu, nn.functional.relu, nn.functional.mish])
@pytest.mark.parametrize("layout", ["plain", "no_gate"])
def test_activations(layout, act_fn):
    module = make(layout, act_fn=act_fn)
    check(module, *routes(20))
    own = module.__dict__[packed.KEY].layout.activation == expert_layout.OWN
    assert own == (act_fn is nn.functional.mish)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packs", [True, False])
def test_choices_that_leave_experts_or_tokens_without_the_other(packs, dtype, monkeypatch):
    monkeypatch.setattr(packed, "least", lambda dtype: 0 if packs else 1 << 20)
    module, (hidden, _, weights) = make("biased", dtype=dtype), routes(40, dtype=dtype)
    for indices in (
        torch.tensor([[3, 3]]),  # all on one expert, and twice
        torch.tensor([[3, 8]]),  # the second slot is none
        torch.tensor([[8, 8]]),
        torch.tensor([[8, 1000]]),
        torch.tensor([[7, 2]]),
    ):
        for tokens in (1, 40):
            found = check(module, hidden[:tokens], indices.expand(tokens, 2), weights[:tokens], packs)
            if (indices >= 8).all():
                assert torch.equal(found, torch.zeros_like(found))
    mixed = torch.randint(0, 11, (40, 6), generator=torch.Generator().manual_seed(1))  # twice, thrice and none
    check(module, hidden, mixed, torch.rand(40, 6), packs)
    check(module, hidden, mixed, torch.rand(40, 6).bfloat16(), packs)


def test_duplicates_run_once(monkeypatch):
    module, (hidden, _, weights) = make(), routes(40)
    check(module, hidden, torch.zeros(40, 2, dtype=torch.int64), weights)
    held, rows = module.__dict__[packed.KEY], []
    inner = held.inner
    monkeypatch.setattr(held, "inner", lambda module, x: rows.append(len(x)) or inner(module, x))
    with torch.inference_mode():
        for tokens in (1, 40):
            module(hidden[:tokens], torch.zeros(tokens, 2, dtype=torch.int64), weights[:tokens])
    assert rows == [packed.fast_rows(), 40]


@pytest.mark.parametrize("tokens", [1, 50])
def test_unselected_experts_are_not_read(tokens):
    module, (hidden, indices, weights) = make("gpt_oss"), routes(tokens)
    indices = indices % 3 * 2  # 0, 2, 4
    expected = check(module, hidden, indices, weights)
    with torch.no_grad():
        packed.unpack(module)
        for parameter in module.parameters():
            for expert in set(range(8)) - set(indices.flatten().tolist()):
                parameter[expert] = float("nan")
        assert torch.equal(module(hidden, indices, weights), expected)
    assert all(is_packed(module))


def test_strided_inputs():
    module, (hidden, indices, weights) = make(), routes(30)
    wide = torch.stack([hidden, hidden], dim=-1).flatten(1)[:, ::2]
    assert torch.equal(
        check(module, wide, indices.t().contiguous().t(), weights), check(module, hidden, indices, weights)
    )
    check(module, wide[:1], indices[:1], weights[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_small_experts_run_as_grouped_products(layout, dtype, monkeypatch):
    monkeypatch.setattr(packed, "least", lambda dtype: 32 * 24 + 1)
    called, run = [], grouped.forward
    monkeypatch.setattr(grouped, "forward", lambda *args: called.append(1) or run(*args))
    for tokens in (0, 1, 2, 70, 700, 2100):
        check(make(layout, dtype=dtype), *routes(tokens, dtype=dtype), packs=False)
    assert len(called) == 2 * 3  # one token has nothing to be grouped, and experts of many rows gain nothing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products_do_not_read_unselected_experts(dtype, monkeypatch):
    monkeypatch.setattr(packed, "least", lambda dtype: 1 << 20)
    module, (hidden, indices, weights) = make("gpt_oss", dtype=dtype), routes(600, dtype=dtype)
    indices = indices % 3 * 2  # 0, 2, 4, of some more than are computed at once
    expected = check(module, hidden, indices, weights, packs=False)
    with torch.no_grad():
        for parameter in module.parameters():
            for expert in (1, 3, 5, 6, 7):
                parameter[expert] = float("nan")
        assert torch.equal(module(hidden, indices, weights), expected)


@pytest.mark.parametrize(("hidden", "width"), [(30, 24), (32, 25)])
def test_the_plain_loop_where_rows_are_not_aligned(hidden, width, monkeypatch):
    monkeypatch.setattr(packed, "least", lambda dtype: 1 << 20)
    monkeypatch.setattr(grouped, "forward", None)
    for dtype in (torch.float32, torch.bfloat16):
        check(make("biased", hidden, width, dtype=dtype), *routes(70, hidden, dtype=dtype), packs=False)


def test_bucket_of_rows_are_compiled():
    rows = range(grouped.TOGETHER + 1)
    numbers = [sorted_rows.bucket(row) for row in rows]
    assert len(set(numbers)) == 1 + 29
    assert numbers == sorted(numbers)
    assert numbers[-1] == grouped.TOGETHER
    for row, number in zip(rows, numbers, strict=True):
        assert row <= number <= max(row + 3, row * 3 / 2)


@pytest.mark.parametrize("split", [False, True])
def test_pieces_hold_every_row_once(split):
    generator = random.Random(0)
    most = sorted_rows.TOGETHER
    for _ in range(200):
        counts = [
            generator.choice([0, 1, 7, 100, most, most + 1, 3 * most - 1]) for _ in range(generator.randint(0, 9))
        ]
        starts = [0, *itertools.accumulate(counts)]
        seen = []
        for first, last, start, stop in sorted_rows.pieces(counts, most, split):
            assert starts[first] <= start <= stop <= starts[last]
            assert stop - start <= most or (not split and last == first + 1)
            assert last == first + 1 or (start, stop) == (starts[first], starts[last])
            seen += range(start, stop)
        assert seen == list(range(sum(counts)))


@pytest.mark.parametrize("family_name", STOCK)
def test_families_equal_eager(family_name, tiny_model):
    model = runtime.load(tiny_model(family_name), "float32")
    expected, ids = logits(model), IDS[:, :4]
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    said = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    model.set_experts_implementation("espalier")
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert all(is_packed(model))
    assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), **settings), said)
    assert all(is_packed(model))


@pytest.mark.parametrize(
    ("family_name", "kind"),
    [pair for pair in examples(*KINDS) if pair[0] in ("mixtral", "gpt_oss", "deepseek_v3")],
)
def test_compressed_checkpoints_equal_eager(family_name, kind, applied):
    model = runtime.load(applied(family_name, kind)[1], "float32")
    expected = logits(model)
    model.set_experts_implementation("espalier")
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert all(is_packed(model))
    mapped = kernels.attach(model)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    model.set_experts_implementation("eager")
    assert torch.equal(logits(model), expected)
    assert bool(mapped) == (kind in ("few", "remap", "remap_skip"))


def test_a_map_is_applied_by_the_implementation_that_joins_picks(applied, monkeypatch):
    monkeypatch.setattr(packed, "least", lambda dtype: 1 << 20)
    model = runtime.load(applied("mixtral", "remap")[1], "float32")
    expected = logits(model)
    model.set_experts_implementation("espalier")
    assert kernels.attach(model)
    given, run = [], grouped.forward
    monkeypatch.setattr(grouped, "forward", lambda *args: given.append(args[3]) or run(*args))
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    stored = max(module.num_experts for module in model.modules() if hasattr(module, "has_gate"))
    assert given
    assert all(int(indices.max()) < stored for indices in given)  # the checkpoint's own hook would say "no expert"
    assert any((indices[:, :1] == indices[:, 1:]).any() for indices in given)


# The life of packed weights


def stored(model):
    """Bytes of the tensors that live, beside packed ones."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecated things that are looked at
        tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor) and x.layout is torch.strided]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors if not x.is_meta}
    return sum(storages.values())


def test_originals_are_dropped_and_come_back():
    module, given = make(hidden=128, width=256), routes(9, hidden=128)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    size, before = sum(p.numel() * 4 for p in module.parameters()), stored(module)
    found = check(module, *given)
    assert before - stored(module) == pytest.approx(size, abs=50_000)
    assert [p.is_meta for p in module.parameters()] == [True, True]
    assert [p.shape for p in module.parameters()] == [tensor.shape for tensor in state.values()]
    again = module.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    assert not any(is_packed(module))
    assert torch.equal(check(module, *given), found)
    packed.unpack(module)
    assert all(torch.equal(module.get_parameter(name), tensor) for name, tensor in state.items())


@pytest.mark.parametrize("dtype", [torch.float32, needs_bfloat16])
@pytest.mark.parametrize("layout", ["plain", "gpt_oss", "no_gate"])
def test_any_bits_come_back(layout, dtype):
    module, given = make(layout, hidden=100, width=77, dtype=dtype), routes(3, hidden=100, dtype=dtype)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    for parameter in module.parameters():
        limits = torch.iinfo(bits)
        parameter.data = torch.randint(limits.min, limits.max, parameter.shape, dtype=bits).view(dtype)
    expected = [parameter.data.clone() for parameter in module.parameters()]
    with torch.inference_mode():
        module(*given)
    assert all(is_packed(module))
    packed.unpack(module)
    for parameter, wanted in zip(module.parameters(), expected, strict=True):
        assert torch.equal(parameter.data.view(bits), wanted.view(bits))


@pytest.mark.parametrize("family_name", ["mixtral", "gpt_oss", "jamba"])
def test_save_pretrained(family_name, tmp_path, tiny_model, applied):
    for directory in (tiny_model(family_name), applied(family_name, "remap_skip")[1]):
        model = runtime.load(directory, "float32")
        expected = logits(model)
        model.set_experts_implementation("espalier")
        found = logits(model)
        model.save_pretrained(tmp_path / directory.name)
        again = runtime.load(tmp_path / directory.name, "float32")
        assert torch.equal(logits(again), expected)
        assert torch.equal(logits(model), found)


def test_training_goes_on_with_the_same_parameters():
    """Steps of an optimizer that knows the parameters, with inference between them, are those of the plain loop."""
    module, twin = make("gpt_oss"), make("gpt_oss")
    parameters = list(module.parameters())
    hidden, indices, weights = routes(30)
    indices[3] = indices[3, 0]  # twice the same
    indices[5] = 8
    kept = indices < 8
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-2) for m in (module, twin)]
    for _ in range(3):
        check(module, hidden, indices, weights)
        given = [hidden.clone().requires_grad_() for _ in range(2)]
        shares = [weights.clone().requires_grad_() for _ in range(2)]
        module(given[0], indices, shares[0]).square().sum().backward()
        one_hot = nn.functional.one_hot(indices, 9)[..., :8] * kept[..., None]
        dense = expert_layout.own_inner(twin, given[1] @ twin.gate_up_proj + twin.gate_up_proj_bias[:, None])
        dense = dense @ twin.down_proj + twin.down_proj_bias[:, None]  # [E, T, D]
        torch.einsum("etd,tke,tk->td", dense, one_hot.float(), shares[1]).square().sum().backward()
        torch.testing.assert_close(given[0].grad, given[1].grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(shares[0].grad, shares[1].grad, rtol=1e-4, atol=1e-4)
        assert not any(is_packed(module))
        with torch.inference_mode():
            module(hidden, indices, weights)
        assert not any(is_packed(module))  # the gradients wait for the step
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert all(a is b for a, b in zip(parameters, module.parameters(), strict=True))
    for found, wanted in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_graph_that_still_needs_the_weights_keeps_them():
    module, given = make(), routes(30)
    loss = module(*given).sum()
    with torch.no_grad():
        module(*given)
    assert not any(is_packed(module))
    loss.backward()
    assert module.down_proj.grad is not None
    module.train()
    module.zero_grad()
    del loss
    with torch.no_grad():
        module(*given)
    assert not any(is_packed(module))  # in training mode
    check(module.eval(), *given)
    assert not any(is_packed(module.train()))


def test_frozen_weights_pass_gradients_on():
    module, (hidden, indices, weights) = make().requires_grad_(False), routes(30)
    check(module, hidden, indices, weights)
    hidden.requires_grad_()
    module(hidden, indices, weights).sum().backward()
    assert hidden.grad.abs().sum() > 0
    with torch.enable_grad():
        module(hidden.detach(), indices, weights)  # nothing asks for gradients
    assert all(is_packed(module))


def test_other_uses_restore_the_weights():
    module, given = make(), routes(30)
    first = check(module, *given)
    twin = copy.deepcopy(module)
    assert not any(is_packed(module) + is_packed(twin))
    assert torch.equal(check(twin, *given), first)
    check(module, *given)
    assert not any(is_packed(module.to(torch.bfloat16)))
    check(module, given[0].bfloat16(), *given[1:])
    module.load_state_dict(twin.state_dict())
    check(module.float(), *given)
    module.load_state_dict(twin.state_dict())
    assert torch.equal(check(module, *given), first)
    for implementation in ("grouped_mm", "batched_mm"):
        module.config._experts_implementation = implementation
        with torch.inference_mode():
            torch.testing.assert_close(module(*given), first, rtol=1e-5, atol=1e-5)
        assert not any(is_packed(module))
        module.config._experts_implementation = "espalier"
        check(module, *given)


def test_new_weights_count_and_lost_changes_are_told():
    module, given = make(), routes(30)
    check(module, *given)
    module.gate_up_proj = nn.Parameter(torch.randn(8, 48, 32))
    check(module, *given)
    module._parameters["down_proj"] = nn.Parameter(torch.randn(8, 32, 24))  # as streaming does
    with torch.inference_mode():
        found = module(*given)
    torch.testing.assert_close(found.double(), cpu_experts.reference(module, *given), rtol=1e-4, atol=1e-4)
    check(module, *given)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2)
        with pytest.raises(UserError, match=r"gate_up_proj was changed in place .* Call .*\.unpack"):
            module(*given)
        packed.unpack(module)
        for parameter in module.parameters():
            parameter.mul_(2)
    assert not torch.equal(check(module, *given), found)


def test_modules_that_share_weights_are_told():
    module, other, given = make(), make(), routes(30)
    other.down_proj = module.down_proj
    check(module, *given)
    with torch.no_grad(), pytest.raises(UserError, match="hold no data"):
        other(*given)
    packed.unpack(nn.ModuleList([module, other]))
    other.config._experts_implementation = "grouped_mm"
    with torch.no_grad():
        assert other(*given).isfinite().all()


def test_no_weights_are_lost_when_packing_ends_early(monkeypatch):
    module, given, mkldnn, calls = make("gpt_oss"), routes(30), torch.ops.mkldnn, []
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}

    def reorder(weight):
        calls.append(weight)
        if len(calls) == 12:  # in the second stack
            raise MemoryError
        return mkldnn._reorder_linear_weight(weight)

    fake = types.SimpleNamespace(_reorder_linear_weight=reorder, _linear_pointwise=mkldnn._linear_pointwise)
    packed.unpackable(torch.float32)
    monkeypatch.setattr(torch.ops, "mkldnn", fake)
    with torch.no_grad(), pytest.raises(MemoryError):
        module(*given)
    assert not any(is_packed(module))
    assert all(torch.equal(module.get_parameter(name), tensor) for name, tensor in state.items())
    check(module, *given)


def test_weights_come_back_though_something_holds_on_to_them():
    module, given = make(), routes(30)
    check(module, *given)
    reference = weakref.ref(module._parameters["down_proj"])
    expected = cpu_experts.reference(module, *given)
    with torch.inference_mode():
        torch.testing.assert_close(module(*given).double(), expected, rtol=0, atol=1e-4)
    assert not module.down_proj.is_meta
    assert reference() is not module.down_proj


def test_threads_meet_at_the_first_call():
    module, given = make(hidden=128, width=256), routes(30, hidden=128)
    found = [None] * 4

    def run(place):
        with torch.inference_mode():
            found[place] = module(*given)

    threads = [threading.Thread(target=run, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, check(module, *given)) for one in found)


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        module = make()
    check(module, *routes(30))
    packed.unpack(module)
    module(*routes(30)).sum().backward()
    assert module.down_proj.grad is not None


def test_compiled_models_run():
    module, given = make(), routes(30)
    expected = check(module, *given)
    packed.unpack(module)
    compiled = torch.compile(module, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(*given), expected)
        module.state_dict()
        assert torch.equal(compiled(*given), expected)
    assert all(is_packed(module))


# What runs instead


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_run_plainly_with_one_warning(dtype):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for tokens in (1, 30):
            check(make(dtype=dtype), *routes(tokens, dtype=dtype), packs=False)
    (warning,) = seen
    name = str(dtype).removeprefix("torch.")
    assert f"Experts: {name} weights are not packed; a loop with plain products runs instead" in str(warning.message)


def test_without_onednns_functions_the_plain_loop_runs(monkeypatch):
    monkeypatch.setattr(torch.ops, "mkldnn", types.SimpleNamespace())
    packed.unpackable.cache_clear()
    try:
        with pytest.warns(UserWarning, match="cannot pack float32 weights here"):
            check(make(), *routes(30), packs=False)
    finally:
        packed.unpackable.cache_clear()


def test_weights_that_come_and_go_are_not_packed():
    module = make()
    module._hf_hook = object()  # as accelerate leaves one
    with pytest.warns(UserWarning, match="come and go"):
        check(module, *routes(30), packs=False)


def test_the_modules_own_loop_runs_for_odd_weights():
    module, given = make(), routes(30)
    module.to(torch.float8_e4m3fn)
    with pytest.warns(UserWarning, match="Experts: weights are float8_e4m3fn; the module's own loop runs") as seen:
        assert [module(*given) for _ in range(2)] == ["the module's own loop"] * 2
    assert len(seen) == 1


def test_devices_other_than_cpus_have_ragged_kernels_or_grouped_mm(monkeypatch):
    module, given = make().to("meta"), [x.to("meta") for x in routes(30)]
    reasons, layouts = iter([None, "too odd", "too odd"]), []

    def unsupported(layout, dtype, device):
        layouts.append(layout)
        assert (dtype, device.type) == (torch.float32, "meta")
        return next(reasons)

    ragged = types.SimpleNamespace(unsupported=unsupported, forward=lambda module, layout, *given: "ragged")
    monkeypatch.setattr("espalier.kernels.ragged", ragged, raising=False)
    monkeypatch.setitem(__import__("sys").modules, "espalier.kernels.ragged", ragged)
    monkeypatch.setattr(experts, "grouped_mm_experts_forward", lambda *given: "grouped_mm")
    with pytest.warns(UserWarning, match="Experts: too odd; grouped_mm runs instead") as seen:
        assert [module(*given) for _ in range(3)] == ["ragged", "grouped_mm", "grouped_mm"]
    assert len(seen) == 1
    assert layouts[0] is layouts[1] == expert_layout.ExpertLayout.of(module)


def test_packing_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(make(), *routes(30))
