"""Time of `collect` against a plain forward pass and against the least that dense probes can cost.

    python benchmarks/collect.py [MODEL] [--rounds N]

MODEL is a checkpoint directory, the embedded model by default; calibration: 16 sequences of `embedded`.
Probes that look at routed outputs only cannot beat one plain pass. `mean_output` and, up to 16 experts,
`residual_gram` need every expert on every token: their floor is the plain pass with the router's top_k set to E,
which runs just that through the library's own kernel. One thread, CPU seconds, all variants in turn within each
round, medians over the rounds.
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from espalier import conf
from espalier.checkpoints.checkpoint import Checkpoint
from espalier.checkpoints.shape import ModelShape
from espalier.collecting.collect import collect
from espalier.families import Family, family_of
from espalier.inputs.assets import model_directory
from espalier.inputs.tokens import make_tokens
from espalier.probes import PROBES

ROUTED = ("usage", "output_norm", "logit_gram", "routing")
BATCH = 8


@contextlib.contextmanager
def every_expert(model: Any, shape: ModelShape, family: Family) -> Iterator[None]:
    """Let the routers pick all E experts."""
    blocks = [getattr(model.base_model.layers[layer], family.module) for layer in shape.layers]
    routers = [getattr(block, family.router_module) for block in blocks]
    for router in routers:
        router.top_k = shape.experts
    try:
        yield
    finally:
        for router in routers:
            router.top_k = shape.top_k


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, default=model_directory())
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = Checkpoint(options.model)
    shape, family = checkpoint.shape(), family_of(checkpoint.config)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    array, _, _ = make_tokens(conf.load("calibration", "embedded") | {"samples": 4}, options.model)
    ids = torch.from_numpy(array)

    def plain() -> None:
        with torch.no_grad():
            for batch in torch.split(ids, BATCH):
                model.base_model(input_ids=batch.long(), use_cache=False)

    def dense() -> None:
        with every_expert(model, shape, family):
            plain()

    def collecting(*probes: str) -> Callable[[], None]:
        def run() -> None:
            collect(model, shape, family, ids, None, probes, batch_size=BATCH)

        return run

    variants = {
        "plain forward, top_k of the model": plain,
        "plain forward, top_k = E (floor of dense probes)": dense,
        "collect usage": collecting("usage"),
        "collect " + " ".join(ROUTED): collecting(*ROUTED),
        "collect mean_output": collecting("mean_output"),
        "collect residual_gram": collecting("residual_gram"),
        "collect all six": collecting(*PROBES),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    plain()  # the first pass pays for the allocator
    for _ in range(options.rounds):
        for name, run in variants.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    base, floor, *_ = median.values()
    flops = 2 * ids.numel() * len(shape.layers) * shape.expert_parameters
    print(f"{options.model}: {len(shape.layers)} layers, E={shape.experts}, K={shape.top_k}, {ids.numel()} tokens")
    print(f"expert FLOPs: {flops * shape.top_k / 1e9:.1f} G routed, {flops * shape.experts / 1e9:.1f} G all")
    print(f"{'CPU s':>8} {'x plain':>8} {'x floor':>8}")
    for name, value in median.items():
        print(f"{value:8.2f} {value / base:8.2f} {value / floor:8.2f}  {name}")


if __name__ == "__main__":
    main()
