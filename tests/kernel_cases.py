"""What a child process under Triton's interpreter checks: kernels against plain computations of their own.

Run as a script with the name of a group of cases; prints one line a case and fails at the first that is wrong. The
references here are loops over tokens and slots, in float64; they use nothing of espalier.kernels but its arguments.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is defined

import math
import sys
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from espalier.kernels import neuron_ffn, ragged, route_plan, segment_combine
from espalier.kernels.chooser import Choice
from espalier.kernels.expert_layout import ExpertLayout
from espalier.kernels.ragged_gate_up import NeuronLists, Weights
from espalier.kernels.route_plan import RoutePlan, SkipRule
from espalier.kernels.tile import TileConfig

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2}
SMALL = Choice(TileConfig(16, 32, 32), TileConfig(16, 32, 32), 0.0)
SPLIT = Choice(TileConfig(16, 16, 64), TileConfig(16, 64, 32, split=3), 0.0)
TALL = Choice(TileConfig(64, 64, 64, group=2), TileConfig(64, 64, 64), 0.0)


def picks(tokens: int, k: int, experts: int) -> Tensor:
    """Distinct experts of each token, int64 [T, K]."""
    return torch.rand(tokens, experts).argsort(dim=1)[:, :k]


def planned(
    indices: Tensor, weights: Tensor, experts: int, mapped: Tensor | None, rule: str | None, value: float, total
):  # type: ignore[no-untyped-def]
    """Return for each token the list of (expert, weight) in the order of its slots, one token after another."""
    found = []
    rows = experts if mapped is None else len(mapped)
    for row, weight in zip(indices.tolist(), weights.double().tolist(), strict=True):
        slots = [(j, e) for j, e in enumerate(row) if 0 <= e < rows]
        order = sorted(slots, key=lambda slot: (-weight[slot[0]], slot[0]))
        falling = [weight[j] for j, _ in order]
        kept = []
        for place, (j, _) in enumerate(order):
            if rule is None or place == 0:
                runs = True
            elif rule == "ratio":
                runs = falling[place] >= value * falling[0]
            elif rule == "tail":
                runs = sum(falling[place:]) > value * sum(falling)
            else:
                runs = place < value
            if runs:
                kept.append(j)
        scale = 1.0
        if rule is not None and total is not None and len(kept) < len(slots):
            scale = total / sum(weight[j] for j in kept)
        merged: dict[int, float] = {}
        for j, e in slots:
            expert = e if mapped is None else int(mapped[e])
            if j in kept and expert < experts:
                merged[expert] = merged.get(expert, 0.0) + weight[j] * scale
        found.append(list(merged.items()))
    return found


def check_plan(plan: RoutePlan, wanted: list[list[tuple[int, float]]], experts: int, block_m: int) -> None:
    """Compare a plan with the rows that each token should have."""
    rows = [(e, t, w) for t, row in enumerate(wanted) for e, w in row]
    rows.sort(key=lambda row: row[0])  # stable: by token within an expert
    number = len(rows)
    counts = [sum(e == expert for e, _, _ in rows) for expert in range(experts)]
    assert plan.offsets.tolist() == [sum(counts[:e]) for e in range(experts + 1)]
    assert plan.row_token[:number].tolist() == [t for _, t, _ in rows]
    weights = torch.tensor([w for _, _, w in rows], dtype=torch.float64)
    assert torch.allclose(plan.row_weight[:number].double(), weights, rtol=1e-5, atol=1e-7)
    tiles = [(e, sum(counts[:e]) + first) for e in range(experts) for first in range(0, counts[e], block_m)]
    assert len(tiles) <= plan.tiles
    unused = [-1] * (plan.tiles - len(tiles))
    assert plan.tile_expert.tolist() == [e for e, _ in tiles] + unused
    assert plan.tile_row.tolist() == [first for _, first in tiles] + unused
    slots = plan.slot_row.tolist()
    assert sorted(row for token in slots for row in token if row >= 0) == list(range(number))
    for token, row in enumerate(slots):
        assert {rows[place][0] for place in row if place >= 0} == {e for e, _ in wanted[token]}


def plans() -> None:
    """Plans from picks: sizes, empty experts, dropped and doubled picks, maps and rules."""
    for tokens in (0, 1, 2, 17, 64, 129, 512, 1024):
        for experts, k in ((1, 1), (8, 2), (64, 4), (128, 8)):
            if tokens * experts > 40_000:
                continue
            indices, weights = picks(tokens, k, experts), torch.rand(tokens, k)
            found = route_plan.plan(indices, weights, experts, 16)
            check_plan(found, planned(indices, weights, experts, None, None, 0.0, None), experts, 16)
            print("plan", tokens, experts, k)
    for name in ("all on one", "all dropped", "some dropped", "doubled", "int32"):
        indices, weights = picks(70, 3, 8), torch.rand(70, 3)
        if name == "all on one":
            indices = torch.stack([torch.full((70,), 5), torch.full((70,), 8), torch.full((70,), 8)], dim=1)
        elif name == "all dropped":
            indices[:] = 8
        elif name == "some dropped":
            indices[torch.rand(70, 3) < 0.5] = 8
            indices[3, 1] = -1
        elif name == "doubled":
            indices = torch.randint(0, 3, (70, 3))
        else:
            indices = indices.int()
        found = route_plan.plan(indices, weights, 8, 64)
        check_plan(found, planned(indices, weights, 8, None, None, 0.0, None), 8, 64)
        print("plan", name)
    mapped = torch.tensor([0, 1, 1, 2, 0, 3, 4, 1])  # 4: no expert
    for rule, value, total in (
        (None, 0.0, None), ("ratio", 0.6, None), ("ratio", 0.6, 1.0), ("tail", 0.4, 2.5), ("fixed_k", 2, 1.0),
    ):  # fmt: skip
        indices, weights = picks(90, 4, 8), torch.rand(90, 4)
        weights[5] = weights[5, 0]  # equal weights
        found = route_plan.plan(indices, weights, 4, 16, rows=8, expert_map=mapped, skip=SkipRule(rule, value, total))
        check_plan(found, planned(indices, weights, 4, mapped, rule, value, total), 4, 16)
        print("plan", rule, value, total)
    distinct = torch.stack([torch.arange(12)] * 40).masked_fill(torch.rand(40, 12) < 0.5, 12)
    weights = torch.rand(40, 12)
    found = route_plan.plan(distinct, weights, 12, 16, distinct=True)
    check_plan(found, planned(distinct, weights, 12, None, None, 0.0, None), 12, 16)


def scores() -> None:
    """Plans from logits: both functions, corrections, renormalising, top-p, and many slots at once."""
    for tokens, rows, k, function, corrected, renormalise, p in (
        (1, 8, 2, "softmax", False, True, None), (65, 8, 2, "softmax", False, False, None),
        (40, 60, 6, "sigmoid", True, True, None), (50, 8, 4, "softmax", False, True, 0.7),
        (2100, 8, 2, "softmax", False, True, None), (600, 64, 8, "softmax", False, True, None),
    ):  # fmt: skip
        logits = torch.randn(tokens, rows) * 2
        correction = torch.randn(rows) if corrected else None
        found = route_plan.plan_from_scores(
            logits, k, rows, 16, function=function, correction=correction, renormalise=renormalise, scale=1.5,
            skip=SkipRule() if p is None else SkipRule("top_p", p),
        )  # fmt: skip
        probability = logits.double().softmax(1) if function == "softmax" else logits.double().sigmoid()
        by = probability if correction is None else probability + correction.double()
        wanted = []
        for token in range(tokens):
            chosen = sorted(range(rows), key=lambda e: -by[token, e].item())[:k]
            likely = [probability[token, e].item() for e in chosen]
            weight = [1.5 * q / (sum(likely) if renormalise else 1.0) for q in likely]
            kept = range(k) if p is None else [j for j in range(k) if j == 0 or sum(likely[:j]) < p]
            wanted.append([(chosen[j], weight[j]) for j in kept])
        check_plan(found, wanted, rows, 16)
        print("scores", tokens, rows, k, function, p)


def expert(layout: ExpertLayout, x: Tensor, first: Tensor, down: Tensor, first_bias, down_bias) -> Tensor:  # type: ignore[no-untyped-def]
    """One expert's output in float64 for one token, for weights in the layout of the module."""
    z = x @ (first if layout.transposed else first.T)
    if first_bias is not None:
        z = z + first_bias
    if layout.gated:
        gate, up = (z[..., ::2], z[..., 1::2]) if layout.interleaved else z.chunk(2, dim=-1)
        if layout.limit is not None:
            gate, up = gate.clamp(max=layout.limit), up.clamp(-layout.limit, layout.limit)
    else:
        gate, up = z, None
    act = {
        "silu": lambda g: g / (1 + (-g).exp()),
        "gelu": lambda g: g * 0.5 * (1 + torch.erf(g / math.sqrt(2))),
        "gelu_tanh": lambda g: 0.5 * g * (1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))),
        "relu": lambda g: g.clamp(min=0),
        "relu2": lambda g: g.clamp(min=0) ** 2,
        "swish": lambda g: g / (1 + (-layout.alpha * g).exp()),
    }[layout.activation](gate)
    h = act if up is None else act * (up + layout.shift)
    y = h @ (down if layout.transposed else down.T)
    return y if down_bias is None else y + down_bias


