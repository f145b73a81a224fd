"""Memory that libraries hold on to: the C library's heap and oneDNN's cache."""

import contextlib
import ctypes
import os

PRIMITIVES = "64"


def trim() -> None:
    """Give freed memory back to the system, where the C library is glibc.

    It keeps what is freed in pieces, so that without this the memory of a process that loads layer after layer
    grows with their number.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def bound_primitives() -> None:
    """Let oneDNN keep few compiled products, unless the user has said how many; before its first use in the process.

    It keeps 1,024 by default. Each number of tokens that an expert gets makes a new one, so that nearly none is used
    again, and 24 layers of 8 experts held 0.2 GB of them.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", PRIMITIVES)
