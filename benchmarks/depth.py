"""Time and cache of a model whose layers tokens skip, beside the dense model: prefill, decoding, bytes.

    python benchmarks/depth.py [--contexts 512 2048 8192] [--shares 0.5 0.7] [--new 16] [--rounds 3] [--threads 1]
                               [--granularity block] [--dtype float32] [--model DIRECTORY]

SmolLM2-135M by default, every second layer routed. Which tokens enter is drawn by position (`random_depth`), so that
the share is known and no training is needed; a router's own cost is a product with a vector. Both models read the same
random tokens, in turns; medians of the CPU time of this thread (with --threads 1) or wall time, as ratios to the dense
model.

The ideal ratio of a prefill is that of FLOPs of the decoder layers and of the head on one token: a routed layer has the
share of the products, and its square of the attention scores. That of decoding is of bytes: the weights and the cached
keys and values that a token reads on average. That of the cache: half of the layers hold the share. The paper of
MoDification claims up to about 1.2 times the speed and 1 / 1.8 of the memory, long contexts, half of the layers routed.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from espalier.checkpoints.checkpoint import Checkpoint
from espalier.collecting.stats import Stats
from espalier.inputs.smollm2 import smollm2_directory
from espalier.methods import build, make_plan
from espalier.models.depth_count import count_depth
from espalier.models.runtime import load
from espalier.surgery.apply import apply
from espalier.timing.speed import cache_bytes


def clock(threads: int) -> float:
    return time.thread_time() if threads == 1 else time.perf_counter()


@torch.inference_mode()
def run(model: Any, ids: torch.Tensor, context: int, threads: int) -> tuple[float, float, int]:
    """Seconds of a prefill and of the tokens after it one by one, and the bytes of the cache behind the prefill."""
    start = clock(threads)
    cache = model(input_ids=ids[:, :context], use_cache=True, logits_to_keep=1).past_key_values
    middle = clock(threads)
    size = cache_bytes(cache)
    again = clock(threads)
    for place in range(context, ids.shape[1]):
        model(input_ids=ids[:, place : place + 1], past_key_values=cache, use_cache=True)
    return middle - start, clock(threads) - again, size


def ideals(checkpoint: Checkpoint, shares: list[float], granularity: str, context: int) -> dict[str, float]:
    """Ratios to the dense model; `shares` are those of tokens that enter each layer (1: not routed)."""
    decoder, config = checkpoint.any_shape().decoder, checkpoint.config
    assert decoder is not None
    head = int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    scores = 4.0 * context * context / 2 * config["num_attention_heads"] * head  # causal: half of the pairs
    cached = 2.0 * context * int(config["num_key_value_heads"]) * head
    output = int(config["vocab_size"]) * int(config["hidden_size"])
    flops, read, kept = [2.0 * output] * 2, [float(output)] * 2, [0.0, 0.0]
    for layer, share in enumerate(shares):
        part = decoder.part(layer, granularity)
        attends = granularity != "ffn"
        for which, s in enumerate((1.0, share)):
            own = decoder.whole[layer] - part + s * part
            flops[which] += 2.0 * context * own + scores * (s * s if attends else 1.0)
            read[which] += own + cached * (s * s if attends else 1.0)
            kept[which] += cached * (s if attends else 1.0)
    return {"prefill": flops[1] / flops[0], "decode": read[1] / read[0], "cache": kept[1] / kept[0]}


def measure(source: Path, contexts: list[int], share: float, options: argparse.Namespace) -> None:
    checkpoint = Checkpoint(source)
    shape = checkpoint.any_shape()
    method = build(
        {"_target_": "espalier.methods.random_depth.RandomDepth", "capacity": share, "granularity": options.granularity}
    )
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "routed"
        apply(source, make_plan(method, Stats.empty(shape), shape, source), out, prove=False)
        models = [load(directory, options.dtype, "cpu") for directory in (source, out)]
    generator = torch.Generator().manual_seed(0)
    for context in contexts:
        ids = torch.randint(0, int(checkpoint.config["vocab_size"]), (1, context + options.new), generator=generator)
        with count_depth(models[1]) as counter, torch.inference_mode():
            models[1](input_ids=ids[:, :context], use_cache=False, logits_to_keep=1)
        entered = counter.shares()
        shares = [entered.get(layer, 1.0) for layer in range(int(checkpoint.config["num_hidden_layers"]))]
        for model in models:
            run(model, ids[:, : min(context, 256) + 2], min(context, 256), options.threads)
        rounds = []
        for number in range(options.rounds):
            found: list[Any] = [None, None]
            for which in (0, 1) if number % 2 else (1, 0):
                found[which] = run(models[which], ids, context, options.threads)
            rounds.append(found)
        ideal = ideals(checkpoint, shares, options.granularity, context)
        line: dict[str, Any] = {
            "context": context,
            "share": share,
            "entered": round(sum(entered.values()) / len(entered), 3),
        }
        for place, phase in enumerate(("prefill", "decode", "cache")):
            ratios = [own[1][place] / own[0][place] for own in rounds]
            ratio = statistics.median(ratios)
            line[phase] = {
                "ratio": round(ratio, 3),
                "spread": [round(min(ratios), 3), round(max(ratios), 3)],
                "ideal": round(ideal[phase], 3),
                "of ideal saving": round((1 - ratio) / (1 - ideal[phase]), 2),
            }
        line["dense seconds"] = [round(statistics.median(own[0][place] for own in rounds), 3) for place in (0, 1)]
        line["cache MB"] = [round(rounds[0][which][2] / 1e6, 1) for which in (0, 1)]
        print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.7])
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--granularity", default="block")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--model", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        source = options.model or smollm2_directory(Path(folder))
        for share in options.shares:
            measure(source, options.contexts, share, options)


if __name__ == "__main__":
    main()
