"""Time of a streamed `collect` against a plain forward pass of the same model held in memory.

    python benchmarks/stream.py [--layers 4] [--tokens 16384] [--rounds 2] [--threads N]

A random Mixtral-shaped model (D 1024, F 3584, 8 experts, 2 chosen) in fp32 and bf16, sequences of 512 tokens, four at
a time on both sides. All variants in turn within each round; wall seconds, medians over the rounds. `mean_output`
needs every expert on every token: its floor is a plain pass with the routers' top_k set to E.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from espalier.collecting.collect import collect_checkpoint
from espalier.models import runtime
from espalier.models.running import Running

CHEAP = ("usage", "output_norm", "logit_gram", "routing")
LENGTH, BATCH, EXPERTS, CHOSEN = 512, 4, 8, 2
RUNNING = Running.of(device="cpu", stream="always", collect_batch_size=BATCH)


def plain(model: MixtralForCausalLM, ids: torch.Tensor, chosen: int) -> None:
    """Run the decoder with `chosen` experts a token."""
    for layer in model.model.layers:
        layer.mlp.gate.top_k = chosen
    with torch.no_grad():
        for batch in torch.split(ids, BATCH):
            model.model(input_ids=batch, use_cache=False)


def measure(dtype: str, layers: int, tokens: int, rounds: int) -> None:
    config = MixtralConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=3584,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        num_local_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
    )
    torch.manual_seed(0)
    ids = torch.randint(0, 32000, (tokens // LENGTH, LENGTH))
    with tempfile.TemporaryDirectory() as folder:
        MixtralForCausalLM._from_config(config, dtype=getattr(torch, dtype)).save_pretrained(folder)
        model = runtime.load(Path(folder), dtype)
        model.set_experts_implementation("grouped_mm")  # the faster of the library's kernels here

        def streamed(*probes: str) -> Callable[[], None]:
            return lambda: void(collect_checkpoint(Path(folder), dtype, RUNNING, ids, None, probes))

        variants: dict[str, Callable[[], None]] = {
            "plain forward": lambda: plain(model, ids, CHOSEN),
            "plain forward, top_k = E": lambda: plain(model, ids, EXPERTS),
            "streamed collect " + " ".join(CHEAP): streamed(*CHEAP),
            "streamed collect mean_output": streamed("mean_output"),
        }
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        plain(model, ids[:BATCH], CHOSEN)
        for _ in range(rounds):
            for name, run in variants.items():
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    base, every = median["plain forward"], median["plain forward, top_k = E"]
    print(f"{dtype}: {layers} layers, {tokens} tokens, {torch.get_num_threads()} threads")
    print(f"{'s':>8} {'x plain':>8} {'x top_k=E':>10}")
    for name, value in median.items():
        print(f"{value:8.2f} {value / base:8.2f} {value / every:10.2f}  {name}", flush=True)


def void(_: object) -> None:
    """Drop a result."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for dtype in ("float32", "bfloat16"):
        measure(dtype, options.layers, options.tokens, options.rounds)


if __name__ == "__main__":
    main()
