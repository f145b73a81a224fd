"""Tokens that enter a layer: kernels against plain loops and against their references.

Run as a script under Triton's interpreter (TRITON_INTERPRET=1) with names of groups, this file checks these groups.
"""

import json
import os
import subprocess
import sys
from contextlib import contextmanager

import numpy
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from espalier.errors import UserError
from espalier.kernels import compact as kernels
from espalier.kernels.compact import (
    compact,
    gather_rows,
    reference_compact,
    reference_gather_rows,
    reference_scatter_add_rows,
    scatter_add_rows,
)

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # the interpreter's bf16 stores truncate
NAN = float("nan")
AOT = """
import json
from espalier.kernels.aot import Case, compiled
from espalier.kernels.compact import aot_cases
from espalier.kernels.targets import TARGETS
for name, kernel, types, constants, options in aot_cases():
    aligned = tuple(a for a, kind in types.items() if kind[0] == "*" or a in ("D", "own") or a.startswith("stride"))
    for target in TARGETS.values():
        found = compiled(Case("compact", name, kernel, types, constants, options, aligned), target)
        print(json.dumps([name, target.name, found.spilled, found.global_atomics, found.shared, found.blocks]))
"""
WITHOUT_TRITON = """
import importlib.util, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find_spec(name, *rest)
sys.modules["triton"] = None  # an import fails
import torch
from espalier.kernels.compact import compact, gather_rows, scatter_add_rows
found = compact(torch.tensor([[1.0, -1.0, 2.0]]), 0.0)
x = torch.arange(6.0).view(3, 2)
assert gather_rows(x, found)[:2].tolist() == [[0.0, 1.0], [4.0, 5.0]]
assert scatter_add_rows(x, x, found).tolist() == [[0.0, 2.0], [2.0, 3.0], [6.0, 8.0]]
"""


def looped(score, threshold, mask=None):
    """Return index, cu_seqlens and place as lists, token by token; a score is compared as float32."""
    threshold = float(numpy.float32(threshold))
    batch, length = score.shape
    index, cu_seqlens, place = [], [0], []
    for b in range(batch):
        for t, value in enumerate(score[b].tolist()):
            enters = value > threshold and (mask is None or bool(mask[b, t]))
            place.append(len(index) if enters else -1)
            if enters:
                index.append(b * length + t)
        cu_seqlens.append(len(index))
    return index + [-1] * (batch * length - len(index)), cu_seqlens, place


def check(found, wanted, where):
    for tensor, values in zip((found.index, found.cu_seqlens, found.place), wanted, strict=True):
        assert tensor.dtype == torch.int32, where
        assert tensor.tolist() == values, where


def close(found, wanted, where):
    assert found.dtype == wanted.dtype, where
    bound = TOLERANCE[found.dtype]
    assert torch.isfinite(found).all(), where
    torch.testing.assert_close(found, wanted, rtol=bound, atol=bound, msg=lambda text: f"{where}: {text}")


def chosen(tokens, share):
    """A compaction of one sequence in which about a share of the tokens enters, and how many these are."""
    found = reference_compact(torch.rand(1, tokens), 1 - share)
    return found, int(found.cu_seqlens[-1])


def poisoned(values, there):
    return values.masked_fill(~there.view(-1, *[1] * (values.dim() - 1)), NAN)


def rows(tokens, width, share, dtype):
    """x, y, gate and weight with NaN in all that is not to be read, the compaction and its count."""
    found, count = chosen(tokens, share)
    enters = found.place >= 0
    x = torch.randn(tokens, width).to(dtype)
    y = poisoned(torch.randn(tokens, width).to(dtype), torch.arange(tokens) < count)
    gate = poisoned(torch.rand(tokens), enters)
    return x, y, gate, torch.rand(width).to(dtype) + 0.5, enters, found, count