class Block:
    """Random stacked experts as a module of transformers has them."""

    def __init__(self, layout: ExpertLayout, dtype: torch.dtype) -> None:
        self.layout = layout
        e, d, f = layout.experts, layout.hidden, layout.width
        wide = (2 if layout.gated else 1) * f
        first, down = torch.randn(e, wide, d) / d**0.5, torch.randn(e, d, f) / f**0.5
        if layout.transposed:
            first, down = first.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
        self.first, self.down = first.to(dtype), down.to(dtype)
        self.first_bias = torch.randn(e, wide).to(dtype) if layout.biased else None
        self.down_bias = torch.randn(e, d).to(dtype) if layout.biased else None

    def kernels(self) -> ragged.Experts:
        down = self.down.transpose(1, 2) if self.layout.transposed else self.down
        return ragged.Experts(self.layout, Weights.of(self.first, self.first_bias, self.layout), down, self.down_bias)

    def output(self, x: Tensor, rows: list[list[tuple[int, float]]]) -> Tensor:
        out = torch.zeros(x.shape, dtype=torch.float64)
        for token, row in enumerate(rows):
            for e, w in row:
                biases = [None if b is None else b[e].double() for b in (self.first_bias, self.down_bias)]
                out[token] += w * expert(
                    self.layout, x[token].double(), self.first[e].double(), self.down[e].double(), *biases
                )
        return out


