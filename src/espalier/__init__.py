"""Make large language models sparse, and measure what each step cost and saved."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["compress"]


def __getattr__(name: str) -> Any:
    # `compress` needs torch; `import espalier` on a login node must not.
    if name == "compress":
        from espalier.oneshot import compress

        return compress
    raise AttributeError(f"module 'espalier' has no attribute {name!r}")