def compactions():
    for length in (*range(1, 513), 1024):
        for batch in range(1, 6) if length in (1, 2, 33, 512, 1024) else (1 + length % 5,):
            score = torch.randn(batch, length)
            threshold = (0.3, -9.0, 9.0)[length % 3]  # some, all, none
            mask = torch.rand(batch, length) < 0.8 if length % 2 else None
            wanted = looped(score, threshold, mask)
            check(compact(score, threshold, mask), wanted, (length, batch))
            check(reference_compact(score, threshold, mask), wanted, (length, batch))
    score = torch.randn(3, 700)  # three programs, two of which count
    score[1, :5] = NAN
    score[:, 9] = 0.1
    for given in (score, score.half(), score.bfloat16(), score > 0, score.t().contiguous().t(), score[:, ::2]):
        for mask in (None, torch.randint(-1, 2, given.shape), torch.zeros_like(given, dtype=torch.bool)):
            for threshold in (0.1, -float("inf"), NAN) if mask is None else (0, 0.1):
                wanted = looped(given.float(), threshold, mask)
                check(compact(given, threshold, mask), wanted, (given.dtype, threshold))
                check(reference_compact(given, threshold, mask), wanted, (given.dtype, threshold))
    for shape in ((0, 5), (3, 0), (0, 0)):
        check(compact(torch.zeros(shape), 0.5), looped(torch.zeros(shape), 0.5), shape)
    score = torch.randn(3, 23_457)  # two blocks for most programs, fewer programs than there may be
    found = compact(score, 0.2)
    check(found, looped(score, 0.2), "many")
    assert torch.equal(found.index, compact(score, 0.2).index)


def moved():
    half, full, widths = torch.float16, torch.float32, (1, 33, 100, 600)
    cases = [(n, d, s, full) for d in widths for n, s in ((1, 1), (1, 0), (6, 0), (6, 1), (41, 0.5))]
    cases += [(17, d, 0.5, t) for d in widths for t in (half, torch.bfloat16)]
    cases += [(5, 2 * kernels.COLUMNS + 4, 0.6, full), (512, 33, 0.5, full), (1024, 1, 0.5, half)]
    for case in cases:
        x, y, gate, weight, enters, found, count = rows(*case)
        dropped, few = poisoned(x, enters), len(x) < 100
        with torch.no_grad():
            assert torch.equal(gather_rows(dropped, found)[:count], x[enters]), case
            if few:
                wanted = reference_gather_rows(dropped, found, weight, 1e-5)[:count]
                close(gather_rows(dropped, found, weight, 1e-5)[:count], wanted, case)
            for factor in (None, gate) if few else (gate,):
                wanted = reference_scatter_add_rows(x, y, found, factor)
                if few:
                    close(scatter_add_rows(x, y, found, factor), wanted, case)
                there = x.clone()
                assert scatter_add_rows(there, y, found, factor, in_place=True) is there
                close(there, wanted, case)
                assert torch.equal(there[~enters], x[~enters]), case
        if few:
            filled = gather_rows(dropped, found, weight)
            assert not filled[count:].any(), case
            close(filled, reference_gather_rows(dropped, found, weight), case)
    found, count = chosen(40, 0.5)
    enters = found.place >= 0
    x, y, gate, weight = torch.randn(40, 8), torch.randn(40, 8).half(), torch.rand(40).half(), torch.rand(8)
    close(scatter_add_rows(x, y, found, gate), reference_scatter_add_rows(x, y, found, gate), "mixed")
    with torch.no_grad():
        rounded = gather_rows(y, found, torch.ones(8))[:count]
        assert torch.equal(rounded, rounded.half().float())  # to x's dtype before the weight multiplies
        mixed = gather_rows(y, found, weight)
        close(mixed[:count].half(), reference_gather_rows(y, found, weight)[:count].half(), "mixed")
        large = torch.arange(80, dtype=torch.int32).view(40, 2) + 2**30
        for values in (torch.arange(40)[:, None], large, x[:, 2:5], x.t().contiguous().t()):  # the last have gaps
            assert torch.equal(gather_rows(values, found)[:count], values[enters])
    none = reference_compact(torch.zeros(0, 4), 0.0)
    empty = torch.zeros(0, 3)
    assert gather_rows(empty, none, torch.ones(3)).shape == scatter_add_rows(empty, empty, none).shape == (0, 3)


