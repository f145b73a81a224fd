"""The C library's heap."""

import contextlib
import ctypes


def trim() -> None:
    """Give freed memory back to the system, where the C library is glibc.

    It keeps what is freed in pieces, so that without this the memory of a process that loads layer after layer
    grows with their number.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
