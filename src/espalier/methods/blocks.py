"""The part of a `split` that says which neurons lie where, for equal blocks of neurons and some that always run."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.methods.partition import Labels
from espalier.plans.plan_tensors import PlanTensor


def block_layout(labels: Labels, blocks: int, name: str, tensors: dict[str, PlanTensor]) -> dict[str, Any]:
    """Return `segments`, `units`, `shared` and `neurons` of a Split whose unit b is the block b of `labels` [F].

    Neurons with label -1 always run and lie in front. The order goes to `tensors` as `name`, where it is not the
    source's own.
    """
    counts = np.bincount(labels + 1, minlength=blocks + 1)
    shared = int(counts[0] > 0)
    segments = tuple(int(count) for count in (counts if shared else counts[1:]))
    order = np.argsort(labels, kind="stable")
    same = bool((order == np.arange(len(order))).all())
    if not same:
        tensors[name] = PlanTensor.of(order)
    units = tuple((block + shared,) for block in range(blocks))
    return {"segments": segments, "units": units, "shared": shared, "neurons": None if same else name}


def without(labels: Labels, always: NDArray[np.int64], neurons: int) -> Labels:
    """Return labels of all `neurons`, -1 for those of `always`; `labels` are those of the others, ascending."""
    every = np.full(neurons, -1, np.int64)
    every[np.setdiff1d(np.arange(neurons), always)] = labels
    return every