def layout(
    e: int, d: int, f: int, gated=True, transposed=False, interleaved=False, biased=False, act="silu", **own
) -> ExpertLayout:  # type: ignore[no-untyped-def]
    return ExpertLayout(e, d, f, gated, transposed, interleaved, biased, False, act, **own)


def run(
    where: ExpertLayout, tokens: int, k: int, choice: Choice, dtype=torch.float32, spoil=False, indices=None
) -> None:  # type: ignore[no-untyped-def]
    """Check one MoE block; `spoil` fills every expert that is not chosen and every padding row with NaN."""
    block = Block(where, dtype)
    x = torch.randn(tokens, where.hidden).to(dtype)
    indices = picks(tokens, k, where.experts) if indices is None else indices
    weights = torch.rand(indices.shape)
    wanted = block.output(x, planned(indices, weights, where.experts, None, None, 0.0, None))
    if spoil:
        chosen = set(indices.flatten().tolist())
        for e in range(where.experts):
            if e not in chosen:
                block.first[e], block.down[e] = float("nan"), float("nan")
    experts = block.kernels()
    plan = route_plan.plan(indices, weights, where.experts, choice.down.block_m)
    h = ragged.inner(experts, x, plan, choice.gate_up)
    if spoil:
        h[int(plan.offsets[-1]) :] = float("nan")
    y = ragged.outputs(experts, h, plan, choice.down)
    if spoil:
        y[:, int(plan.offsets[-1]) :] = float("nan")
        plan.row_weight[int(plan.offsets[-1]) :] = float("nan")
    out = segment_combine.forward(y, plan, dtype)
    assert out.dtype == dtype
    assert out.isfinite().all()
    if tokens:
        error = (out.double() - wanted).abs().max().item()
        assert error <= TOLERANCE[dtype] * max(1.0, wanted.abs().max().item()), (where, tokens, k, error)


