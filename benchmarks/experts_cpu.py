"""Time of a MoE block's experts on a CPU: transformers' `eager` and `grouped_mm` beside `espalier`.

    python benchmarks/experts_cpu.py [--hidden 512] [--width 1792] [--experts 8] [--top-k 2] [--dtypes float32 bfloat16]
        [--tokens 1 4 16 64 256 1024 4096] [--seconds 8] [--new]

Mixtral's experts with random weights, on one thread; every token's experts and weights are drawn by chance. The
implementations run in turn within each round, in an order that rotates, each round with another input of eight. With
`--new` every call has an input that no other had: as in use, where oneDNN compiles a product for each number of rows
that an expert gets for the first time. Times are CPU time of this thread, so that other jobs disturb all
implementations alike. Printed is a Markdown table: the median milliseconds of each, and the speed-up of `grouped_mm`
and of `espalier` over `eager`: the median over rounds of the ratio within a round, with the ratios that 20 and 80 % of
the rounds stay below. `possible` is eager's time over the floor: what the products of the rows take at the best rate
that a large product has here, or what the chosen experts' weights and the tokens take to be moved, whichever is more
(espalier.kernels.traffic).

First the outputs are compared with each other, and those of 64 tokens with a computation in float64; nothing is timed
when one differs by more than rounding. How much packed weights gain depends on the CPU, so that the table names it.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from espalier.kernels import cpu_experts, register
from espalier.kernels.chooser import Work
from espalier.kernels.traffic import Floor
from espalier.timing.kernel_clock import Clock

NAMES = ("eager", "grouped_mm", "espalier")
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}  # of the largest output
OF_ALL = 8  # inputs that all implementations are given in turn
Inputs = tuple[Tensor, Tensor, Tensor]
Spent = dict[str, list[float]]


def experts(options: argparse.Namespace, dtype: torch.dtype, implementation: str, seed: int = 0) -> Any:
    """The experts of one block, the same for each implementation."""
    config = MixtralConfig(
        hidden_size=options.hidden,
        intermediate_size=options.width,
        num_local_experts=options.experts,
        num_experts_per_tok=options.top_k,
    )
    config._experts_implementation = implementation
    module = MixtralExperts(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
    return module


def draw(options: argparse.Namespace, tokens: int, dtype: torch.dtype, seed: int) -> Inputs:
    """Hidden states [T, D], and for each token top_k experts with weights that add up to 1."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, options.hidden, generator=generator).to(dtype)
    scores = torch.randn(tokens, options.experts, generator=generator)
    chosen = scores.topk(options.top_k, dim=-1)
    return hidden, chosen.indices, chosen.values.softmax(dim=-1).to(dtype)


def check(modules: dict[str, Any], inputs: Inputs, dtype: str) -> None:
    """SystemExit unless all implementations compute the same, but for rounding."""
    few = [x[:64] for x in inputs]
    expected = cpu_experts.reference(modules["eager"], *few)
    whole = modules["eager"](*inputs)
    for name, module in modules.items():
        found = module(*inputs)
        for wanted in (expected, whole):
            error = (found[: len(wanted)].double() - wanted).abs().max() / wanted.abs().max()
            if not error <= TOLERANCE[dtype]:
                raise SystemExit(f"{name}, {dtype}, {len(found)} tokens: off by {error:.2g} of the largest output")


def measure(modules: dict[str, Any], draw_one: Callable[[int], Inputs], seconds: float, new: bool) -> Spent:
    """Return the seconds of each implementation in each round, of inputs by number."""
    spent: Spent = {name: [] for name in modules}
    names, rounds, end = list(modules), 0, time.thread_time() + seconds
    some = [draw_one(number) for number in range(OF_ALL)]
    for module in modules.values():
        module(*some[0])
    while rounds < 9 or (rounds < 400 and time.thread_time() < end):
        for place in range(len(names)):
            name = names[(place + rounds) % len(names)]
            inputs = draw_one(OF_ALL + rounds * len(names) + place) if new else some[rounds % OF_ALL]
            start = time.thread_time()
            modules[name](*inputs)
            spent[name].append(time.thread_time() - start)
        rounds += 1
    return spent


def floor(options: argparse.Namespace, inputs: list[Inputs], dtype: str, rates: dict[str, float]) -> float:
    """Return the least seconds of a call, the mean over inputs."""
    works = [indices.flatten().bincount(minlength=options.experts).tolist() for _, indices, _ in inputs]
    floors = [Floor.of(Work(options.hidden, options.width, tuple(rows)), len(inputs[0][0]), dtype) for rows in works]
    return statistics.fmean(one.seconds(rates["flops"], rates["bandwidth"]) for one in floors)


def speed_up(eager: list[float], other: list[float]) -> tuple[float, float, float]:
    """Return the median of the ratios, and their 20th and 80th percentiles."""
    ratios = sorted(a / b for a, b in zip(eager, other, strict=True))
    fifths = statistics.quantiles(ratios, n=5)
    return statistics.median(ratios), fifths[0], fifths[-1]


def cpu() -> str:
    """What /proc/cpuinfo calls the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = dict(line.replace("\t", "").split(":", 1) for line in lines if ":" in line)
    return f"{fields.get('model name', '?').strip()}, family {fields.get('cpu family', '?').strip()}" + (
        f", model {fields.get('model', '?').strip()}"
    )


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--width", type=int, default=1792)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=list(TOLERANCE))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024, 4096])
    parser.add_argument("--seconds", type=float, default=8.0, help="CPU seconds a row, at least 9 rounds")
    parser.add_argument("--new", action="store_true", help="an input of its own for every call")
    options = parser.parse_args()
    torch.set_num_threads(1)
    register()
    print(
        f"H={options.hidden}, I={options.width}, E={options.experts}, top-{options.top_k}; {cpu()}; "
        f"torch {torch.__version__}, 1 thread\n"
    )
    print("| tokens | dtype | eager ms | grouped_mm ms | espalier ms | grouped_mm over eager | ", end="")
    print("espalier over eager | possible |\n|---:|---|---:|---:|---:|---:|---:|---:|")
    for dtype in options.dtypes:
        modules = {name: experts(options, getattr(torch, dtype), name) for name in NAMES}
        rates = Clock("cpu", threads=1).machine(getattr(torch, dtype))
        for tokens in options.tokens:
            draw_one = functools.partial(draw, options, tokens, getattr(torch, dtype))
            least = floor(options, [draw_one(number) for number in range(OF_ALL)], dtype, rates)
            check(modules, draw_one(0), dtype)
            spent = measure(modules, draw_one, options.seconds, options.new)
            times = " | ".join(f"{1e3 * statistics.median(spent[name]):.2f}" for name in NAMES)
            ratios = " | ".join(
                "{:.2f} [{:.2f}, {:.2f}]".format(*speed_up(spent["eager"], spent[name])) for name in NAMES[1:]
            )
            possible = statistics.median(spent["eager"]) / least
            print(f"| {tokens} | {dtype} | {times} | {ratios} | {possible:.2f} |", flush=True)
        print(f"\n{dtype}: {rates['flops'] / 1e9:.0f} GFLOP/s, {rates['bandwidth'] / 1e9:.1f} GB/s\n", flush=True)


if __name__ == "__main__":
    main()
