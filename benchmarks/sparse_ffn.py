"""Time of a sparse FFN beside the dense one it came from: single tokens and whole prompts, as ratios.

    python benchmarks/sparse_ffn.py [--hidden 4096] [--width 11008] [--dtype bfloat16] [--rounds 15] [--threads 1]

One FFN of LLaMA-2-7B's size by default, with random weights, in every storage at half of the neurons a token: `dsmoe`
(8 consecutive blocks, each token any 4), `tomoe` (8 experts of half of the neurons each, drawn by chance, so that all
255 signatures occur: the worst there is), `cmoe` (2 of 16 blocks shared, 6 of 14 chosen), `static` (half of the rows).
Tokens are random: a router's choice is as uneven as chance makes it. `ideal` is the part of the neurons that the tokens
of the run really ran, from which `ratio` should not be far. Variants run in turn within each round; medians of CPU time
of this thread (with --threads 1) or wall time. Each output is first compared with that of the masked computation.
"""

import argparse
import json
import statistics
import time

import numpy as np
import torch
from torch import Tensor, nn

from espalier.methods.signatures import pieces, segments_of
from espalier.modeling.sparse_ffn import SparseFFN
from espalier.plans.split import Split

MODULES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj", "activation": "act_fn"}
LINEAR = {"weight": "weight"}
EXPERTS, BLOCKS = 8, 16


class Dense(nn.Module):
    """The FFN that all others are parts of."""

    def __init__(self, hidden: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(hidden, width, bias=False, dtype=dtype) for _ in range(2))
        self.down_proj = nn.Linear(width, hidden, bias=False, dtype=dtype)
        self.act_fn = nn.SiLU()

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))
        return output


def splits(width: int) -> dict[str, Split]:
    """The storages, with half of the neurons a token."""
    rng = np.random.default_rng(0)
    half = np.argsort(rng.random((EXPERTS, width)), axis=1) < width // 2  # each row has half of the neurons
    _, segments, units = segments_of(half)
    each, part = width // EXPERTS, width // BLOCKS
    return {
        "static": Split((width // 2,), neurons="n"),
        "dsmoe": Split((each,) * EXPERTS, tuple((n,) for n in range(EXPERTS)), router="linear", k=4, tensors_of=LINEAR),
        "tomoe": Split(segments, units, neurons="n", router="linear", k=1, tensors_of=LINEAR),
        "cmoe": Split(
            (2 * part,) + (part,) * (BLOCKS - 2),
            tuple((n,) for n in range(1, BLOCKS - 1)),
            shared=1,
            router="linear",
            k=6,
            tensors_of=LINEAR,
        ),
    }


def sparse(dense: Dense, split: Split) -> SparseFFN:
    """The sparse FFN whose stored neurons are the first of the dense one's."""
    ffn = SparseFFN(dense, MODULES, split.settings()).eval()
    with torch.no_grad():
        for name in ("gate_proj", "up_proj"):
            getattr(ffn, name).weight.copy_(getattr(dense, name).weight[: split.width])
        ffn.down_proj.weight.copy_(dense.down_proj.weight[:, : split.width])
        if ffn.router is not None:
            nn.init.normal_(ffn.router.get_parameter("weight"))
    return ffn


def clock(threads: int) -> float:
    return time.thread_time() if threads == 1 else time.perf_counter()


@torch.inference_mode()
def measure(variants: dict[str, nn.Module], inputs: list[Tensor], threads: int) -> dict[str, float]:
    """Return the median seconds of each variant: all run on each input in turn, after a round that is not measured.

    Libraries compile a product for each number of rows, and each expert's pieces have their own.
    """
    spent: dict[str, list[float]] = {name: [] for name in variants}
    for measured in (False, True):
        for x in inputs:
            for name, run in variants.items():
                start = clock(threads)
                run(x)
                if measured:
                    spent[name].append(clock(threads) - start)
    return {name: statistics.median(values) for name, values in spent.items()}


@torch.inference_mode()
def check(ffn: SparseFFN, x: Tensor, name: str) -> None:
    """SystemExit unless the output is that of the masked computation."""
    found = ffn(x).float()
    ffn.backend = "masked"
    expected = ffn(x).float()
    ffn.backend = "auto"
    worst = float((found - expected).abs().max() / expected.abs().max())
    if worst > (2e-2 if x.dtype == torch.bfloat16 else 1e-4):
        raise SystemExit(f"{name}: differs by {worst:.2g} of the largest value from the masked computation")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--width", type=int, default=11008)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 512])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    dense = Dense(options.hidden, options.width, dtype).eval()
    ffns = {name: sparse(dense, split) for name, split in splits(options.width).items()}
    for tokens in options.tokens:
        inputs = [torch.randn(tokens, options.hidden).to(dtype) for _ in range(options.rounds)]
        for name, ffn in ffns.items():
            check(ffn, inputs[0], name)
        found = measure({"dense": dense, **ffns}, inputs, options.threads)
        for name, ffn in ffns.items():
            ideal = ffn.down_proj.in_features / options.width
            if ffn.router is not None:
                ran = [ffn.active_neurons(ffn.router(x, ffn.act_fn)).float().mean() for x in inputs]
                ideal = float(torch.stack(ran).mean()) / options.width
            row = {"tokens": tokens, "storage": name, "ms": round(1e3 * found[name], 2)}
            row |= {"dense_ms": round(1e3 * found["dense"], 2), "ratio": round(found[name] / found["dense"], 3)}
            row |= {
                "ideal": round(ideal, 3),
                "pieces": round(pieces(ffn.units), 1) if ffn.units else 1,
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
