"""What differs in a prediction for this machine's CPU: settings, and how well memory is known. Imports no torch."""

from dataclasses import replace

from qlora_cli.memory.gpus import Gpu
from qlora_cli.memory.prediction import Figures, RunFigures
from qlora_cli.settings.choices import Checkpointing
from qlora_cli.settings.models import EstimateSettings
from qlora_cli.settings.settle import with_settings
from qlora_cli.units import GIB

CHECKPOINTING = "training.gradient_checkpointing"
AUTO_CHECKPOINTING = Checkpointing.OFF  # of `auto`: memory is plentiful, and nothing is planned
# The band of what tensors take: there is no pool, kernels pack operands in buffers of their own, and what is freed may
# stay with the process.
LOW, HIGH = 0.9, 1.6
HOW_TO_MEASURE = "qlora doctor --measure measures its speed in ten seconds, by which times are predicted"


def on_cpu(settings: EstimateSettings) -> EstimateSettings:
    """Return the settings of a run as it runs on a CPU."""
    is_open = settings.training.gradient_checkpointing == Checkpointing.AUTO
    return with_settings(settings, {CHECKPOINTING: AUTO_CHECKPOINTING}) if is_open else settings


def figures_on_host(allocated_bytes: int, host: Gpu) -> Figures:
    """Return the peaks of a process on a CPU whose tensors take `allocated_bytes` at their peak."""
    low, high = round(LOW * allocated_bytes), round(HIGH * allocated_bytes)
    return Figures(
        allocated_bytes=allocated_bytes,
        allocated_low_bytes=low,
        allocated_high_bytes=high,
        reserved_bytes=allocated_bytes,
        reserved_low_bytes=low,
        reserved_high_bytes=high,
        process_bytes=allocated_bytes + host.context_bytes,
        process_low_bytes=low + host.context_bytes // 2,
        process_high_bytes=high + host.context_high_bytes,
    )


def as_host_memory(figures: RunFigures) -> RunFigures:
    """Return the figures of a run on a CPU, all of whose memory is the host's."""
    return replace(
        figures,
        host_bytes=figures.process_bytes,
        host_bytes_low=figures.process_low_bytes,
        host_bytes_high=figures.process_high_bytes,
    )


def host_assumptions(host: Gpu, *, is_timed: bool) -> list[str]:
    """Return sentences on what a prediction for the CPU takes for granted."""
    sentences = [
        "memory is that of a GPU's kernels, and the process without tensors takes "
        f"{host.context_bytes / GIB:.1f} GiB of the host, at most {host.context_high_bytes / GIB:.1f}",
        "nothing else takes the memory or the cores of this machine",
    ]
    return sentences if is_timed else [*sentences, f"no time is predicted for {host.name}: {HOW_TO_MEASURE}"]
