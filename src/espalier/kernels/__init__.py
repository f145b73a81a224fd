"""Kernels that run sparse models: for each a `forward` and, beside it, a plain-torch `reference`.

>>> import espalier.kernels
>>> espalier.kernels.register()
>>> model = AutoModelForCausalLM.from_pretrained(DIRECTORY, experts_implementation="espalier")  # doctest: +SKIP
>>> espalier.kernels.attach(model)  # a checkpoint that Espalier made  # doctest: +SKIP

Nothing is registered on import.
"""

from typing import Any


def register() -> None:
    """Make `experts_implementation="espalier"` known to transformers, in this process."""
    from espalier.kernels.experts import register_experts

    register_experts()


def attach(model: Any) -> int:
    """Give kernels to the modules that Espalier's checkpoints bring; see `attached.attach`."""
    from espalier.kernels import attached

    return attached.attach(model)