def blocks() -> None:
    """Whole blocks: lengths, odd sizes, layouts, activations, both dtypes, splits and tall tiles."""
    for tokens in (0, 1, 2, 33, 256, 512, 1024):
        run(layout(8, 48, 24), tokens, 2, SMALL if tokens < 500 else TALL)  # few tiles: each is interpreted
        print("block", tokens)
    for e, k in ((1, 1), (8, 8), (64, 6), (128, 8)):
        run(layout(e, 33, 17), 40, k, SMALL)
    for d, f in ((100, 600), (600, 100), (64, 1), (1, 64), (127, 129)):
        for choice in (SMALL, SPLIT):
            run(layout(4, d, f), 20, 2, choice)
    for dtype in (torch.float32, torch.float16):
        for choice in (SMALL, SPLIT, TALL):
            run(layout(8, 72, 40), 130, 2, choice, dtype)
    oss = {
        "transposed": True,
        "interleaved": True,
        "biased": True,
        "act": "swish",
        "alpha": 1.702,
        "limit": 0.8,
        "shift": 1.0,
    }
    for own in (
        oss, oss | {"interleaved": False}, {"transposed": True}, {"biased": True}, {"gated": False, "act": "relu2"},
        {"gated": False, "biased": True, "act": "gelu"}, {"act": "gelu_tanh"}, {"act": "relu", "limit": 0.5},
    ):  # fmt: skip
        for choice in (SMALL, SPLIT):
            run(layout(4, 40, 24, **own), 37, 2, choice)
        run(layout(4, 32, 64, **own), 37, 2, SPLIT, torch.float16)
        print("layout", own)
    for name, indices in {
        "one expert": torch.full((50, 1), 3),
        "all dropped": torch.full((9, 2), 8),
        "doubled": torch.randint(0, 2, (30, 4)),
        "few experts": torch.randint(0, 2, (30, 1)) * 7,
    }.items():
        run(layout(8, 40, 24), len(indices), 0, SMALL, indices=indices)
        print("block", name)


def poison() -> None:
    """NaN wherever nothing may be read."""
    for choice in (SMALL, SPLIT, TALL):
        for tokens in (1, 5, 40):
            few = torch.randint(0, 3, (tokens, 1)) * 3
            run(layout(8, 50, 20), tokens, 1, choice, spoil=True, indices=few)
            run(layout(8, 32, 32, biased=True), tokens, 1, choice, torch.float16, spoil=True, indices=few)
            run(layout(8, 50, 20), tokens, 1, choice, spoil=True, indices=torch.full((tokens, 2), 8))
            print("poison", tokens)


