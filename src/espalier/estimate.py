"""Estimate what a model costs to calibrate, compress and score, from its sizes alone; imports no torch.

Legend: T tokens, L sequence length, E experts, K chosen, D hidden, V vocabulary, A attention width (heads x head
size), N decoder layers, M MoE layers, P parameters, p parameters of one expert, b bytes per parameter.

    FLOPs of a forward pass    T (2 P_used + 2 N A L)   causal attention: L/2 keys a token, scores and sum
      P_used, with the head    P - M (E - K) p - V D    the input embedding is looked up; a tied one is the head too
      P_used, collecting       the same - V D           `collect` stops before the output head
    all experts on T' tokens   2 T' M (E - K) p         on top, for `mean_output` (T' = T) and `residual_gram`
    Gram matrices              2 T' M E^2 D             on top, for `residual_gram`: T' = T if E <= 16, else <= 16,384
    checkpoint on disk         b P; b (P - M r (p + D)) after removing r experts a layer with their router rows
    memory of a forward pass   b' P + activations + 0.4 GB, b' of the dtype it runs in: the whole model is in memory
      activations              b' B L (8 D + K (3 F + 2 D)) + 4 B L E, one layer at a time; scoring adds 8 B L V
      all experts' outputs     2 x 8 min(B L E D, 2^26): their float64 copies are made in chunks
      kept by residual_gram    M T' (4 (E (E + 1) / 2 + 2 E + 1) + 8)
    memory of apply's proof    4 P + 0.4 GB
    seconds                    FLOPs / (FLOP/s x 0.4) + bytes / (bytes/s) + start-up of each job
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from espalier import sources
from espalier.checkpoint import Checkpoint
from espalier.errors import UserError
from espalier.families import family_of, names

DENSE_PROBES = frozenset({"mean_output", "residual_gram"})  # those that need every expert's output
GRAM_ALL_TOKENS_EXPERTS, GRAM_TOKENS = 16, 16384  # residual_gram: all tokens up to so many experts, else so many
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
PROCESS_BYTES = 4e8  # of a Python process with torch and transformers
EFFICIENCY = 0.4  # of a large matrix product's FLOP/s, that a forward pass reaches
CHUNK_NUMBERS = 2**26


@dataclass(frozen=True)
class Sizes:
    """The sizes of one model that the formulas need; a dense model has `experts=0`."""

    parameters: int
    expert_parameters: int
    router_row_parameters: int
    moe_layers: int
    experts: int
    top_k: int
    hidden: int
    width: int
    layers: int
    attention_width: int
    vocabulary: int
    tied: bool  # whether the output head is the embedding, and `parameters` holds it once
    bytes_per_parameter: float

    @property
    def active(self) -> int:
        """Parameters that one token uses."""
        return self.parameters - self.moe_layers * (self.experts - self.top_k) * self.expert_parameters

    @property
    def disk_bytes(self) -> float:
        return self.bytes_per_parameter * self.parameters

    def without(self, removed: int, rows: bool = True) -> "Sizes":
        """Sizes after removing `removed` experts (and their router rows) from each MoE layer."""
        each = self.expert_parameters + (self.router_row_parameters if rows else 0)
        return replace(
            self,
            parameters=self.parameters - self.moe_layers * removed * each,
            experts=self.experts - removed,
            top_k=min(self.top_k, self.experts - removed),
        )


@dataclass(frozen=True)
class Hardware:
    """What the seconds are computed with: FLOP/s of a large matrix product, bytes/s of the disk, seconds a job."""

    flops: float
    disk: float = 5e8
    startup: float = 10.0

    @classmethod
    def measured(cls) -> "Hardware":
        """This machine's processor, by one matrix product; the disk's default is that of a common SSD."""
        import numpy as np

        n, best = 1024, float("inf")
        a = np.ones((n, n), dtype=np.float32)
        for _ in range(5):  # the fastest: others may be using the machine
            start = time.perf_counter()
            a @ a
            best = min(best, time.perf_counter() - start)
        return cls(flops=2 * n**3 / best)

    def seconds(self, flops: float, moved: float) -> float:
        return flops / (EFFICIENCY * self.flops) + moved / self.disk + self.startup


def sizes_of(name: str) -> Sizes:
    """Return the sizes of a model: of its files where they are here, else of `_facts` in conf/model/NAME.yaml.

    UserError when neither is there.
    """
    config = sources.model_config(name)
    id = str(config["id"])
    if sources.is_local(id):
        return sizes_of_directory(Path(id).expanduser())
    if id == sources.EMBEDDED:
        return sizes_of_directory(sources.resolve(id, None, Path("results")))
    facts = config.get("_facts")
    if facts is None:
        raise UserError(
            f"{name}: its sizes are not known without its files. Give it a file in conf/model with `_facts`, "
            "or name a local directory."
        )
    return sizes_of_config(facts["config"], facts["total_parameters"], facts["bytes_per_parameter"])


def sizes_of_directory(directory: Path) -> Sizes:
    """Return the sizes of a checkpoint on disk, from config.json and the headers of its shards."""
    checkpoint = Checkpoint(directory)
    stored = sum(entry.nbytes for entry in checkpoint.entries.values())
    parameters = checkpoint.parameters
    sizes = sizes_of_config(checkpoint.config, parameters, stored / parameters)
    if sizes.experts:
        shape = checkpoint.shape()
        sizes = replace(sizes, experts=shape.experts, expert_parameters=shape.expert_parameters, width=shape.width)
    return sizes


def sizes_of_config(config: dict[str, Any], parameters: int, bytes_per_parameter: float) -> Sizes:
    """Return the sizes that a config.json says, with the parameters counted elsewhere."""
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    head = int(config.get("head_dim") or hidden // heads)
    common: dict[str, Any] = {
        "parameters": int(parameters),
        "hidden": hidden,
        "layers": int(config["num_hidden_layers"]),
        "attention_width": heads * head,
        "vocabulary": int(config["vocab_size"]),
        "tied": bool(config.get("tie_word_embeddings", False)),
        "bytes_per_parameter": float(bytes_per_parameter),
    }
    if config.get("model_type") not in names() and not any("expert" in key for key in config):
        width = int(config["intermediate_size"])
        return Sizes(
            **common, width=width, expert_parameters=0, router_row_parameters=0, moe_layers=0, experts=0, top_k=0
        )
    family = family_of(config)
    width = int(config[family.width_key])
    return Sizes(
        **common,
        width=width,
        expert_parameters=3 * hidden * width,
        router_row_parameters=hidden,
        moe_layers=len(family.moe_layers(config)),
        experts=family.expert_count(config),
        top_k=family.top_k(config),
    )


def forward_flops(sizes: Sizes, tokens: int, length: int, head: bool = True) -> float:
    """FLOPs of a forward pass over `tokens` in sequences of `length`, with the output head or without."""
    matrices = (0 if sizes.tied else 1) + (0 if head else 1)  # of V x D that no token is multiplied with
    used = sizes.active - matrices * sizes.vocabulary * sizes.hidden
    return tokens * (2.0 * used + 2.0 * sizes.layers * sizes.attention_width * length)


def collect_flops(sizes: Sizes, tokens: int, length: int, probes: frozenset[str] | set[str]) -> float:
    """FLOPs of one calibration pass that feeds `probes`."""
    flops = forward_flops(sizes, tokens, length, head=False)
    gram = _gram_tokens(sizes, tokens) if "residual_gram" in probes else 0
    every = tokens if "mean_output" in probes else gram
    flops += 2.0 * every * sizes.moe_layers * (sizes.experts - sizes.top_k) * sizes.expert_parameters
    return flops + 2.0 * gram * sizes.moe_layers * sizes.experts**2 * sizes.hidden


def _gram_tokens(sizes: Sizes, tokens: int) -> int:
    return tokens if sizes.experts <= GRAM_ALL_TOKENS_EXPERTS else min(tokens, GRAM_TOKENS)


def activation_bytes(sizes: Sizes, batch: int, length: int, dtype: str, *, dense: bool = False, head: bool) -> float:
    """Bytes that a forward pass of `batch` sequences needs beside the weights."""
    tokens, each = batch * length, DTYPE_BYTES[dtype]
    peak = each * tokens * (8 * sizes.hidden + sizes.top_k * (3 * sizes.width + 2 * sizes.hidden))
    peak += 4 * tokens * sizes.experts
    if dense:
        peak += 16 * min(tokens * sizes.experts * sizes.hidden, CHUNK_NUMBERS)
    if head:
        peak += 8 * tokens * sizes.vocabulary
    return float(peak)


def collect_memory(
    sizes: Sizes, tokens: int, batch: int, length: int, dtype: str, probes: frozenset[str] | set[str]
) -> float:
    """Peak bytes of a calibration pass over `tokens` that feeds `probes`, with the whole model in memory."""
    activations = activation_bytes(sizes, batch, length, dtype, dense=bool(probes & DENSE_PROBES), head=False)
    kept = 0
    if "residual_gram" in probes:
        row = 4 * (sizes.experts * (sizes.experts + 1) // 2 + 2 * sizes.experts + 1) + 8
        kept = sizes.moe_layers * _gram_tokens(sizes, tokens) * row
    return PROCESS_BYTES + DTYPE_BYTES[dtype] * sizes.parameters + activations + kept


def score_memory(sizes: Sizes, batch: int, length: int, dtype: str) -> float:
    """Peak bytes of scoring `batch` sequences at a time, with the whole model in memory."""
    activations = activation_bytes(sizes, batch, length, dtype, head=True)
    return PROCESS_BYTES + DTYPE_BYTES[dtype] * sizes.parameters + activations


def proof_memory(sizes: Sizes) -> float:
    """Peak bytes of the proof of a written checkpoint, which computes in float32."""
    return PROCESS_BYTES + 4.0 * sizes.parameters


def checkpoint_bytes(source: Path, ratios: list[float | None]) -> float:
    """Bytes that a chain of methods with these ratios (None: removes nothing) writes, intermediate models included."""
    sizes, total = sizes_of_directory(source), 0.0
    for ratio in ratios:
        if ratio is not None:
            sizes = sizes.without(round(ratio * sizes.experts))
        total += sizes.disk_bytes
    return total
