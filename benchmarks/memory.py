"""Peak anonymous memory of each stage on generated Mixtral-shaped checkpoints of the same width and growing depth.

    python benchmarks/memory.py [--layers 8 16 24] [--plot docs/memory.svg] [--work DIR]

Each stage runs in a process of its own, layer by layer; a second process reads RssAnon from /proc every 20 ms
(mapped files do not count: the system drops them when it needs room). The weights are random bf16; a layer takes
0.5 GB, 24 layers with the embeddings 12.4 GB. Calibration: 2 sequences of 512 random tokens; the text that is scored
is random too. One JSON line a stage on standard output.
"""

import argparse
import json
import multiprocessing
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, MixtralConfig, PreTrainedTokenizerFast

from espalier.apply import apply
from espalier.checkpoint import Checkpoint
from espalier.collect import collect_checkpoint
from espalier.methods import hc_smoe, reap
from espalier.perplexity import streamed_scores
from espalier.running import Running
from espalier.shards import OutputTensor, ShardWriter
from espalier.stats import Stats
from espalier.stream import StreamedModel

PROBES = ("usage", "output_norm", "mean_output")
RUNNING = Running.of(device="cpu", stream="always", collect_batch_size=1)
SEQUENCES, LENGTH = 2, 512


def generate(directory: Path, layers: int) -> None:
    """Write a random checkpoint, one tensor in memory at a time."""
    config = MixtralConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5120,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=4096,
        dtype=torch.bfloat16,
        architectures=["MixtralForCausalLM"],
    )
    hidden, width = config.hidden_size, config.intermediate_size
    keys = hidden // 2
    shards = [[_random("model.embed_tokens.weight", 32000, hidden), _random("lm_head.weight", 32000, hidden)]]
    shards[0].append(OutputTensor("model.norm.weight", "BF16", (hidden,), lambda: [torch.ones(hidden).bfloat16()]))
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        attention = {"q_proj": (hidden, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden)}
        sizes = {f"self_attn.{name}.weight": size for name, size in (attention | {"o_proj": (hidden, hidden)}).items()}
        sizes["block_sparse_moe.gate.weight"] = (8, hidden)
        for expert in range(8):
            for name, size in {"w1": (width, hidden), "w2": (hidden, width), "w3": (width, hidden)}.items():
                sizes[f"block_sparse_moe.experts.{expert}.{name}.weight"] = size
        shard = [_random(prefix + name, *size) for name, size in sizes.items()]
        for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            shard.append(OutputTensor(prefix + name, "BF16", (hidden,), lambda: [torch.ones(hidden).bfloat16()]))
        shards.append(shard)
    directory.mkdir(parents=True)
    ShardWriter(shards).write(directory)
    config.save_pretrained(directory)
    words = {f"w{n}": n for n in range(31998)} | {"<s>": 31998, "<unk>": 31999}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>").save_pretrained(directory)


def _random(name: str, rows: int, columns: int) -> OutputTensor:
    def make() -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(hash_of(name))
        return [torch.empty(rows, columns).normal_(std=0.02, generator=generator).bfloat16()]

    return OutputTensor(name, "BF16", (rows, columns), make)


def hash_of(name: str) -> int:
    """A seed that is the same in every process."""
    return sum(ord(letter) * 31**place for place, letter in enumerate(name)) % 2**31


def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 31998, (SEQUENCES, LENGTH))


def collect(work: Path) -> None:
    collect_checkpoint(work / "model", "bfloat16", RUNNING, tokens(), None, PROBES).save(work / "stats.safetensors")


def keep(work: Path) -> None:
    shape = Checkpoint(work / "model").shape()
    plan = reap.Reap(0.5).plan(Stats.load(work / "stats.safetensors"), shape)
    apply(work / "model", plan, work / "kept", prove=False)


def merge(work: Path) -> None:
    shape = Checkpoint(work / "model").shape()
    plan = hc_smoe.HcSmoe(0.5).plan(Stats.load(work / "stats.safetensors"), shape)
    apply(work / "model", plan, work / "merged", prove=False)


def score(work: Path) -> None:
    text = " ".join(f"w{n}" for n in tokens().ravel())
    model = StreamedModel(work / "kept", "bfloat16")
    tokenizer = AutoTokenizer.from_pretrained(work / "kept")
    streamed_scores(model, tokenizer, {"text": ([("a", text)], LENGTH)}, batch_size=1)


STAGES: dict[str, Callable[[Path], None]] = {"collect": collect, "keep": keep, "merge": merge, "score": score}


def peak_anonymous(command: list[str]) -> tuple[float, float]:
    """Run a command and return its peak anonymous memory in GB, children included, and its seconds."""
    start = time.monotonic()
    child = subprocess.Popen(command)
    peak, done = 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, _anonymous(child.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = child.wait()
    done.set()
    watcher.join()
    if code:
        sys.exit(f"{command} ended with {code}")
    return peak / 1e6, time.monotonic() - start


def _anonymous(pid: int) -> float:
    """RssAnon of a process and its children in kB; 0 for one that has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0.0
    own = next((float(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")), 0.0)
    return own + sum(_anonymous(int(child)) for child in children)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw peak memory against the checkpoint's size, a line a stage."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for stage in STAGES:
        own = [row for row in rows if row["stage"] == stage]
        axes.plot([row["checkpoint_gb"] for row in own], [row["peak_gb"] for row in own], marker="o", label=stage)
    sizes = sorted({row["checkpoint_gb"] for row in rows})
    axes.plot(sizes, sizes, linestyle=":", color="grey", label="the weights alone")
    axes.set(xlabel="checkpoint, GB", ylabel="peak anonymous memory, GB", ylim=(0, 4))
    axes.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 16, 24])
    parser.add_argument("--work", type=Path, help="where the checkpoints go, 25 GB for 24 layers (default: TMPDIR)")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--stage", nargs=2, metavar=("NAME", "DIR"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        STAGES[options.stage[0]](Path(options.stage[1]))
        return
    rows = []
    for layers in options.layers:
        work = Path(tempfile.mkdtemp(dir=options.work))
        try:
            # In a process of its own: its memory would be copied on the first write by those that follow.
            writer = multiprocessing.get_context("spawn").Process(target=generate, args=(work / "model", layers))
            writer.start()
            writer.join()
            size = sum(path.stat().st_size for path in (work / "model").glob("*.safetensors")) / 1e9
            for stage in STAGES:
                peak, seconds = peak_anonymous([sys.executable, __file__, "--stage", stage, str(work)])
                row = {"layers": layers, "checkpoint_gb": round(size, 2), "stage": stage}
                rows.append(row | {"peak_gb": round(peak, 3), "seconds": round(seconds, 1)})
                print(json.dumps(rows[-1]), flush=True)
        finally:
            shutil.rmtree(work)
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
