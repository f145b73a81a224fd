"""What a fit costs a model of given sizes: forward and backward passes over the calibration, all layers in memory."""

from espalier.costs.estimate import Cost, forward_flops, pass_bytes
from espalier.costs.sizes import Sizes
from espalier.machine.hardware import Hardware
from espalier.models.running import DTYPE_BYTES, Running
from espalier.training.fit_settings import Fitting
from espalier.training.tune_cost import placed

MASKS = 8  # arrays of ToMoE's masks of a layer that the pass back needs: logits, noise, soft and hard masks


def fit_cost(
    sizes: Sizes, tokens: int, length: int, fitting: Fitting, dtype: str, running: Running, hardware: Hardware
) -> Cost:
    """Cost of learning from `tokens` in sequences of `length`, read `fitting.epochs` times, or from `fitting.tokens`.

    A pass back costs as much as one forward: it needs the gradients of activations, not of weights. What is learnt is
    small beside the model. ToMoE also runs the model without masks, and keeps float32 masks of all neurons.
    """
    each, batch = DTYPE_BYTES.get(dtype, 2), fitting.batch * length
    working = len(sizes.count.layers) * pass_bytes(sizes, batch, length, each) + batch * sizes.vocabulary * (each + 12)
    read = fitting.epochs * tokens if fitting.tokens is None else fitting.tokens
    flops = 2 * forward_flops(sizes, read, length)
    if fitting.name == "tomoe":
        flops *= 1.5
        working += len(sizes.count.layers) * batch * sizes.dense_width * 4 * MASKS
    return placed(Cost(flops, sizes.disk_bytes), each * sizes.loaded + working, 0.0, running, hardware)
