"""Prefill and decoding of whole models, full and compressed, by each way of computing experts, as ratios.

    python benchmarks/generate.py [--model embedded|mixtral] [--dtype float32] [--rounds 7] [--threads 1]

`mixtral` is a random model of Mixtral's shape, 1.1 GB in fp32 (3 layers, hidden 1024, width 3584, 8 experts, 2 chosen);
`embedded` the repository's own. Each is taken whole, pruned to half of its experts, merged to half of them, and with
the second expert skipped for half of the tokens. Batches of 1 and 8 sequences: a prefill of 256 tokens, and 16 tokens
generated after it. All variants and implementations run in turns within a round; ratios are medians of the rounds'
ratios. `ideal` is that of FLOPs of the decoder layers for a prefill, and for decoding that of the bytes of weights that
the batch read, both with the rows and experts of this very run. Logits are first compared with those of transformers'
own loop. CPU time of this thread with --threads 1, else wall time.
"""

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from espalier import kernels
from espalier.checkpoints.checkpoint import Checkpoint
from espalier.inputs import sources
from espalier.models.runtime import moe_blocks
from espalier.plans.operations import Keep, Merge, Operation, Skip
from espalier.plans.plan import Plan
from espalier.surgery.apply import apply

LIBRARY = ("eager", "grouped_mm")
OURS = "espalier"
PROMPT, NEW = 256, 16
BATCHES = (1, 8)
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


def random_mixtral(folder: Path, layers: int) -> Path:
    """Write the random model."""
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=1024, intermediate_size=3584, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=4, num_local_experts=8, num_experts_per_tok=2, vocab_size=8192, sliding_window=None,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(folder)
    return folder


def plans(source: Path, ids: Tensor) -> dict[str, Plan | None]:
    """Return the plan of each variant."""
    checkpoint = Checkpoint(source)
    shape = checkpoint.shape()
    half = range(0, shape.experts, 2)
    betas = median_ratios(source, ids)

    def every(operation: Callable[[int], Operation]) -> Plan:
        return Plan({"name": "benchmark"}, {layer: (operation(layer),) for layer in shape.layers}).check(shape)

    groups = tuple((e, e + 1) for e in half)
    return {
        "full": None,
        "pruned": every(lambda _: Keep(tuple(half))),
        "merged": every(lambda _: Merge(groups, ((0.5, 0.5),) * len(groups), "remap")),
        "skipped": every(lambda layer: Skip(betas[layer])),
    }


def median_ratios(source: Path, ids: Tensor) -> dict[int, float]:
    """Return each layer's median of w_2 / w_1, so that half of the tokens skip their second expert."""
    model = load(source, "eager", torch.float32)
    found: dict[int, float] = {}

    def see(layer: int) -> Callable[..., None]:
        def hook(experts: Any, inputs: tuple[Tensor, ...]) -> None:
            falling = inputs[2].sort(dim=-1, descending=True).values
            found[layer] = float((falling[:, 1] / falling[:, 0]).median())

        return hook

    for layer, block in moe_blocks(model, Checkpoint(source).family).items():
        block.experts.register_forward_pre_hook(see(layer))
    with torch.inference_mode():
        model(input_ids=ids[:1])
    return found


def load(directory: Path, implementation: str, dtype: torch.dtype) -> Any:
    """Return a model that computes its experts in this way."""
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, trust_remote_code=True, experts_implementation=implementation
    )
    return model.eval()


class Counter:
    """Counts rows and experts that a model's blocks run."""

    def __init__(self, model: Any, directory: Path) -> None:
        self.rows, self.read = 0, 0
        experts = [block.experts for block in moe_blocks(model, Checkpoint(directory).family).values()]
        self.each = sum(p[0].numel() for p in experts[0].parameters())  # of one expert
        layers = sum(p.numel() for p in model.model.layers.parameters())
        self.rest = layers - sum(p.numel() for e in experts for p in e.parameters())
        self.head = model.lm_head.weight.numel()
        self.handles = [e.register_forward_pre_hook(self.see) for e in experts]

    def see(self, experts: Any, inputs: tuple[Tensor, ...]) -> None:
        valid = inputs[1][inputs[1] < experts.num_experts]
        pairs = {(token, e) for token, row in enumerate(inputs[1].tolist()) for e in row if e < experts.num_experts}
        self.rows += len(pairs)
        self.read += len(valid.unique())


