"""Memory that libraries hold on to: the C library's heap and oneDNN's cache."""

import contextlib
import ctypes
import os

PRIMITIVES, USUAL = "64", "1024"
# Compiled products are kept twice: by oneDNN, and by PyTorch's layer above it (ideep), by their own variables.
CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def trim() -> None:
    """Give freed memory back to the system, where the C library is glibc.

    It keeps what is freed in pieces, so that without this the memory of a process that loads layer after layer
    grows with their number.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def bound_primitives() -> None:
    """Let oneDNN and PyTorch keep few compiled products, unless the user has said how many; before their first use.

    Each keeps 1,024 by default, of 0.3 MB or more. Each number of tokens that an expert gets makes a new one in bf16,
    so that nearly none is used again: they held 0.6 GB beside a model of 0.02 GB.
    """
    for name in CACHES:
        os.environ.setdefault(name, PRIMITIVES)


def keep_primitives() -> None:
    """Let them keep as many as they do by themselves: where time is measured, a product is not to be compiled again."""
    for name in CACHES:
        os.environ.setdefault(name, USUAL)
