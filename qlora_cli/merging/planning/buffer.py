"""A buffer that one tensor after another is computed in.

A fresh tensor of 100 MB costs the system more time than multiplying into it: every page is asked for and cleared.
"""

import torch


class Buffer:
    """Lends memory for one tensor at a time: the tensor lent before is overwritten."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def lend(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor of any values."""
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        if num_bytes > len(self._memory):
            self._memory = torch.empty(0, dtype=torch.uint8)  # let go before more is asked for
            self._memory = torch.empty(num_bytes, dtype=torch.uint8)
        return self._memory[:num_bytes].view(dtype).view(shape)
