"""What each stage costs a model of given sizes: FLOPs, bytes read and written, memory, disk; imports no torch.

Legend: T tokens, t of one forward pass, L sequence length, E experts, K chosen, D hidden, F expert width, V vocabulary,
A attention width, P parameters, p of one expert, b bytes a parameter in the files, c in the dtype computed in.

    FLOPs of a forward pass    T (2 P_used + 2 L sum A)     causal attention: L/2 keys a token, scores and sum
      P_used, with the head    what a token uses - V D      the input embedding is looked up; a tied one is the head too
      P_used, collecting       the same - V D               `collect` stops before the output head
    all experts on T' tokens   2 T' sum (E - K) p           on top, for `mean_output` (T' = T) and `residual_gram`
    Gram matrices              2 T' sum E^2 D               for `residual_gram`: T' = T if E <= 16, else <= 16,384
    memory of a model          c P whole; c (two neighbouring layers + V D) streamed, with c T D of activations
      of a forward pass        c t (8 D + K (3 F + 4 D)) + 4 t E; attention without a kernel of its own 3 c t L H
        of a dense model       c t (8 D + 3 F)
      of all experts' outputs  (c + 8 n) E D t', t' of so many tokens that 8 E D t' <= 2^29; n float64 copies
      of a whole model         c P less what stays mapped: all but the experts, where c = b
      of logits, scoring       t V c + 8 L V; t V (c + 4) of choices, whole
    memory of apply            two of the largest tensors; a thread that merges, (16 + 4 b) D F
      of its proof             4 P, of the smaller model if pruned, or 4 (3 layers + outside) streamed
    Memory is anonymous: pages of `mapped` files are left out, since the system drops them where it needs room
"""

from collections.abc import Set
from dataclasses import dataclass, replace
from pathlib import Path

from espalier.collecting.sampling import INPUT_TOKENS, gram_sample, gram_token_bytes, sampled
from espalier.costs.sizes import Sizes, sizes_of_directory
from espalier.machine.hardware import Hardware
from espalier.models.running import DTYPE_BYTES, Running, exceeds

DENSE_PROBES = frozenset({"mean_output", "residual_gram"})  # those that need every expert's output
CHUNK_BYTES = 2**29  # of all experts' outputs in float64, that a probe sees at once
CPU_TOKENS = 2304  # of one batch of perplexity windows on a processor
CHOICE_LENGTH = 128  # tokens of a long choice with its context, where its task is not known
GUARD_BYTES = 5e8  # beside a model, in apply's rule for its proof
# Anonymous memory of a process with its libraries, measured: imports alone take 0.29 GB to collect or prove, 0.32 for
# perplexities, 0.15 to apply (torch); lm-eval, its tasks and data sets take 0.1 more, a proof runs beside its parent.
PROCESS = {"tokens": 2.2e8, "collect": 3.1e8, "plan": 5e7, "weights": 2.5e8, "apply": 1.65e8, "proof": 4.6e8}
PROCESS |= {"score": 4.3e8, "perplexity": 3.3e8}
# Compiled products in bf16 and fp16 on a processor, kept by oneDNN and by PyTorch (models/heap.py): 64 each, 0.28 MB.
KERNEL_BYTES = 2 * 64 * 2.8e5
TIMED_KERNEL_BYTES = 2 * 1024 * 2.8e5  # where time is measured: as many as they keep by themselves
MAPPED_LIBRARIES = 2.4e8  # resident pages of shared libraries
# What CUDA adds, an assumption.
CUDA_HOST_BYTES, CUDA_BYTES = 2e9, 6e8
FLOAT64_COPIES = {"mean_output": 1.25, "residual_gram": 2.5}


@dataclass(frozen=True)
class Cost:
    """FLOPs; bytes read and written, `kept` as the artefact and on `disk` at the most; peak bytes of memory.

    `mapped` are bytes of mapped files that are resident beside `memory` while there is room.
    """

    flops: float = 0.0
    read: float = 0.0
    written: float = 0.0
    kept: float = 0.0
    disk: float = 0.0
    memory: float = 0.0
    mapped: float = MAPPED_LIBRARIES
    gpu_memory: float = 0.0
    gpu: bool = False
    streamed: bool = False

    def after(self, other: "Cost") -> "Cost":
        """Return the cost of one job that does what `other` does first; what that writes goes when the job ends."""
        both = {key: getattr(self, key) + getattr(other, key) for key in ("flops", "read", "written", "disk")}
        most = {key: max(getattr(self, key), getattr(other, key)) for key in ("memory", "mapped", "gpu_memory")}
        return replace(self, **both, **most)

    def seconds(self, hardware: Hardware, threads: int | None = None) -> float:
        return hardware.seconds(self.flops, self.read + self.written, gpu=self.gpu, threads=threads)


