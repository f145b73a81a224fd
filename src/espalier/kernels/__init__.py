"""Kernels that run sparse models: for each a `forward` and, beside it, a plain-torch `reference`.

`register()` makes them transformers' experts implementation `espalier`; nothing is registered on import.
"""


def register() -> None:
    """Make `experts_implementation="espalier"` known to transformers, in this process.

    >>> import espalier.kernels
    >>> espalier.kernels.register()
    >>> AutoModelForCausalLM.from_pretrained(DIRECTORY, experts_implementation="espalier")  # doctest: +SKIP
    """
    from espalier.kernels.experts import register_experts

    register_experts()
