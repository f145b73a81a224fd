"""What router tuning and its teacher cost a model of given sizes; the legend is that of `estimate.py`.

FLOPs: the teacher one forward pass; tuning through the model two a token read (a pass back to the routers needs the
gradients of activations, not of weights), three where the FFNs are trained, whose gradients and moments are three
times as large as they are; tuning by layers a forward pass of either model over the text, then three
of the blocks alone over what is read. Memory through the model: all layers' activations of a micro-batch at once.
"""

from dataclasses import replace

from espalier.costs.estimate import CUDA_BYTES, CUDA_HOST_BYTES, PROCESS, Cost, forward_flops, pass_bytes, streams
from espalier.costs.sizes import Sizes
from espalier.machine.hardware import Hardware
from espalier.models.running import DTYPE_BYTES, Running
from espalier.training.tune_settings import Tuning

KEPT_BYTES = 6  # of one likely token: its log probability and its id
STATES = 6  # arrays of all tokens' hidden states that layer-wise tuning holds: of either model, inputs, outputs


def teacher_cost(
    sizes: Sizes, tokens: int, length: int, top: int, dtype: str, running: Running, hardware: Hardware
) -> Cost:
    """Cost of keeping the `top` likeliest of the vocabulary at each of `tokens` positions."""
    each, batch = DTYPE_BYTES.get(dtype, 2), min(running.collect_batch_size * length, tokens)
    kept = float(tokens * (top * KEPT_BYTES + 2))
    streamed = streams(sizes, dtype, running, hardware)
    working = pass_bytes(sizes, batch, length, each) + batch * sizes.vocabulary * (each + 12)
    weights = each * (2 * sizes.largest_layer + sizes.outside if streamed else sizes.loaded)
    states = float(tokens * sizes.hidden * each) if streamed else 0.0
    cost = Cost(forward_flops(sizes, tokens, length), sizes.disk_bytes, kept, kept, kept, streamed=streamed)
    return placed(cost, weights + working, 2 * kept + states, running, hardware)


def tune_cost(
    sizes: Sizes,
    original: Sizes,
    tokens: int,
    length: int,
    tuning: Tuning,
    dtype: str,
    running: Running,
    hardware: Hardware,
) -> Cost:
    """Cost of tuning a checkpoint of `sizes` on a text of `tokens` and writing the tuned one."""
    each, batch = DTYPE_BYTES.get(dtype, 2), tuning.batch * length
    size = sizes.disk_bytes
    if tuning.objective == "layerwise":
        flops = sum(forward_flops(model, tokens, length, head=False) for model in (sizes, original))
        flops += 3 * forward_flops(sizes, tuning.tokens, length, head=False)
        weights = each * (sizes.largest_layer + original.largest_layer + 2 * sizes.count.embedding)
        states = float(STATES * tokens * sizes.hidden * each)
        cost = Cost(flops, 2 * size + original.disk_bytes, size, size, size)
        return placed(cost, weights + 4 * pass_bytes(sizes, batch, length, each), states, running, hardware)
    working = len(sizes.count.layers) * pass_bytes(sizes, batch, length, each) + batch * sizes.vocabulary * (each + 12)
    passes, trained = 2, 0
    if tuning.train in ("ffn", "all"):
        passes, trained = 3, sizes.loaded
        if tuning.train == "ffn":
            trained = sum(layer.feed_forward for layer in sizes.count.layers)
    cost = Cost(passes * forward_flops(sizes, tuning.tokens, length), 2 * size, size, size, size)
    return placed(cost, each * (sizes.loaded + 3 * trained) + working, 0.0, running, hardware)


def placed(cost: Cost, computing: float, keeping: float, running: Running, hardware: Hardware) -> Cost:
    """Put what computes on the GPU where there is one; `keeping` bytes stay in memory, or go to a scratch file."""
    held = keeping if keeping <= running.activation_memory else 0.0
    cost = replace(cost, disk=cost.disk + keeping - held)
    if not hardware.gpu(running.device):
        return replace(cost, memory=PROCESS["score"] + computing + held)
    host = PROCESS["score"] + CUDA_HOST_BYTES + held + computing / 2  # loaded by the processor, then moved
    return replace(cost, gpu=True, memory=host, gpu_memory=CUDA_BYTES + computing)