def counted() -> None:
    """Loaded bytes are the model's: an expert's weights once for each of its tiles of rows, others never."""
    from triton.runtime import interpreter

    loads: list[tuple[int, int]] = []  # address, bytes
    original = interpreter.InterpreterBuilder.create_masked_load

    def count(self, pointers, mask, *rest):  # type: ignore[no-untyped-def]
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        loads.extend((int(at), size) for at in pointers.data[mask.data.astype(bool)].ravel())
        return original(self, pointers, mask, *rest)

    interpreter.InterpreterBuilder.create_masked_load = count
    for tokens, choice in ((1, SMALL), (40, SMALL), (40, SPLIT), (150, TALL)):
        where = layout(8, 50, 20)
        block, x = Block(where, torch.float32), torch.randn(tokens, 50)
        indices, weights = torch.randint(0, 3, (tokens, 2)) * 2 + torch.tensor([0, 1]), torch.rand(tokens, 2)
        plan = route_plan.plan(indices, weights, 8, choice.down.block_m)
        experts = block.kernels()

        def between(tensor: Tensor) -> list[int]:
            """Bytes loaded of each expert's part of a stacked tensor."""
            part = tensor[0].numel() * tensor.element_size()
            found = [0] * len(tensor)
            for at, size in loads:
                place = at - tensor.data_ptr()
                if 0 <= place < part * len(tensor):
                    found[place // part] += size
            return found

        rows = plan.offsets.diff()
        tiles = -(-rows // choice.down.block_m)
        loads.clear()
        h = ragged.inner(experts, x, plan, choice.gate_up)
        assert between(block.first) == [int(n) * 2 * 20 * 50 * 4 for n in tiles]
        columns = -(-20 // choice.gate_up.block_n)
        assert sum(between(x[None])) == int(rows.sum()) * 50 * 4 * columns
        loads.clear()
        y = ragged.outputs(experts, h, plan, choice.down)
        assert between(block.down) == [int(n) * 20 * 50 * 4 for n in tiles]
        loads.clear()
        segment_combine.forward(y, plan, torch.float32)
        assert sum(between(y[:1])) == int(rows.sum()) * 50 * 4
        print("bytes", tokens, tiles.tolist())


def neurons() -> None:
    """Units of one dense FFN: overlapping, shared by all, with weights; NaN in what no unit of the batch runs."""
    for tokens, units, k, split in ((1, 6, 1, 1), (33, 6, 2, 1), (60, 4, 4, 3), (20, 3, 1, 1)):
        for always in (False, True):
            d, f = 40, 90
            gate, up, down = torch.randn(f, d) / d**0.5, torch.randn(f, d) / d**0.5, torch.randn(f, d) / f**0.5
            lists = [sorted(torch.randperm(f - 20)[: 5 + 11 * u].tolist()) for u in range(units)]
            shared = list(range(f - 20, f - 8))
            weights = torch.rand(tokens, units).scatter(1, picks(tokens, units - k, units), 0.0) if k < units else None
            weights = torch.rand(tokens, units) * (torch.rand(tokens, units) < 0.6) if weights is None else weights
            x = torch.randn(tokens, d)
            wanted = torch.zeros(tokens, d, dtype=torch.float64)
            used: set[int] = set(shared if always else [])
            for token in range(tokens):
                parts = [(u, float(weights[token, u])) for u in range(units) if weights[token, u]]
                own = [(lists[u], w) for u, w in parts] + ([(shared, 1.0)] if always else [])
                for neurons_, w in own:
                    used.update(neurons_)
                    h = functional.silu(x[token].double() @ gate[neurons_].double().T)
                    h = h * (x[token].double() @ up[neurons_].double().T)
                    wanted[token] += w * (h @ down[neurons_].double())
            for neuron in set(range(f)) - used:
                gate[neuron], up[neuron], down[neuron] = float("nan"), float("nan"), float("nan")
            where = ExpertLayout(1, d, f, True, False, False, False, False, "silu")
            ffn = neuron_ffn.NeuronFFN(
                where,
                Weights(gate[None], up[None], (0, d, 1), width=f, hidden=d),
                down.t()[None],
                None,
                NeuronLists.of(lists + ([shared] if always else []), x.device),
                units,
                always,
                k / units,
                k,
            )
            choice = Choice(TileConfig(16, 16, 32), TileConfig(16, 16, 32, split=split), 0.0)
            out = neuron_ffn.forward(ffn, x, weights, choice)
            assert (out.double() - wanted).abs().max() < 1e-4, (tokens, units, k)
            print("neurons", tokens, units, k, always)


def gradients() -> None:
    """Gradients of inputs, routing weights, matrices and biases against torch's own of plain loops."""
    clamped = {"act": "swish", "alpha": 1.7, "limit": 1.0, "shift": 1.0}
    oss = clamped | {"transposed": True, "interleaved": True, "biased": True}
    for own in ({}, oss, {"gated": False}):
        where = layout(4, 24, 16, **own)
        block = Block(where, torch.float32)

        class Module(torch.nn.Module):
            """The module that a family would have."""

            def __init__(self, block: Block) -> None:
                super().__init__()
                first = "gate_up_proj" if block.layout.gated else "up_proj"
                self.register_parameter(first, torch.nn.Parameter(block.first))
                self.down_proj = torch.nn.Parameter(block.down)
                if block.layout.biased:
                    self.register_parameter(f"{first}_bias", torch.nn.Parameter(block.first_bias))
                    self.down_proj_bias = torch.nn.Parameter(block.down_bias)

        module = Module(block)
        indices = torch.randint(0, 5, (19, 3))  # 4: none; doubled picks among them
        x, weights = torch.randn(19, 24), torch.rand(19, 3)
        found = []
        for plain in (True, False):
            xs, ws = x.clone().requires_grad_(), weights.clone().requires_grad_()
            module.zero_grad()
            if plain:
                parameters = dict(module.named_parameters())
                first = parameters["gate_up_proj" if where.gated else "up_proj"]
                bias = parameters.get("gate_up_proj_bias" if where.gated else "up_proj_bias")
                out = torch.zeros(19, 24, dtype=torch.float64)
                for token in range(19):
                    for j, e in enumerate(indices[token].tolist()):
                        if e < 4:
                            biases = (
                                (None, None) if bias is None else (bias[e].double(), module.down_proj_bias[e].double())
                            )
                            y = expert(
                                where, xs[token].double(), first[e].double(), module.down_proj[e].double(), *biases
                            )
                            row = torch.nn.functional.one_hot(torch.tensor(token), 19).double()[:, None]
                            out = out + row * (ws[token, j].double() * y)
            else:
                out = ragged.forward(module, where, xs, indices, ws, choice=SMALL)
            (out * torch.arange(24)).sum().backward()
            found.append([xs.grad, ws.grad, *(parameter.grad for parameter in module.parameters())])
        for wanted, mine in zip(*found, strict=True):
            assert (mine - wanted).abs().max() <= 1e-4 * wanted.abs().max(), own
        print("gradients", own)


def logits_of(directory, implementation: str) -> Tensor:  # type: ignore[no-untyped-def]
    """Logits [2, 5, V] of a checkpoint, with whatever kernels it can use where these are asked for."""
    from transformers import AutoModelForCausalLM

    from espalier import kernels

    model = AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=True, dtype=torch.float32, experts_implementation=implementation
    ).eval()
    if implementation == "espalier":
        print(directory.parent.name, "attached", kernels.attach(model))
    ids = torch.randint(3, 90, (2, 5), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def models() -> None:
    """Whole models of every family, stock and compressed: the logits of transformers' own loop."""
    import tempfile
    from pathlib import Path

    from espalier import kernels
    from espalier.surgery.apply import apply
    from example_plans import example_plan
    from tiny import FAMILIES, save_tiny

    kernels.register()
    with tempfile.TemporaryDirectory() as folder:
        for family in FAMILIES:
            if family == "llama4_text":  # has no choice of implementations
                continue
            source = save_tiny(family, Path(folder) / family / "source", torch.float32)
            wanted = logits_of(source, "eager")
            found = logits_of(source, "espalier")
            assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max(), family
        kinds = (
            "remap", "few", "skip", "skip_tail", "skip_fixed_k", "remap_skip", "keep_skip", "constant_skip",
            "skip_top_p", "skip_factor", "neurons", "narrow",
        )  # fmt: skip
        for family, own in (
            ("mixtral", kinds),
            ("gpt_oss", ("remap", "skip", "remap_skip")),
            ("deepseek_v2", ("remap_skip",)),
        ):
            for kind in own:
                out = Path(folder) / f"{family}-{kind}" / "out"
                apply(Path(folder) / family / "source", example_plan(family, kind), out, prove=False)
                wanted, found = logits_of(out, "eager"), logits_of(out, "espalier")
                assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max(), (family, kind)


def tuned() -> None:
    """Tuning keeps the fastest of at most eight candidates, by number of tokens, and modules of that size use them."""
    import tempfile
    from pathlib import Path

    from transformers import MixtralConfig, MixtralForCausalLM

    from espalier.errors import UserError
    from espalier.kernels import tuning

    def mixtral(width: int) -> MixtralForCausalLM:
        return MixtralForCausalLM(
            MixtralConfig(
                hidden_size=32, intermediate_size=width, num_hidden_layers=2, num_local_experts=4, vocab_size=50,
                num_attention_heads=2, num_key_value_heads=2, experts_implementation="eager",
            )
        ).eval()  # fmt: skip

    model = mixtral(24)
    experts = model.model.layers[0].mlp.experts
    asked: list[int] = []

    def timer(call) -> float:  # type: ignore[no-untyped-def]
        call()
        asked.append(1)
        return abs(len(asked) % 100 - 2)  # the second candidate of the first number of tokens

    found = tuning.tune(experts, 2, (3, 40), timer)
    assert 2 < len(asked) <= 16
    where = layout(4, 32, 24)
    from espalier.kernels import device
    from espalier.kernels.chooser import Work, rank

    target = device.target_of(torch.device("cpu"))
    assert found[3] == rank(Work.expected(32, 24, 3, 4, 2), target)[1]
    assert list(found) == [3, 40]
    x, weights = torch.randn(5, 32), torch.rand(5, 2)
    chosen = picks(5, 2, 4)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        file = Path(folder) / "tiles.json"
        tuning.save_tiles(file, experts, found)
        assert tuning.use_tiles(model, file) == 2
        assert ragged._tuned(experts, 2).down == found[3].down
        assert ragged._tuned(experts, 4).down == ragged._tuned(experts, 1000).down == found[40].down
        wanted = experts(x, chosen, weights)
        assert (ragged.forward(experts, where, x, chosen, weights) - wanted).abs().max() < 1e-5
        with pytest.raises(UserError, match="no experts of the model have its sizes"):
            tuning.use_tiles(mixtral(16), file)
    print("tuned", {number: choice.down.document() for number, choice in found.items()})


def sparse() -> None:
    """Checkpoints whose FFNs were split: the kernels' logits are those of the masked computation."""
    import tempfile
    from pathlib import Path

    from transformers import AutoModelForCausalLM

    from dense_models import KINDS, STOCK, save_dense, split_plan
    from espalier import kernels
    from espalier.checkpoints.checkpoint import Checkpoint
    from espalier.surgery.apply import apply

    neuron_ffn.worth = lambda *_: True  # tiny FFNs never are
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as folder:
        for family in ("llama", "phi", "gemma"):
            source = save_dense(family, Path(folder) / family)
            for kind, split in KINDS.items():
                if kind in STOCK:
                    continue
                out = Path(folder) / f"{family}-{kind}"
                apply(source, split_plan(split).check(Checkpoint(source).dense_shape()), out, prove=False)
                model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).eval()
                ffns = [module for module in model.modules() if type(module).__name__ == "SparseFFN"]
                for ffn in ffns:
                    ffn.backend = "masked"
                with torch.no_grad():
                    wanted = model(input_ids=ids).logits
                    attached = kernels.attach(model)
                    assert attached == (0 if kind.startswith("oracle") else len(ffns)), kind
                    for ffn in ffns:
                        ffn.backend = "auto"
                    found = model(input_ids=ids).logits
                assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max(), (family, kind)
                print(family, kind, attached)


@contextmanager
def nothing_read_back():  # type: ignore[no-untyped-def]
    """Fail where a tensor's values, or a size that depends on them, would come to the host."""
    from torch.utils._python_dispatch import TorchDispatchMode

    aten = torch.ops.aten
    syncs = {
        aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.is_nonzero, aten.equal, aten._unique2,
        aten.repeat_interleave, aten.bincount,
    }  # fmt: skip

    class Guard(TorchDispatchMode):
        """Refuses the operators after which the host waits for a GPU."""

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            name = function._overloadpacket
            picks = [pick for pick in args[1] if pick is not None] if name in (aten.index, aten.index_put_) else []
            if name in syncs or any(pick.dtype == torch.bool for pick in picks):
                raise AssertionError(f"{function} makes the host wait")
            return function(*args, **(kwargs or {}))

    def refuse(*_):  # type: ignore[no-untyped-def]
        raise AssertionError("tolist makes the host wait")

    tolist, Tensor.tolist = Tensor.tolist, refuse  # calls no operator
    try:
        with Guard():
            yield
    finally:
        Tensor.tolist = tolist


def entered() -> None:
    """A dense FFN on some tokens against a loop over tokens; NaN in those that do not enter changes nothing."""
    from types import SimpleNamespace

    from espalier.kernels import depth_ffn

    names = {"silu": ("gate_proj", "up_proj", "down_proj", "act_fn"), "gelu": (None, "fc1", "fc2", "activation_fn")}
    for tokens, share, act, dtype in (
        (0, 0.5, "silu", torch.float32), (1, 1.0, "silu", torch.float32), (1, 0.0, "gelu", torch.float32),
        (33, 0.5, "gelu", torch.float32), (130, 0.0, "silu", torch.float32), (130, 1.0, "silu", torch.float16),
        (140, 0.3, "silu", torch.float32), (140, 0.3, "gelu", torch.float16),
    ):  # fmt: skip
        gated = act == "silu"
        block = Block(layout(1, 40, 70, gated=gated, biased=not gated, act=act), dtype)
        weights = [*block.first[0].chunk(2 if gated else 1), block.down[0]]
        biases = [None, None, None] if gated else [block.first_bias[0], block.down_bias[0]]
        stored = [SimpleNamespace(weight=weight, bias=bias) for weight, bias in zip(weights, biases, strict=True)]
        own = [name for name in names[act][:3] if name is not None]
        module = SimpleNamespace(**dict(zip(own, stored, strict=True)))
        ffn = depth_ffn.DenseFFN.of(module, names[act], block.layout)
        x, kept, factor = torch.randn(tokens, 40).to(dtype), torch.rand(tokens) < share, torch.rand(tokens)
        x[~kept], factor[~kept] = float("nan"), float("nan")
        for given in (None, factor):
            each = [1.0] * tokens if given is None else given.tolist()
            wanted = block.output(
                x, [[(0, w)] if enters else [] for w, enters in zip(each, kept.tolist(), strict=True)]
            )
            for choice in (SMALL, SPLIT, TALL, None) if given is factor else (None,):
                with nothing_read_back():
                    found = depth_ffn.forward(ffn, x, kept, given, choice)
                assert found.dtype == dtype
                assert found.shape == x.shape
                assert (found[~kept] == 0).all()
                worst = max(1.0, wanted.abs().max().item()) if tokens else 1.0
                assert ((found.double() - wanted).abs() <= TOLERANCE[dtype] * worst).all(), (tokens, share, act, dtype)
        print("entered", tokens, share, act, dtype)


def depth() -> None:
    """FFNs that tokens skip: alone, and the logits of routed models, of a whole sequence and by cached decoding."""
    import tempfile
    from pathlib import Path

    from transformers import AutoModelForCausalLM

    from dense_models import LAYERS, save_dense
    from depth_plans import KINDS, THRESHOLD, depth_plan, token_by_token
    from espalier import kernels
    from espalier.checkpoints.checkpoint import Checkpoint
    from espalier.plans.depth import Depth
    from espalier.surgery.apply import apply
    from tiny import save_tiny

    score = torch.rand(5)
    for waits in (score.nonzero, score[0].item, lambda: score.tolist(), score[0].__bool__, lambda: score[score > 0.5]):
        try:
            with nothing_read_back():
                waits()
        except AssertionError:
            continue
        raise AssertionError(f"{waits} went unnoticed")
    entered()
    kinds = {
        name: KINDS[name] for name in ("threshold_ffn", "nothing_kept_ffn", "predictor_ffn", "drop_ffn", "all_keys")
    }
    kinds |= {
        "mask_ffn": Depth(**THRESHOLD, weights="mask", granularity="ffn"),
        "all_kept_ffn": Depth(**(THRESHOLD | {"threshold": 0.0}), granularity="ffn"),
        "all_keys_nothing_kept": Depth(**(THRESHOLD | {"threshold": 1.0}), cache="all"),
        "all_keys_all_kept": Depth(**(THRESHOLD | {"threshold": 0.0}), cache="all"),
        "all_keys_top_k": Depth(**(vars(KINDS["top_k"]) | {"cache": "all"})),
    }
    few = ("threshold_ffn", "all_keys")
    more = (*few, "nothing_kept_ffn", "all_keys_top_k")
    some = {"mixtral": few, "gemma2": few, "gemma": more, "phi": more}  # a gate or none, norms of their own
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0

    def logits(model) -> list[Tensor]:  # type: ignore[no-untyped-def]
        with torch.no_grad():
            plain, padded = (model(input_ids=ids, attention_mask=given).logits for given in (None, mask))
        decoded = [token_by_token(model, ids, first=4), token_by_token(model, ids, mask, 4)[mask.bool()]]
        return [plain, padded[mask.bool()], *decoded]

    def guarded(forward):  # type: ignore[no-untyped-def]
        def run(*args, **kwargs):  # type: ignore[no-untyped-def]
            with nothing_read_back():
                return forward(*args, **kwargs)

        return run

    with tempfile.TemporaryDirectory() as folder:
        for family in ("mixtral", "gemma2", "gemma", "phi", "llama"):
            dense = family != "mixtral"  # whose MoE blocks stay torch's
            source = (save_dense if dense else save_tiny)(family, Path(folder) / family)
            for kind in kinds if family == "llama" else some[family]:
                out = Path(folder) / f"{family}-{kind}"
                apply(source, depth_plan(kinds[kind], Checkpoint(source).any_shape()), out, prove=False)
                model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).eval()
                wanted = logits(model)
                attached = kernels.attach(model)
                assert attached == (LAYERS if dense and kind != "drop_ffn" else 0), (family, kind, attached)
                for layer in model.model.layers if dense else ():
                    layer.forward = guarded(layer.forward)
                for found, one in zip(logits(model), wanted, strict=True):
                    assert (found - one).abs().max() <= 1e-4 * one.abs().max(), (family, kind)
                print(family, kind, attached)
    seen: list[Tensor] = []
    for layer in model.model.layers:
        del layer.forward  # what follows is torch's
        layer.mlp.up_proj.register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert all(torch.equal(found, one) for found, one in zip(logits(model), wanted, strict=True))
    assert seen
    for layer in model.model.layers:
        layer.mlp.up_proj._forward_hooks.clear()
    model(input_ids=ids).logits.sum().backward()
    assert all(layer.mlp.up_proj.weight.grad is not None for layer in model.model.layers)


if __name__ == "__main__":
    torch.manual_seed(0)
    globals()[sys.argv[1]]()
