"""Time a checkpoint against the uncompressed model: prefill and one-sequence decoding, in turns in one process.

Both read the same held-out text, so that they do the same work and routers see what they were made for. On one thread
of a processor the clock counts that thread's own time, which other programs hardly change; else it is the wall's.
Beside each ratio stands the ideal one: decoding reads the weights that a token uses, so their number's ratio; a prefill
computes, so that of its FLOPs, in which a layer that some tokens skip has attention among the others only. The ideal
knows no kernel, router or memory but weights.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from espalier.checkpoints.checkpoint import Checkpoint
from espalier.costs.estimate import forward_flops
from espalier.costs.sizes import Sizes, sizes_of_directory
from espalier.errors import UserError
from espalier.inputs.tokens import load_tokenizer
from espalier.inputs.windows import held_out
from espalier.models.active import count_parameters
from espalier.models.running import Running
from espalier.models.runtime import load
from espalier.scoring import intervals
from espalier.timing.speed_settings import Timing

FORMAT = "espalier.speed/1"

Document = dict[str, Any]
Clock = Callable[[], float]


def measure_speed(directory: Path, original: Path, timing: Timing, dtype: str, running: Running) -> Document:
    """Return what `espalier.speed/1` says: for `prefill` and `decode` seconds, ratios of the rounds, and the ideal.

    `cache` are the bytes of keys and values after the last round, of the original and of the model.

    A round is a prefill of `timing.prompt` tokens, of whose logits only the last are computed, and `timing.new` tokens
    fed one by one. UserError for a text that is too short, or models that do not fit into memory together.
    """
    checkpoints = [Checkpoint(original), Checkpoint(directory)]
    for checkpoint in checkpoints:
        if running.streams(checkpoint, dtype):
            raise UserError(
                f"{checkpoint.directory}: does not fit into memory, so that it cannot be timed. Use speed=none."
            )
    device = running.torch_device()
    with _threads(timing.threads):
        experts = running.experts_implementation()
        models = [load(checkpoint.directory, dtype, device, experts=experts) for checkpoint in checkpoints]
        ids = _text(directory, timing, models[1].config.vocab_size).to(device)
        used = [_used(model, checkpoint, ids) for model, checkpoint in zip(models, checkpoints, strict=True)]
        clock = _clock(device, timing.threads)
        for model in models:  # the first call of a model is slower
            _round(model, ids[:1], timing.prompt, clock)
        seconds: list[list[tuple[float, float]]] = []
        for number in range(timing.rounds):
            row = ids[1 + number : 2 + number]
            order = (0, 1) if number % 2 else (1, 0)
            found = {which: _round(models[which], row, timing.prompt, clock) for which in order}
            seconds.append([found[0], found[1]])
    sizes = sizes_of_directory(original)
    before, after = (float(active["parameters"]) for active in used)
    scores = _scores(checkpoints, used[1], sizes)
    ideal = {
        "prefill": _ideal_prefill(sizes, timing.prompt, before, after, scores),
        "decode": _ideal_decode(sizes, before, after),
    }
    cache = [cache_bytes(_prefill(model, ids[-1:])) for model in models]
    return {
        "format": FORMAT,
        "timing": asdict(timing),
        "device": device,
        "experts": experts,
        "dtype": str(models[1].dtype).removeprefix("torch."),
        "active": {"original": before, "model": after},
        "cache": {"original": cache[0], "model": cache[1]},
        **{
            phase: _summary([[each[n] for each in row] for row in seconds], ideal[phase])
            for n, phase in enumerate(("prefill", "decode"))
        },
    }


def _summary(seconds: list[list[float]], ideal: float) -> Document:
    """Return the ratio of one phase, its rounds' and the ideal; seconds are medians."""
    ratios = [model / original for original, model in seconds]
    value, low, high = intervals.mean_ratio([ratios])
    middle = [float(torch.tensor(column).median()) for column in zip(*seconds, strict=True)]
    found = {"ratio": value, "low": low, "high": high, "ideal": ideal, "ratios": ratios}
    return found | {"original_seconds": middle[0], "seconds": middle[1]}


