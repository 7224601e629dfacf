"""Profile one step of a run: how long the GPU computes, how long the host takes to tell it what, and in which kernels.

The profiler slows the host, so that host seconds are an upper bound. The share of the GPU's time in a step is taken
from the seconds of its kernels, which the profiler does not slow, and of the steps that were not profiled.
"""

from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from qlora_cli.events import Event, StepDone

NUM_SHOWN = 25
# The host waits in these for the GPU.
WAITING = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpyAsync")
LAUNCHING = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx")


class StepProfiler:
    """A reporter that profiles the step after `step`."""

    def __init__(self, step: int) -> None:
        self._step = step
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        self._profiler = profile(activities=activities)
        self._is_done = False

    def report(self, event: Event) -> None:
        """Start after one step and stop after the next."""
        if isinstance(event, StepDone) and event.step == self._step:
            self._profiler.start()
        elif isinstance(event, StepDone) and event.step == self._step + 1:
            self._profiler.stop()
            self._is_done = True

    def figures(self, step_seconds: float) -> dict[str, Any] | None:
        """Return the figures, with shares of `step_seconds`, a step that was not profiled; None if none was."""
        if not self._is_done:
            return None
        entries = self._profiler.key_averages()
        on_gpu = [entry for entry in entries if entry.device_type.name != "CPU" and not entry.is_user_annotation]
        on_host = [entry for entry in entries if entry.device_type.name == "CPU"]
        gpu_seconds = sum(entry.self_device_time_total for entry in on_gpu) / 1e6
        waiting = sum(entry.self_cpu_time_total for entry in on_host if entry.key in WAITING) / 1e6
        host_seconds = sum(entry.self_cpu_time_total for entry in on_host) / 1e6 - waiting
        return {
            "gpu_seconds": gpu_seconds,
            "gpu_share_of_step": gpu_seconds / step_seconds,
            "host_seconds_while_profiled": host_seconds,
            "waiting_seconds_while_profiled": waiting,
            "num_launches": sum(entry.count for entry in on_host if entry.key in LAUNCHING),
            "num_kernels": sum(entry.count for entry in on_gpu),
            "largest_on_gpu": _largest(on_gpu, "self_device_time_total"),
            "largest_on_host": _largest(on_host, "self_cpu_time_total"),
        }


def _largest(entries: list[Any], field: str) -> list[dict[str, Any]]:
    """Return name, calls and seconds of the entries that take longest."""
    ordered = sorted(entries, key=lambda entry: -getattr(entry, field))[:NUM_SHOWN]
    return [{"name": one.key[:120], "count": one.count, "seconds": getattr(one, field) / 1e6} for one in ordered]
