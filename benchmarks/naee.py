"""CPU time of NAEE's search against enumerating masked block forwards, and of the search among many experts.

    python benchmarks/naee.py [--rounds N]

First a random Mixtral block (E=8, K=2, D=256, F=512) on T=4096 tokens, r=4 of its experts kept. Enumerating runs the
block for each of the 70 sets of dropped experts, their logits at -inf, as NAEE's code does; ours computes every
expert's output once, then the losses of all 256 sets. Both find the same set. Then E=64, K=8, r=48 (4.9e14 sets):
what the search takes once the outputs are known. One thread, CPU seconds, variants in turn within each round, medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from espalier.checkpoints.shape import ModelShape
from espalier.collecting.stats import Stats
from espalier.methods.naee import Naee
from espalier.models.observe import BlockObserver, BlockTrace
from espalier.probes.residual_gram import ResidualGram


def make_block(experts: int, top_k: int, hidden: int, width: int) -> Any:
    """Return a random block whose experts are chosen unequally often."""
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=hidden, intermediate_size=width, num_local_experts=experts, num_experts_per_tok=top_k
    )
    config._experts_implementation = "eager"
    block = MixtralSparseMoeBlock(config).eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=hidden**-0.5)
    with torch.no_grad():
        block.gate.weight *= torch.linspace(0.5, 1.5, experts)[:, None]
    return block


def masked(block: Any, hidden: Tensor, dropped: tuple[int, ...]) -> Tensor:
    """Return the output [T, D] of the block when the router cannot choose `dropped`."""
    logits = torch.nn.functional.linear(hidden, block.gate.weight)
    logits[:, list(dropped)] = -torch.inf
    weights, indices = logits.softmax(-1).topk(block.gate.top_k, dim=-1)
    output: Tensor = block.experts(hidden, indices, weights / weights.sum(-1, keepdim=True))
    return output


def enumerated(block: Any, hidden: Tensor, removed: int) -> tuple[tuple[int, ...], float]:
    """Return the best set of dropped experts and its loss."""
    z = masked(block, hidden, ())
    losses = {
        dropped: float((masked(block, hidden, dropped) - z).double().norm())
        for dropped in combinations(range(block.gate.num_experts), removed)
    }
    return min(losses.items(), key=lambda item: item[1])


def observed(block: Any, hidden: Tensor, shape: ModelShape) -> Stats:
    """Return what the probe `residual_gram` keeps of the block."""
    probe = ResidualGram(shape, len(hidden))
    traces: list[BlockTrace] = []
    observer = BlockObserver(0, traces.append)
    observer.expect(torch.arange(len(hidden)), 0)
    routed = block.gate(hidden)
    observer.router_hook(block.gate, (hidden,), routed)
    observer.run(block.experts, hidden, routed[2], routed[1])
    probe.update(traces[0])
    return Stats(shape, (len(hidden),), {("residual_gram", 0): probe.result()})


def make_shape(experts: int, top_k: int, hidden: int, width: int) -> ModelShape:
    expert = 3 * hidden * width
    return ModelShape("mixtral", (0,), experts, top_k, hidden, width, True, expert, hidden, experts * expert)


def in_turn(variants: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Return the median CPU seconds and the last result of each variant."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    results = {}
    for _ in range(rounds):
        for name, run in variants.items():
            start = time.process_time()
            results[name] = run()
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}, results


def small(rounds: int, tokens: int = 4096) -> None:
    sizes = (8, 2, 256, 512)
    block, shape = make_block(*sizes), make_shape(*sizes)
    hidden = torch.randn(tokens, sizes[2])
    method = Naee(0.5)
    held: dict[str, Stats] = {}

    def outputs() -> None:
        held["stats"] = observed(block, hidden, shape)

    median, results = in_turn(
        {
            "enumerate": lambda: enumerated(block, hidden, 4),
            "outputs": outputs,
            "search": lambda: method.plan_layer(held["stats"], 0, shape, None),
        },
        rounds,
    )
    (dropped, loss), (_, evidence) = results["enumerate"], results["search"]
    assert list(dropped) == evidence["best"][0]["dropped"]
    assert abs(evidence["loss"] / loss - 1) < 1e-4
    ours = median["outputs"] + median["search"]
    print(f"E=8 K=2 r=4 T={tokens} D=256 F=512: both drop {dropped}, loss {loss:.6g} and {evidence['loss']:.6g}")
    print(f"  70 masked block forwards                {median['enumerate']:8.3f} CPU s")
    print(f"  outputs and Gram matrices, once         {median['outputs']:8.3f}")
    print(f"  all 256 sets                            {median['search']:8.3f}")
    print(f"  enumerating / ours                      {median['enumerate'] / ours:8.1f}")
    print(f"  enumerating / all 256 sets              {median['enumerate'] / median['search']:8.1f}")


def many(rounds: int, tokens: int = 4096) -> None:
    sizes = (64, 8, 256, 128)
    block, shape = make_block(*sizes), make_shape(*sizes)
    stats = observed(block, torch.randn(tokens, sizes[2]), shape)
    median, results = in_turn({"search": lambda: Naee(0.25).plan_layer(stats, 0, shape, None)}, rounds)
    _, evidence = results["search"]
    starts = {name: round(value["swapped"], 4) for name, value in evidence["starts"].items()}
    print(f"E=64 K=8 r=48 T={tokens}: search {median['search']:.2f} CPU s; losses from each start {starts}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        small(options.rounds)
        many(options.rounds)


if __name__ == "__main__":
    main()
