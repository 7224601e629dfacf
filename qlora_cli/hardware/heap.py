"""Return freed memory of this process to the system."""

import ctypes
import sys


def return_freed_memory() -> None:
    """Return the pages of the heap that nothing uses; do nothing where the C library is not glibc.

    glibc returns by itself only what is free at the heap's end: one long-lived block after the tensors of a step,
    such as a compiled kernel, holds on to all of them.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(ctypes.c_size_t(0))