def gradients():
    cases = [(n, d, s, torch.float32) for n, d, s in ((1, 33, 1), (9, 1, 0), (9, 33, 1), (40, 33, 0.5), (13, 600, 0.5))]
    cases += [(20, 100, 0.5, torch.float16), (3, kernels.COLUMNS + 3, 0.6, torch.float32)]
    for case in cases:
        x, y, gate, weight, enters, found, count = rows(*case)
        beyond = poisoned(torch.randn(x.shape).to(x.dtype), torch.arange(len(x)) < count)
        plain = torch.randn(x.shape).to(x.dtype)

        def gather(function, norm, x=x, enters=enters, found=found, beyond=beyond):
            inputs = [value.clone().requires_grad_() for value in (poisoned(x, enters), *norm)]
            return torch.autograd.grad(function(inputs[0], found, *inputs[1:]), inputs, beyond)

        def scatter(function, needs, factor, x=x, y=y, found=found, plain=plain, **options):
            values = [x, y, *([] if factor is None else [factor])]
            inputs = [value.clone().requires_grad_(need) for value, need in zip(values, needs, strict=False)]
            base = inputs[0] * 1  # a leaf cannot be overwritten
            result = function(base, inputs[1], found, *inputs[2:], **options)
            return torch.autograd.grad(result, [value for value in inputs if value.requires_grad], plain)

        for norm in ((), (weight,)):
            for ours, wanted in zip(gather(gather_rows, norm), gather(reference_gather_rows, norm), strict=True):
                close(ours, wanted, case)
        needed = [(None, [True, True]), (gate, [True] * 3), *((gate, only) for only in torch.eye(3).bool().tolist())]
        for factor, needs in needed:
            wanted = scatter(reference_scatter_add_rows, needs, factor)
            for in_place in (False, True):
                found_gradients = scatter(scatter_add_rows, needs, factor, in_place=in_place)
                for ours, other in zip(found_gradients, wanted, strict=True):
                    close(ours, other, case)
    x = torch.randn(6, 4, requires_grad=True)
    found, _ = chosen(6, 0.5)
    scatter_add_rows(x, gather_rows(x, found) ** 2, found).sum().backward()  # an expanded gradient
    close(x.grad, 1 + 2 * x.detach() * (found.place >= 0)[:, None], "sum")
    with pytest.raises(RuntimeError, match="leaf"):
        scatter_add_rows(x, x.detach(), found, in_place=True)


@contextmanager
def counter():
    """Count how often the interpreter loads and stores each address."""
    from triton.runtime.interpreter import InterpreterBuilder

    load, store, seen = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store, ([], [])

    def addresses(pointers, mask):
        there = numpy.broadcast_to(mask.data, pointers.data.shape).astype(bool)  # some masks are integers
        return pointers.data[there].astype(numpy.int64)  # some are unsigned, and numpy joins both kinds as floats

    def loads(self, pointers, mask, *rest):
        seen[0].append(addresses(pointers, mask))
        return load(self, pointers, mask, *rest)

    def stores(self, pointers, value, mask, *rest):
        seen[1].append(addresses(pointers, mask))
        return store(self, pointers, value, mask, *rest)

    def times(tensor, stored=False):
        """How often each element of a tensor was loaded, or stored."""
        at = numpy.concatenate([numpy.zeros(0, dtype=numpy.int64), *seen[stored]])
        at = (at - tensor.data_ptr()) // tensor.element_size()
        at = at[(at >= 0) & (at < tensor.numel())]
        return torch.from_numpy(numpy.bincount(at, minlength=tensor.numel())).view(tensor.shape)

    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = loads, stores
    try:
        yield times
    finally:
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store