def streams(sizes: Sizes, dtype: str, running: Running, hardware: Hardware) -> bool:
    """Whether the model is run layer by layer: the rule of `Running.streams`, for the memory of `hardware`."""
    if running.stream != "auto":
        return running.stream == "always"
    whole = sizes.parameters * DTYPE_BYTES[dtype] if dtype in DTYPE_BYTES else sizes.disk_bytes
    free = hardware.gpu_memory if hardware.gpu(running.device) else hardware.memory
    return exceeds(whole, free or hardware.memory)


def forward_flops(sizes: Sizes, tokens: int, length: int, head: bool = True) -> float:
    """FLOPs of a forward pass over `tokens` in sequences of `length`, with the output head or without."""
    count = sizes.count
    unused = count.embedding if count.head else 0  # a tied embedding is multiplied as the head
    unused += 0 if head else count.head or count.embedding
    attention = sum(layer.attention for layer in count.layers)
    return tokens * (2.0 * (sizes.active - unused) + 2.0 * attention * length)


def collect_flops(sizes: Sizes, tokens: int, length: int, probes: Set[str]) -> float:
    """FLOPs of one calibration pass that feeds `probes`."""
    flops = forward_flops(sizes, tokens, length, head=False)
    gram = gram_tokens(sizes, tokens) if "residual_gram" in probes else 0
    if "attention_rank" in probes:  # the singular values of each head's map
        flops += 4.0 * tokens * length**2 * sizes.heads * len(sizes.count.layers)
    every = tokens if "mean_output" in probes else gram
    flops += 2.0 * every * sum((layer.experts - sizes.top_k) * layer.expert for layer in sizes.moe)
    return flops + 2.0 * gram * sum(layer.experts**2 for layer in sizes.moe) * sizes.hidden


def gram_tokens(sizes: Sizes, tokens: int) -> int:
    """Tokens of which `residual_gram` keeps inner products."""
    return gram_sample(sizes.experts, tokens)


def statistics_bytes(sizes: Sizes, tokens: int, probes: Set[str]) -> float:
    """Bytes of the statistics of `probes`, of all layers."""
    k, total = sizes.top_k, 0.0
    if not sizes.moe:
        inputs = sampled(tokens, INPUT_TOKENS) * (4 * sizes.hidden + 8)
        each = {"ffn_energy": 16 * sizes.dense_width, "ffn_inputs": inputs}
        return float(len(sizes.count.layers) * sum(each.get(probe, 0) for probe in probes))
    for e in (layer.experts for layer in sizes.moe):
        gram = gram_sample(e, tokens) * gram_token_bytes(e)
        total += sum(
            {
                "usage": 32 * e,
                "output_norm": 32 * e,
                "routed_moments": 24 * e * sizes.hidden + 32 * e,
                "neuron_energy": 16 * e * sizes.width,
                "mean_output": 8 * e * sizes.hidden,
                "logit_gram": 8 * (e * e + e),
                "coactivation": 8 * e * e,
                "routing": 12 * tokens * k,
                "token_importance": 4 * tokens,
                "inputs": sampled(tokens, INPUT_TOKENS) * (4 * sizes.hidden + 8 * k + 8),
                "residual_gram": gram,
            }.get(probe, 0)
            for probe in probes
        )
    return total


def pass_bytes(sizes: Sizes, tokens: int, length: int, each: int) -> float:
    """Bytes that a forward pass of `tokens` needs in one layer, in a dtype of `each` bytes."""
    inner = sizes.top_k * (3 * sizes.width + 4 * sizes.hidden) if sizes.moe else 3 * sizes.dense_width
    peak = each * tokens * (8 * sizes.hidden + inner)
    peak += 4 * tokens * sizes.experts
    if sizes.eager:
        peak += 3 * each * tokens * length * sizes.heads
    return float(peak)


