"""Keeping Python's search for reference cycles out of the way, where it costs time or must not interfere."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Search for cycles only when asked to; unasked, Python looks through all that is held, again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