@torch.no_grad()
def counted():
    for tokens, width, share in ((37, 33, 0.5), (20, kernels.COLUMNS + 10, 0.4), (9, 600, 0), (9, 600, 1)):
        x, y, gate, weight, enters, found, count = rows(tokens, width, share, torch.float32)
        once = enters.int()[:, None].expand(tokens, width)
        front = (torch.arange(tokens) < count).int()[:, None].expand(tokens, width)
        for norm in ((), (weight,)):
            with counter() as times:
                out = gather_rows(x, found, *norm)
            assert torch.equal(times(x).int(), once)
            assert torch.equal(times(out, stored=True).int(), front)
            if norm:
                assert torch.equal(times(weight), torch.full((width,), count))
        with counter() as times, torch.enable_grad():
            out = gather_rows(x, found)
        assert torch.equal(times(out, stored=True), torch.ones_like(times(out)))
        with counter() as times:
            out = scatter_add_rows(x, y, found, gate)
        assert torch.equal(times(x), torch.ones_like(times(x)))
        assert torch.equal(times(out, stored=True), torch.ones_like(times(out)))
        assert torch.equal(times(y).int(), front)
        assert not times(gate)[~enters].any()
        with counter() as times:
            scatter_add_rows(x, y, found, gate, in_place=True)
        assert torch.equal(times(x).int(), once)
        assert torch.equal(times(x, stored=True).int(), once)
        assert torch.equal(times(y).int(), front)
    score = torch.randn(2, 2500)
    with counter() as times:
        found = compact(score, 0.0)
    programs = -(-5000 // kernels.PLACED)
    before = programs * (programs - 1) // 2 * kernels.PLACED  # what the programs count in front of their own
    assert int(times(score).sum()) == before + 5000
    for tensor in (found.index, found.place, found.cu_seqlens):
        assert torch.equal(times(tensor, stored=True), torch.ones(tensor.shape, dtype=torch.int64))


GROUPS = {group.__name__: group for group in (compactions, moved, gradients, counted)}


def child(arguments, **environment):
    """Run Python in a process of its own, and return its output."""
    environment = os.environ | {"TRITON_INTERPRET": "0"} | environment
    run = subprocess.run([sys.executable, "-W", "ignore", *arguments], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout.splitlines()


@pytest.mark.parametrize("groups", ["compactions counted", "moved gradients"])
def test_kernels_equal_references_under_the_interpreter(groups):
    assert child([__file__, *groups.split()], TRITON_INTERPRET="1", OMP_NUM_THREADS="1") == groups.split()


def test_kernels_compile_without_spills_or_atomics(tmp_path):
    lines = child(["-c", AOT], TRITON_CACHE_DIR=str(tmp_path))
    assert len(lines) == 3 * len(kernels.aot_cases())
    for line in lines:
        *case, spilled, atomics, shared, blocks = json.loads(line)
        assert (spilled, atomics) == (0, 0), case
        assert shared <= 48 * 1024, case
        assert blocks >= 2, case


def test_without_triton_the_references_run():
    child(["-c", WITHOUT_TRITON])


def test_references_equal_loops():
    for batch, length, width in ((1, 1, 1), (3, 40, 8), (5, 7, 3), (2, 0, 4), (0, 3, 4)):
        score, mask = torch.randn(batch, length), torch.rand(batch, length) < 0.7
        found = compact(score, 0.1, mask)
        check(found, looped(score, 0.1, mask), (batch, length))
        tokens = batch * length
        x, y, gate = torch.randn(tokens, width), torch.randn(tokens, width), torch.rand(tokens)
        index = [token for token in found.index.tolist() if token >= 0]
        gathered, added = gather_rows(x, found), scatter_add_rows(x, y, found, gate)
        for place in range(tokens):
            wanted = x[index[place]] if place < len(index) else torch.zeros(width)
            assert torch.equal(gathered[place], wanted)
        wanted = x.clone()
        for place, token in enumerate(index):
            wanted[token] += gate[token] * y[place]
        torch.testing.assert_close(added, wanted)
        assert scatter_add_rows(x, y, found, gate, in_place=True) is x
        torch.testing.assert_close(x, wanted)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_norm_is_that_of_llama_to_the_bit(dtype):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(96, eps=1e-5).to(dtype)
    norm.weight.data.uniform_(0.5, 1.5)
    x = torch.randn(50, 96).to(dtype)
    found, count = chosen(50, 0.6)
    assert torch.equal(gather_rows(x, found, norm.weight, 1e-5)[:count], norm(x[found.place >= 0]))


class Launches:
    def __init__(self, name, seen):
        self.name, self.seen = name, seen

    def __getitem__(self, grid):
        return lambda *args, **constants: self.seen.append((self.name, grid))


def test_launches_follow_from_shapes_and_nothing_is_read_back(monkeypatch):
    seen = []
    monkeypatch.setattr(kernels, "runs_on", lambda device: True)
    for name in ("compact_tokens", "move_rows", "norm_rows", "scatter_add", "scatter_add_gradients"):
        monkeypatch.setattr(kernels, name, Launches(name, seen))
    with FakeTensorMode():  # which has no values: `item` and `nonzero` raise
        found = compact(torch.empty(4, 640), 0.5, torch.ones(4, 640, dtype=torch.bool))
        compact(torch.empty(4, 65_536), 0.5)
        x, gate = torch.empty(2560, 4096, requires_grad=True), torch.empty(2560, requires_grad=True)
        y = gather_rows(x, found, torch.empty(4096))
        scatter_add_rows(x, y, found, gate).sum().backward()
        with torch.no_grad():
            scatter_add_rows(x, gather_rows(x, found, torch.empty(4096)), found, gate, in_place=True)
    assert seen == [
        ("compact_tokens", (3,)),
        ("compact_tokens", (64,)),
        ("move_rows", (2560, 2)),
        ("scatter_add", (2560, 2)),
        ("scatter_add_gradients", (2560,)),
        ("move_rows", (2560, 2)),
        ("norm_rows", (2560,)),
        ("scatter_add", (2560, 2)),
    ]


def mistakes():
    found, x = reference_compact(torch.zeros(2, 3), 0.0), torch.zeros(6, 4)
    return {
        "score is \\[6\\] of torch.float32.*\\[B, L\\]": lambda: compact(torch.zeros(6), 0.0),
        "score is .* of torch.float64": lambda: compact(torch.zeros(2, 3).double(), 0.0),
        "threshold is a tensor": lambda: compact(torch.zeros(2, 3), torch.tensor(0.5)),
        "mask is \\[3, 2\\]": lambda: compact(torch.zeros(2, 3), 0.0, torch.ones(3, 2).bool()),
        "mask is .* of torch.float32": lambda: compact(torch.zeros(2, 3), 0.0, torch.ones(2, 3)),
        "x is \\[5, 4\\].* has 6 tokens.*Give \\[6, D\\]": lambda: gather_rows(x[:5], found),
        "x is .* of torch.int64": lambda: gather_rows(x.long(), found, torch.ones(4)),
        "weight is \\[3\\].*Give \\[4\\]": lambda: gather_rows(x, found, torch.ones(3)),
        "y is .* of torch.float64": lambda: scatter_add_rows(x, x.double(), found),
        "4 columns and y 3": lambda: scatter_add_rows(x, x[:, :3], found),
        "gate, a number a token, is \\[2, 3\\].*Give \\[6\\]": lambda: scatter_add_rows(x, x, found, torch.ones(2, 3)),
        "strides \\(0, 1\\)": lambda: scatter_add_rows(x[:1].expand(6, 4), x, found, in_place=True),
    }


@pytest.mark.parametrize("text", mistakes())
def test_mistakes_are_named(text):
    with pytest.raises(UserError, match=text):
        mistakes()[text]()


if __name__ == "__main__":
    torch.manual_seed(0)
    for group in sys.argv[1:]:
        GROUPS[group]()
        print(group)
