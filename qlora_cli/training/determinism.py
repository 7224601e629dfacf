"""Enable reproducible kernels for the duration of a run, and restore the process afterwards."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qlora_cli.settings.models import TrainingSettings

# The variables that transformers' `enable_full_determinism` sets. cuBLAS reads the first when its handle is created,
# which is before the trainer exists.
WORKSPACES = ("CUBLAS_WORKSPACE_CONFIG", ":16:8")
VARIABLES = (
    WORKSPACES[0],
    *("CUDA_LAUNCH_BLOCKING", "FLASH_ATTENTION_DETERMINISTIC", "ASCEND_LAUNCH_BLOCKING", "HCCL_DETERMINISTIC"),
)


@contextmanager
def determinism(training: TrainingSettings) -> Iterator[None]:
    """Make cuBLAS reproducible if `training.full_determinism`; the trainer does the rest.

    Must be entered before CUDA is initialized. Everything that transformers changes for it is restored on exit.
    """
    if not training.full_determinism:
        yield
        return
    variables = {name: os.environ.get(name) for name in VARIABLES}
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    warns_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    os.environ.update([WORKSPACES])
    try:
        yield
    finally:
        for name, value in variables.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        torch.use_deterministic_algorithms(is_deterministic, warn_only=warns_only)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