def _text(directory: Path, timing: Timing, vocabulary: int) -> Tensor:
    """Return a sequence for each round and one more, int64 [rounds + 1, prompt + new]."""
    tokenizer = load_tokenizer(directory)
    length = timing.prompt + timing.new
    ids: list[int] = []
    for _, text in held_out(timing.domain, f"speed.domain={timing.domain}"):
        ids += tokenizer.encode(text, verbose=False)
    rows = len(ids) // length
    if rows < timing.rounds + 1:
        raise UserError(
            f"conf/speed/{timing.name}.yaml: {timing.rounds} rounds of {length} tokens, and one more, are more than "
            f"the {len(ids)} tokens of the text {timing.domain}. Use rounds <= {rows - 1} or fewer tokens."
        )
    return torch.tensor(ids[: length * (timing.rounds + 1)]).view(-1, length)


def _used(model: Any, checkpoint: Checkpoint, ids: Tensor) -> Document:
    """Return what a token of the texts uses on average."""
    with count_parameters(model, checkpoint) as active, torch.inference_mode():
        for row in ids[1:]:
            model(input_ids=row[None], use_cache=False, logits_to_keep=1)
    return active


def _scores(checkpoints: list[Checkpoint], active: Document, sizes: Sizes) -> float:
    """Return what part of the FLOPs of the original's attention scores the model computes."""
    original, model = checkpoints
    routed = model.config.get("espalier", {}).get("depth", {"layers": {}})["layers"]
    parts = [float(layer.attention) for layer in sizes.count.layers]
    whole, left = sum(parts), list(parts)
    for layer, share in active.get("depth", {}).items():
        own = routed[layer]
        if own["granularity"] != "ffn" and own["cache"] == "kept":
            left[int(layer)] *= share**2
    dropped = int(model.config["num_hidden_layers"]) / int(original.config["num_hidden_layers"])
    return sum(left) * dropped / whole if whole else 1.0


@torch.inference_mode()
def _prefill(model: Any, ids: Tensor) -> Any:
    return model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values


def cache_bytes(cache: Any) -> int:
    """Return the bytes of the keys and values that a transformers cache holds."""
    tensors = [
        part for layer in cache.layers for part in (getattr(layer, "keys", None), getattr(layer, "values", None))
    ]
    return sum(part.numel() * part.element_size() for part in tensors if part is not None)


@torch.inference_mode()
def _round(model: Any, ids: Tensor, prompt: int, clock: Clock) -> tuple[float, float]:
    """Return the seconds of a prefill of [1, prompt] and of feeding the rest of `ids` [1, L] token by token."""
    start = clock()
    cache = _prefill(model, ids[:, :prompt])
    middle = clock()
    for place in range(prompt, ids.shape[1]):
        model(input_ids=ids[:, place : place + 1], past_key_values=cache, use_cache=True)
    return middle - start, clock() - middle


def _clock(device: str, threads: int) -> Clock:
    if device != "cpu":

        def synchronised() -> float:
            torch.cuda.synchronize()
            return time.perf_counter()

        return synchronised
    return time.thread_time if threads == 1 else time.perf_counter


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _ideal_prefill(sizes: Sizes, prompt: int, original: float, model: float, scores: float) -> float:
    """Return the ratio of FLOPs of the decoder layers; the model computes the part `scores` of attention's scores."""
    whole = forward_flops(sizes, prompt, prompt, head=False)
    attention = 2.0 * prompt * prompt * sum(layer.attention for layer in sizes.count.layers)
    return 1 - (2.0 * prompt * (original - model) + (1 - scores) * attention) / whole


def _ideal_decode(sizes: Sizes, original: float, model: float) -> float:
    """Return the ratio of weights read for a token: all that it uses but the input embedding, of which it is a row."""
    looked_up = sizes.count.embedding if sizes.count.head else 0  # a tied one is read as the head
    return (model - looked_up) / (original - looked_up)
