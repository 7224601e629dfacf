"""The kernel of attention on a GPU, for batches that differ in length."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Keep PyTorch from computing attention with cuDNN, and restore its choice on exit.

    On Hopper and Blackwell GPUs it prefers cuDNN to flash attention. cuDNN prepares a plan for each new shape, which
    takes up to half a second: batches of rows, and answers that grow token by token, have hundreds of shapes.
    """
    was_enabled = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was_enabled)