def probe_bytes(sizes: Sizes, tokens: int, each: int, probes: Set[str]) -> float:
    """Bytes that probes need for all experts' outputs of a forward pass of `tokens`."""
    copies = max((FLOAT64_COPIES[probe] for probe in probes if probe in FLOAT64_COPIES), default=0.0)
    numbers = min(tokens * sizes.experts * sizes.hidden, CHUNK_BYTES / 8)
    return copies and numbers * (each + 8 * copies)


def collect_cost(
    sizes: Sizes, tokens: int, length: int, probes: Set[str], dtype: str, running: Running, hardware: Hardware
) -> Cost:
    """Cost of a calibration pass over `tokens` in sequences of `length` that feeds `probes`."""
    each, length = _each(sizes, dtype), min(length, tokens) or 1
    batch = min(running.collect_batch_size * length, tokens)
    kept = statistics_bytes(sizes, tokens, probes)
    layers = max(len(sizes.moe), 1)
    streamed = streams(sizes, dtype, running, hardware)
    results = kept * (1 + 1 / layers)  # arrays are kept in pieces, which a layer's are joined from
    weighs = bool({"token_importance", "attention_rank"} & set(probes))  # they look at attention weights
    scores = replace(sizes, eager=sizes.eager or weighs)
    working = pass_bytes(scores, batch, length, each) + probe_bytes(sizes, batch, each, probes)
    cost = Cost(
        flops=collect_flops(sizes, tokens, length, probes), read=sizes.disk_bytes, written=kept, kept=kept, disk=kept
    )
    cost = _passing(cost, "collect", sizes, each, working, results, streamed, running, hardware)
    if streamed:
        states = float(tokens * sizes.hidden * each)
        cost = _with_states(cost, states, running)
        # An interrupted pass continues from the last layer's activations, written after each layer beside the old.
        count = len(sizes.count.layers)
        cost = replace(cost, written=cost.written + kept + states * count, disk=cost.disk + kept + 2 * states)
    return cost


def score_cost(
    sizes: Sizes,
    choices: int,
    windows: int,
    length: int,
    flops: float,
    dtype: str,
    running: Running,
    hardware: Hardware,
    choice_length: int = CHOICE_LENGTH,
) -> Cost:
    """Cost of scoring `choices` tokens of choice tasks and `windows` tokens of perplexities, windows of `length`.

    `flops` are of the forward passes, which may be over fewer tokens where choices share a context. `choice_length`
    are the tokens of the longest choices with their contexts: those run together first.
    """
    each, size = _each(sizes, dtype), running.score_batch_size
    gpu = hardware.gpu(running.device)
    window = min(size * length, windows if gpu else min(windows, max(CPU_TOKENS, length)))
    batch = min(size * choice_length, choices)
    tokens = max(batch, window)
    streamed = streams(sizes, dtype, running, hardware)
    # Of windows and streamed choices one row at a time is made float32.
    rows = each * tokens + 8 * min(length, tokens)
    stage = "score" if choices else "perplexity"
    logits = sizes.vocabulary * (rows if streamed else max(rows, (each + 4) * batch))
    layer = pass_bytes(sizes, tokens, length, each)
    passes = bool(choices) + bool(windows or sizes.experts)  # active parameters are measured on a few texts
    cost = Cost(flops=flops, read=sizes.disk_bytes * (max(passes, 1) if streamed else 1))
    if not streamed:
        return _passing(cost, stage, sizes, each, max(layer, logits), 0.0, False, running, hardware)
    body = _passing(cost, stage, sizes, each, layer, 0.0, True, running, hardware)
    end = PROCESS[stage] + each * (sizes.outside - (sizes.count.embedding if sizes.count.head else 0)) + logits
    if gpu:
        body = replace(body, gpu_memory=max(body.gpu_memory, end - PROCESS[stage] + CUDA_BYTES))
    else:
        body = replace(body, memory=max(body.memory, end))
    return _with_states(body, float(max(choices, windows) * sizes.hidden * each), running)


