"""Predicted and measured memory, bytes and disk of each stage, on generated Mixtral-shaped checkpoints.

    python benchmarks/memory.py [--layers 4 8 16 24] [--plot docs/memory.svg] [--work DIR]

Each stage runs in a process of its own, as a job does; this one reads RssAnon from /proc every 5 ms (mapped files do
not count: the system drops them when it needs room). Bytes are what the process asked the system to read and write
(rchar and wchar of /proc/self/io); files that transformers maps are not in them, and no read bytes are given there.
Disk is the largest size of what the stage adds to its folder. The weights are random bf16; a layer takes 0.5 GB, 24
layers with the embeddings 12.9 GB. Calibration and the scored text: 2 sequences of 512 random tokens. Streamed stages
run at every depth, Gram matrices and those that hold the whole model on checkpoints of up to 6 GB. One JSON line a
stage on standard output, and a table at the end.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from espalier.costs import estimate
from espalier.costs.estimate import Cost
from espalier.costs.sizes import Sizes, sizes_of_directory
from espalier.machine.hardware import Hardware
from espalier.models.running import Running

CHEAP, DENSE, GRAM = ("usage", "output_norm"), ("usage", "output_norm", "mean_output"), ("usage", "residual_gram")
STREAMED = Running.of(device="cpu", stream="always", collect_batch_size=1, score_batch_size=1, apply_workers=2)
WHOLE = replace(STREAMED, stream="never")
SEQUENCES, LENGTH = 2, 512
TOKENS = SEQUENCES * LENGTH
VOCABULARY = 32000
SMALL_BYTES = 6e9
# Fewer bytes are not compared. Sampling the disk misses files that live for milliseconds: a state file and the one that
# replaces it.
LEAST = {"memory": 0.0, "read": 0.0, "written": 1e6, "disk": 2e7}
# Memory decides only about the proof here: with none it is left out.
MACHINE = Hardware("benchmark", cores=2, flops=1e12, memory=1e12, disk=1e9, startup=0)
UNPROVED = replace(MACHINE, memory=0)


def generate(directory: Path, layers: int) -> None:
    """Write a random checkpoint, one tensor in memory at a time."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import MixtralConfig, PreTrainedTokenizerFast

    from espalier.checkpoints.shards import OutputTensor, ShardWriter

    config = MixtralConfig(
        vocab_size=VOCABULARY,
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

    @cache
    def numbers(size: int) -> torch.Tensor:
        return torch.empty(size).normal_(std=0.02, generator=torch.Generator().manual_seed(0)).bfloat16()

    def drawn(name: str, rows: int, columns: int) -> OutputTensor:
        # The same numbers from another one on: to draw 6 billion takes longer than all stages.
        def make() -> list[torch.Tensor]:
            return [torch.roll(numbers(rows * columns), hash_of(name)).view(rows, columns)]

        return OutputTensor(name, "BF16", (rows, columns), make)

    hidden, width = config.hidden_size, config.intermediate_size
    keys = hidden // 2
    shards = [[drawn("model.embed_tokens.weight", VOCABULARY, hidden), drawn("lm_head.weight", VOCABULARY, hidden)]]
    shards[0].append(OutputTensor("model.norm.weight", "BF16", (hidden,), lambda: [torch.ones(hidden).bfloat16()]))
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        attention = {"q_proj": (hidden, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden)}
        sizes = {f"self_attn.{name}.weight": size for name, size in (attention | {"o_proj": (hidden, hidden)}).items()}
        sizes["block_sparse_moe.gate.weight"] = (8, hidden)
        for expert in range(8):
            for name, size in {"w1": (width, hidden), "w2": (hidden, width), "w3": (width, hidden)}.items():
                sizes[f"block_sparse_moe.experts.{expert}.{name}.weight"] = size
        shard = [drawn(prefix + name, *size) for name, size in sizes.items()]
        for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            shard.append(OutputTensor(prefix + name, "BF16", (hidden,), lambda: [torch.ones(hidden).bfloat16()]))
        shards.append(shard)
    directory.mkdir(parents=True)
    ShardWriter(shards).write(directory)
    config.save_pretrained(directory)
    words = {f"w{n}": n for n in range(VOCABULARY - 2)} | {"<s>": VOCABULARY - 2, "<unk>": VOCABULARY - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>").save_pretrained(directory)


def hash_of(name: str) -> int:
    """A number that is the same in every process."""
    return sum(ord(letter) * 31**place for place, letter in enumerate(name)) % 2**31


def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCABULARY - 2, (SEQUENCES, LENGTH))


def collect(work: Path, running: Running, probes: tuple[str, ...], name: str) -> None:
    from espalier.collecting.collect import collect_checkpoint

    state = work / f".{name}.partial"
    stats = collect_checkpoint(work / "model", "bfloat16", running, tokens(), None, probes, state=state)
    stats.save(work / f"{name}.safetensors")
    shutil.rmtree(state, ignore_errors=True)


def write(work: Path, method: str, name: str, prove: bool) -> None:
    from espalier.checkpoints.checkpoint import Checkpoint
    from espalier.collecting.stats import Stats
    from espalier.methods import hc_smoe, reap
    from espalier.surgery.apply import apply

    shape = Checkpoint(work / "model").shape()
    own = {"reap": reap.Reap, "hc_smoe": hc_smoe.HcSmoe}[method](0.5)
    plan = own.plan(Stats.load(work / "stats.safetensors", probes=own.probes), shape)
    apply(work / "model", plan, work / name, prove=prove, workers=STREAMED.apply_workers)


def score(directory: Path, running: Running) -> None:
    from espalier.checkpoints.checkpoint import Checkpoint
    from espalier.scoring import score as scoring

    documents = [("a", " ".join(f"w{n}" for n in tokens().ravel()))]
    model = scoring._load_model(directory, Checkpoint(directory), "bfloat16", running)
    tokenizer = scoring.AutoTokenizer.from_pretrained(directory)
    scoring._document_scores(model, tokenizer, {"text": scoring.Text(documents, LENGTH)}, running, None)


def collected(sizes: Sizes, half: Sizes, running: Running, probes: tuple[str, ...]) -> Cost:
    return estimate.collect_cost(sizes, TOKENS, LENGTH, frozenset(probes), "bfloat16", running, MACHINE)


def scored(sizes: Sizes, running: Running) -> Cost:
    return estimate.score_cost(sizes, 0, TOKENS, LENGTH, 0.0, "bfloat16", running, MACHINE)


# What a stage does in its folder, and what it is predicted to cost a model, given that with half of its experts.
Stage = tuple[Callable[[Path], None], Callable[[Sizes, Sizes], Cost]]
STAGES: dict[str, Stage] = {
    "collect": (
        lambda work: collect(work, STREAMED, DENSE, "stats"),
        lambda sizes, half: collected(sizes, half, STREAMED, DENSE),
    ),
    "keep": (
        lambda work: write(work, "reap", "kept", False),
        lambda sizes, half: estimate.apply_cost(sizes, half, False, STREAMED, UNPROVED),
    ),
    "merge": (
        lambda work: write(work, "hc_smoe", "merged", False),
        lambda sizes, half: estimate.apply_cost(sizes, sizes.without(4, rows=False), True, STREAMED, UNPROVED),
    ),
    "score": (lambda work: score(work / "model", STREAMED), lambda sizes, half: scored(sizes, STREAMED)),
    "score half": (lambda work: score(work / "kept", STREAMED), lambda sizes, half: scored(half, STREAMED)),
}
SMALL_STAGES: dict[str, Stage] = {
    "collect gram": (
        lambda work: collect(work, STREAMED, GRAM, "gram"),
        lambda sizes, half: collected(sizes, half, STREAMED, GRAM),
    ),
    "collect whole": (
        lambda work: collect(work, WHOLE, CHEAP, "whole"),
        lambda sizes, half: collected(sizes, half, WHOLE, CHEAP),
    ),
    "keep, proved": (
        lambda work: write(work, "reap", "proved", True),
        lambda sizes, half: estimate.apply_cost(sizes, half, False, WHOLE, MACHINE),
    ),
    "score whole": (lambda work: score(work / "model", WHOLE), lambda sizes, half: scored(sizes, WHOLE)),
}
MAPPED = ("collect whole", "score whole", "keep, proved")


def measure(command: list[str], folder: Path) -> dict[str, float]:
    """Run a command and return its peak anonymous memory, children included, and the disk it took below `folder`."""
    start, before = time.monotonic(), _size(folder)
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    memory = disk = 0.0
    done = threading.Event()

    def watch() -> None:
        nonlocal memory, disk
        while not done.wait(0.005):
            memory, disk = max(memory, _anonymous(child.pid)), max(disk, _size(folder) - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = child.wait()
    done.set()
    watcher.join()
    if code:
        sys.exit(f"{command} ended with {code}")
    return {"memory": memory, "disk": disk, "seconds": time.monotonic() - start}


def _anonymous(pid: int, parent: str = "") -> float:
    """RssAnon of a process and its children in bytes; 0 for one that has ended.

    A child with its parent's command line is a fork about to start another program: its pages are the parent's.
    """
    try:
        command = Path(f"/proc/{pid}/cmdline").read_text()
        status = Path(f"/proc/{pid}/status").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0.0
    own = next((1024.0 * float(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")), 0.0)
    return 0.0 if command == parent else own + sum(_anonymous(int(child), command) for child in children)


def _size(folder: Path) -> float:
    """Bytes of all files below a folder, as far as they stay while they are counted."""
    total = 0.0
    for parent, _, names in os.walk(folder):  # which passes over folders that vanish
        for name in names:
            with contextlib.suppress(OSError):
                total += Path(parent, name).lstat().st_size
    return total


def work_in(name: str, work: Path) -> None:
    """Run one stage in this process and leave beside it what it asked the system to read and write."""
    before = _moved()
    (STAGES | SMALL_STAGES)[name][0](work)
    after = _moved()
    (work / "moved.json").write_text(json.dumps({key: after[key] - before[key] for key in after}))


def _moved() -> dict[str, int]:
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return {"read": int(lines["rchar"]), "written": int(lines["wchar"])}


def compare(name: str, work: Path, layers: int) -> dict[str, Any]:
    """Run a stage and return what was measured beside what was predicted, in GB."""
    whole, half = sizes_of_directory(work / "model"), sizes_of_directory(work / "model").without(4)
    cost = (STAGES | SMALL_STAGES)[name][1](whole, half)
    found: dict[str, Any] = measure([sys.executable, __file__, "--stage", name, str(work)], work)
    found |= json.loads((work / "moved.json").read_text())
    if name in MAPPED:
        found["read"] = None  # mapped
    row: dict[str, Any] = {"layers": layers, "checkpoint_gb": round(whole.disk_bytes / 1e9, 2), "stage": name}
    for key in ("memory", "read", "written", "disk"):
        real, said = found[key], getattr(cost, key)
        row[key] = None if real is None else round(real / 1e9, 4)
        row[f"{key}_predicted"] = round(said / 1e9, 4)
        row[f"{key}_ratio"] = round(said / real, 3) if real is not None and real > LEAST[key] else None
    return row | {"seconds": round(found["seconds"], 1)}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown: predicted, measured and their ratio."""
    keys = ("memory", "read", "written", "disk")
    lines = ["| layers | GB | stage | " + " | ".join(keys) + " |", "| ---: | ---: | --- |" + " ---: |" * len(keys)]
    for row in rows:
        cells = [f"{row['layers']}", f"{row['checkpoint_gb']:.1f}", row["stage"]]
        for key in keys:
            said, real, ratio = (row[key + ending] for ending in ("_predicted", "", "_ratio"))
            cells.append("" if ratio is None else f"{said:.3g}, {real:.3g}: {ratio:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw peak memory against the checkpoint's size, a line a streamed stage."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for stage in STAGES:
        own = [row for row in rows if row["stage"] == stage]
        axes.plot([row["checkpoint_gb"] for row in own], [row["memory"] for row in own], marker="o", label=stage)
    sizes = sorted({row["checkpoint_gb"] for row in rows})
    axes.plot(sizes, sizes, linestyle=":", color="grey", label="the weights alone")
    axes.set(xlabel="checkpoint, GB", ylabel="peak anonymous memory, GB", ylim=(0, 4))
    axes.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16, 24])
    parser.add_argument("--work", type=Path, help="where the checkpoints go, 27 GB for 24 layers (default: TMPDIR)")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--stage", nargs=2, metavar=("NAME", "DIR"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        work_in(options.stage[0], Path(options.stage[1]))
        return
    rows = []
    for layers in options.layers:
        work = Path(tempfile.mkdtemp(dir=options.work))
        try:
            # In a process of its own: its memory would be copied on the first write by those that follow.
            writer = multiprocessing.get_context("spawn").Process(target=generate, args=(work / "model", layers))
            writer.start()
            writer.join()
            small = sizes_of_directory(work / "model").disk_bytes <= SMALL_BYTES
            for stage in STAGES | (SMALL_STAGES if small else {}):
                rows.append(compare(stage, work, layers))
                print(json.dumps(rows[-1]), flush=True)
        finally:
            shutil.rmtree(work)
    print(table(rows))
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
