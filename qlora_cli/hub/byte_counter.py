"""The progress bar that huggingface_hub's downloads are given: it counts bytes and draws nothing.

Importing this module imports huggingface_hub.
"""

from typing import Any

from huggingface_hub.utils import tqdm  # type: ignore[attr-defined] # public, but named lazily


class ByteCounter(tqdm):
    """A bar of one file that joins `counters` when it is made; `n` is how many of its bytes have arrived.

    A transfer by xet makes two: for the bytes received, which may be compressed, and for those written to disk.
    """

    def __init__(self, counters: list["ByteCounter"], **options: Any) -> None:
        super().__init__(**{**options, "disable": True})  # type: ignore[no-untyped-call] # tqdm has no types
        counters.append(self)

    def update(self, n: float | None = 1) -> None:
        """Count `n` more bytes; fewer if negative, which discards what has to be sent again."""
        self.n += n or 0
