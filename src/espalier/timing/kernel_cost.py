"""What a benchmark of kernels costs a model of given sizes; the legend is that of `estimate.py`.

Two blocks of the checkpoint and one of the uncompressed model are loaded, a layer each, and one expert in fp32. An
implementation is called once to be compared, and twice in every round at least.
"""

from espalier.costs.estimate import Cost
from espalier.costs.sizes import Sizes
from espalier.machine.hardware import Hardware
from espalier.models.running import DTYPE_BYTES, Running
from espalier.timing.kernel_settings import FLUSHED, KernelBench
from espalier.training.tune_cost import placed


def kernel_cost(
    sizes: Sizes, original: Sizes, bench: KernelBench, dtype: str, running: Running, hardware: Hardware
) -> Cost:
    """Return the cost of timing one MoE block of a checkpoint of `sizes`, made of `original`."""
    each = DTYPE_BYTES.get(dtype, 4)
    tokens = sum(bench.tokens) * len(bench.routings) * len(bench.caches)
    calls = (2 * bench.rounds + 3) * (len(bench.implementations) + 1)
    flops = 2.0 * tokens * calls * sizes.top_k * original.expert_parameters
    layers = each * (2 * sizes.largest_layer + original.largest_layer)
    rows = max(bench.tokens) * sizes.top_k
    working = 4.0 * (original.expert_parameters + rows * (2 * sizes.width + sizes.hidden) * 2) + FLUSHED
    read = 2 * sizes.bytes_per_parameter * sizes.largest_layer + original.bytes_per_parameter * original.largest_layer
    return placed(Cost(flops, read), layers + working, 0.0, running, hardware)