def apply_cost(before: Sizes, after: Sizes, merges: bool, running: Running, hardware: Hardware) -> Cost:
    """Cost of writing a checkpoint and proving it; `merges`: experts are merged and not only left out."""
    each = before.bytes_per_parameter
    workers = running.apply_workers
    end = 2 * each * max(before.count.embedding, before.count.head)
    expert = before.hidden * before.width * (16 + 4 * each if merges else 2 * each)
    writing = PROCESS["apply"] + max(end + (workers - 1) * expert, workers * expert)
    whole = before.disk_bytes + 4.0 * before.parameters + GUARD_BYTES
    if whole <= hardware.memory:
        # Loaded in the files' dtype, then changed, then made float32; a merged group stands in each member's place.
        proof = PROCESS["proof"] + max(each * before.loaded, 4.0 * (before if merges else after).loaded)
    else:
        proof = PROCESS["proof"] + 4.0 * (3 * before.largest_layer + before.outside)
        if proof > hardware.memory:
            proof = 0.0  # left out
    read = (before if merges else after).disk_bytes
    read += before.disk_bytes + after.disk_bytes if proof else 0.0
    # The proof is a few sequences long: it is read, not computed.
    size = after.disk_bytes
    return Cost(read=read, written=size, kept=size, disk=size, memory=max(writing, proof))


def checkpoint_bytes(source: Path, ratios: list[float | None]) -> float:
    """Bytes that a chain of methods with these ratios (None: removes nothing) writes, intermediate models included."""
    sizes, total = sizes_of_directory(source), 0.0
    for ratio in ratios:
        if ratio is not None:
            sizes = sizes.without(round(ratio * sizes.experts))
        total += sizes.disk_bytes
    return total


def plan_cost(statistics: float, sizes: Sizes | None = None) -> Cost:
    """Cost of a plan from statistics of so many bytes; with `sizes`, of a method that reads weights, a layer a time."""
    cost = Cost(read=statistics, memory=PROCESS["plan"] + 2 * statistics)
    if sizes is None:
        return cost
    memory = PROCESS["weights"] + 2 * statistics + 4.0 * max(layer.feed_forward for layer in sizes.count.layers)
    return replace(cost, read=statistics + sizes.disk_bytes, memory=memory)


def tokens_cost() -> Cost:
    """Cost of calibration tokens; the texts are small."""
    return Cost(memory=PROCESS["tokens"])


def _each(sizes: Sizes, dtype: str) -> int:
    """Bytes of a number in the dtype computed in."""
    return DTYPE_BYTES.get(dtype, 4 if sizes.bytes_per_parameter > 2 else 2)


def _passing(
    cost: Cost,
    stage: str,
    sizes: Sizes,
    each: int,
    working: float,
    results: float,
    streamed: bool,
    running: Running,
    hardware: Hardware,
) -> Cost:
    """Add the memory of a forward pass that needs `working` bytes; `results` are kept by the processor."""
    weights = each * (sizes.slots() + sizes.count.embedding + sizes.count.norm if streamed else sizes.loaded)
    # Converted and stacked, an expert's tensors are for a moment there twice.
    converted = 0.0 if each == sizes.bytes_per_parameter else each * sizes.hidden * sizes.width * 2.0
    if not streamed:
        converted *= sizes.experts
    process = PROCESS[stage] + results
    own, mapped = float(weights), MAPPED_LIBRARIES
    if not streamed and each == sizes.bytes_per_parameter:
        # transformers copies only what it stacks; the rest stays in the mapped files.
        stacked = 0 if sizes.stacked else sum(layer.experts * layer.expert for layer in sizes.moe)
        own, mapped = each * float(stacked), mapped + each * (sizes.loaded - stacked)
    if not hardware.gpu(running.device):
        kernels = KERNEL_BYTES if each == 2 else 0.0
        peak = own + max(working, converted) + kernels
        return replace(cost, streamed=streamed, memory=process + peak, mapped=mapped)
    # A whole model is loaded by the processor and then moved.
    host = converted + each * sizes.count.embedding if streamed else own + converted
    return replace(
        cost,
        streamed=streamed,
        gpu=True,
        memory=process + CUDA_HOST_BYTES + host,
        gpu_memory=CUDA_BYTES + weights + working,
    )


def _with_states(cost: Cost, states: float, running: Running) -> Cost:
    """Add the hidden states of all tokens between two layers: in memory, else in a scratch file."""
    if states <= running.activation_memory:
        return replace(cost, memory=cost.memory + states)
    return replace(cost, disk=cost.disk + states)
