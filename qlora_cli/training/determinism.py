"""Enable reproducible kernels for the duration of a run, and restore the process afterwards."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qlora_cli.settings.models import TrainingSettings

# The variables that transformers' `enable_full_determinism` sets. The first must hold when weights are loaded, before
# the trainer exists.
WORKSPACES = ("CUBLAS_WORKSPACE_CONFIG", ":16:8")
VARIABLES = (
    WORKSPACES[0],
    *("CUDA_LAUNCH_BLOCKING", "FLASH_ATTENTION_DETERMINISTIC", "ASCEND_LAUNCH_BLOCKING", "HCCL_DETERMINISTIC"),
)


@contextmanager
def determinism(training: TrainingSettings) -> Iterator[None]:
    """Make cuBLAS reproducible if `training.full_determinism`; the trainer does the rest.

    Everything that transformers changes for it is restored on exit.
    """
    if not training.full_determinism:
        yield
        return
    variables = {name: os.environ.get(name) for name in VARIABLES}
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    warns_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    os.environ.update([WORKSPACES])
    _drop_workspaces()
    try:
        yield
    finally:
        for name, value in variables.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        _drop_workspaces()
        torch.use_deterministic_algorithms(is_deterministic, warn_only=warns_only)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn


def _drop_workspaces() -> None:
    """Let cuBLAS allocate workspaces of the size that the environment asks for now.

    PyTorch keeps them by handle and stream, and passes them on at each product with the size that the environment asks
    for at that time (`setWorkspaceForHandle` in `aten/src/ATen/cuda/CublasHandlePool.cpp`): after a deterministic run
    cuBLAS would write 8 or 32 MiB into 128 KiB.
    """
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch._C._cuda_clearCublasWorkspaces()
