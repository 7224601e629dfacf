"""A progress bar for huggingface_hub's downloads that counts bytes and draws nothing.

Importing this module imports huggingface_hub.
"""

from typing import Any

from huggingface_hub.utils import tqdm  # type: ignore[attr-defined] # public, but named lazily


class ByteCounter(tqdm):
    """A bar of one file that adds itself to `counters`; `n` is the number of bytes that have arrived.

    A transfer by xet creates two: for the bytes received, which may be compressed, and for those written to disk.
    """

    def __init__(self, counters: list["ByteCounter"], **options: Any) -> None:
        super().__init__(**{**options, "disable": True})  # type: ignore[no-untyped-call] # tqdm has no types
        counters.append(self)

    def update(self, n: float | None = 1) -> None:
        """Count `n` more bytes; a negative number discards bytes that have to be sent again."""
        self.n += n or 0
