"""What can be learnt of a model as evidence for a plan: one file each with a class `Fit`, found by its name."""

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from espalier.checkpoints.shape import DenseShape, ModelShape
    from espalier.dense_families import DenseFamily
    from espalier.families import Family


class Fit(Protocol):
    """The contract of a class `Fit`, a torch module whose parameters are what is learnt.

    It is made with the loaded model (eval mode, no parameter of which has a gradient), its shape and family, and what
    `Fitting.own` says. It must not hold the model as a submodule. Calling it gives the terms of the loss on a
    micro-batch: `ids` int64 [B, L], `mask` int64 [B, L] or None, `step` counted from 0; it may leave some parameters
    without a gradient, and those then stay as they are in this step. `arrays` are named arrays by layer.
    """

    def __init__(
        self, model: Any, shape: "ModelShape | DenseShape", family: "Family | DenseFamily", **own: Any
    ) -> None: ...

    def __call__(self, ids: "Tensor", mask: "Tensor | None", step: int) -> "dict[str, Tensor]": ...

    def arrays(self) -> "dict[int, dict[str, NDArray[np.float32]]]": ...


def names() -> list[str]:
    """Return what can be learnt."""
    return sorted(module.name for module in iter_modules(__path__))


def fit_class(name: str) -> Any:
    """Return the class `Fit` of the module `name`; this imports torch."""
    return import_module(f"{__name__}.{name}").Fit
