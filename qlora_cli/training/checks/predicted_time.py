"""Predict the time of an optimizer step on this machine's CPU, once its rates were measured."""

import torch

from qlora_cli.hardware.device import choose_compute_dtype
from qlora_cli.memory.estimator import Estimator
from qlora_cli.memory.gpus import this_cpu
from qlora_cli.memory.prediction import StepTime
from qlora_cli.memory.step_time import rates_on
from qlora_cli.settings.models import EstimateSettings
from qlora_cli.settings.settle import with_settings
from qlora_cli.training.arguments import resolve_checkpointing

CPU = torch.device("cpu")


def cpu_step_time(estimator: Estimator, settings: EstimateSettings) -> StepTime | None:
    """Return the time of a step on this CPU; None if its rates were not measured, or with another dtype.

    Raises:
        ModelError: the model can't be run with these settings.
        HardwareError: the CPU can't compute with them.
    """
    cpu = this_cpu()
    known = rates_on(cpu)
    dtype = choose_compute_dtype(settings.model.dtype, CPU, estimator.model_type).name
    if known is None or known.dtype != dtype:
        return None
    values = {
        "model.dtype": dtype,
        "training.gradient_checkpointing": resolve_checkpointing(settings.training.gradient_checkpointing, CPU),
    }
    return estimator.step_time(with_settings(settings, values), cpu)
