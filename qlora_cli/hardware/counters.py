"""Read the memory counters of the host and of the GPU, in bytes.

Three figures are easily confused: *allocated* (live tensors) ≤ *reserved* (held by PyTorch's caching allocator)
< *process* (plus the CUDA context). The device figures here are the first two, as PyTorch counts them.
"""

import sys
from pathlib import Path

import psutil
import torch

from qlora_cli.events import MemoryUse

# Messages of CUDA outside of PyTorch's allocator (unified and pinned memory, cuBLAS), and of the CPU's allocator.
OUT_OF_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")


def current_memory(device: torch.device) -> MemoryUse:
    """Return the memory in use now by this process on the host and on `device`."""
    host_bytes = psutil.Process().memory_info().rss
    if device.type != "cuda":
        return MemoryUse(host_bytes=host_bytes)
    return MemoryUse(
        host_bytes=host_bytes,
        device_allocated_bytes=torch.cuda.memory_allocated(device),
        device_reserved_bytes=torch.cuda.memory_reserved(device),
        device_total_bytes=torch.cuda.get_device_properties(device).total_memory,
    )


def peak_host_bytes() -> int:
    """Return the largest resident set that this process has had.

    On Linux from `VmHWM`: unlike `getrusage`, it does not carry over the peak of the process that forked us.
    """
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_device_peak(device: torch.device) -> None:
    """Reset the device's peak; do nothing without a GPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_device_allocated_bytes(device: torch.device) -> int | None:
    """Return the peak of live tensors since the last reset; None without a GPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def peak_device_reserved_bytes(device: torch.device) -> int | None:
    """Return the peak of the caching allocator since the last reset; None without a GPU."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the GPU's memory, or the host's, is used up."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