def cost(directory: Path, ids: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """Return FLOPs of a prefill, and parameters read by decoding, of this run's rows."""
    model = load(directory, "eager", dtype)
    counter = Counter(model, directory)
    with torch.inference_mode():
        cache = model(input_ids=ids[:, :PROMPT], use_cache=True, logits_to_keep=1).past_key_values
        flops = 2.0 * (counter.rest * ids.shape[0] * PROMPT + counter.rows * counter.each)
        counter.read = 0
        steps(model, cache, ids)
    return flops, NEW * (counter.rest + counter.head) + counter.read * counter.each


def steps(model: Any, cache: Any, ids: Tensor) -> None:
    """Feed the tokens after the prompt one by one."""
    for place in range(PROMPT, PROMPT + NEW):
        model(input_ids=ids[:, place : place + 1], past_key_values=cache, use_cache=True)


def timed(model: Any, ids: Tensor, clock: Callable[[], float]) -> tuple[float, float]:
    """Return the seconds of a prefill and of decoding."""
    with torch.inference_mode():
        start = clock()
        cache = model(input_ids=ids[:, :PROMPT], use_cache=True, logits_to_keep=1).past_key_values
        middle = clock()
        steps(model, cache, ids)
        return middle - start, clock() - middle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("embedded", "mixtral"), default="mixtral")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.thread_time if arguments.threads == 1 else time.perf_counter
    dtype = getattr(torch, arguments.dtype)
    kernels.register()
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.model == "embedded":
            source = sources.resolve("embedded:moe", None, Path(folder))
        else:
            source = random_mixtral(Path(folder) / "source", arguments.layers)
        ids = torch.randint(Checkpoint(source).config["vocab_size"], (max(BATCHES), PROMPT + NEW), generator=generator)
        directories: dict[str, Path] = {}
        for name, plan in plans(source, ids).items():
            directories[name] = source if plan is None else Path(folder) / name
            if plan is not None:
                apply(source, plan, directories[name], prove=False)
        models = {}
        for name, directory in directories.items():
            models[name, "library"] = load(directory, "eager", dtype)
            models[name, OURS] = load(directory, OURS, dtype)
            with torch.inference_mode():
                wanted, found = (models[name, kind](input_ids=ids[:1]).logits.float() for kind in ("library", OURS))
            error = float((found - wanted).abs().max() / wanted.abs().max())
            if not error <= TOLERANCE[dtype]:
                raise SystemExit(f"{name}: logits differ by {error:.1e} of the largest; no time is reported.")
        seconds: dict[tuple[str, str, int], list[tuple[float, float]]] = defaultdict(list)
        for number in range(arguments.rounds + 1):
            for batch in BATCHES:
                for name in directories:
                    for implementation in (*LIBRARY, OURS):
                        model = models[name, OURS if implementation == OURS else "library"]
                        model.set_experts_implementation(implementation)
                        found_seconds = timed(model, ids[:batch], clock)
                        if number:  # the first round warms up
                            seconds[name, implementation, batch].append(found_seconds)
        report(directories, seconds, ids, dtype)


def report(
    directories: dict[str, Path],
    seconds: dict[tuple[str, str, int], list[tuple[float, float]]],
    ids: Tensor,
    dtype: torch.dtype,
) -> None:
    """Print one line for each variant, batch and phase."""
    print(
        "| model | batch | phase | eager ms | grouped_mm ms | espalier ms | over the library's best | / full | ideal |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for batch in BATCHES:
        costs = {name: cost(directory, ids[:batch], dtype) for name, directory in directories.items()}
        for phase, what in enumerate(("prefill", "decode")):
            for name in directories:
                own = {i: [pair[phase] for pair in seconds[name, i, batch]] for i in (*LIBRARY, OURS)}
                middle = {i: statistics.median(values) for i, values in own.items()}
                best = min(LIBRARY, key=lambda i: middle[i])
                gain = statistics.median(a / b for a, b in zip(own[best], own[OURS], strict=True))
                full = [pair[phase] for pair in seconds["full", OURS, batch]]
                ratio = statistics.median(a / b for a, b in zip(own[OURS], full, strict=True))
                ideal = costs[name][phase] / costs["full"][phase]
                times = " | ".join(f"{middle[i] * 1e3:.1f}" for i in (*LIBRARY, OURS))
                print(f"| {name} | {batch} | {what} | {times} | {gain:.2f} | {ratio:.2f} | {ideal:.2f} |")


if __name__ == "__main__":
    main()
