"""A reusable buffer for computing one tensor after another.

Allocating 100 MB takes longer than multiplying into it: the system has to map and clear every page.
"""

import torch


class Buffer:
    """Lends memory for one tensor at a time; the previously lent tensor is overwritten."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def lend(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return an uninitialized tensor."""
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        if num_bytes > len(self._memory):
            self._memory = torch.empty(0, dtype=torch.uint8)  # freed before more is allocated
            self._memory = torch.empty(num_bytes, dtype=torch.uint8)
        return self._memory[:num_bytes].view(dtype).view(shape)
