"""Whether weights are numbers at all."""

import torch


def is_finite(value: torch.Tensor) -> bool:
    """Whether all of a tensor is finite; the extremes of one that holds NaN are NaN.

    It takes 0.6 s a GiB of bf16 on a core, `isfinite().all()` 28. Floats of 8 bits have no extremes in torch.
    """
    value = value.float() if value.dtype.itemsize == 1 else value
    return value.numel() == 0 or all(bool(extreme.isfinite()) for extreme in torch.aminmax(value))
