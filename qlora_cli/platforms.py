"""On which platforms this package is known to work, and what is known of the others. Imports no other package.

`doctor` names the platform it runs on, and docs/reference/platforms.md is generated from the table.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

Backend = Literal["cuda", "rocm", "xpu", "mps", "cpu"]  # what this build of PyTorch can reach here


class Support(StrEnum):
    """How much is known of a platform."""

    TESTED = "tested"
    INTENDED = "what it is made for"
    UNTESTED = "not tested"
    NONE = "does not run"


@dataclass(frozen=True, kw_only=True)
class Platform:
    """A system with what computes on it."""

    name: str
    support: Support
    computes_on: str
    note: str
    advice: str | None = None


CUDA = Platform(
    name="Linux with an NVIDIA GPU",
    support=Support.INTENDED,
    computes_on="the GPU",
    note="written by the sources of its kernels and by what others measured on a T4, and tested on the CPU as far as "
    "that goes. The authors have not run it on a GPU yet: qlora doctor tries the kernels of bitsandbytes and of "
    "attention there, and a run ends with predicted and measured memory side by side",
)
CPU = Platform(
    name="Linux without a GPU",
    support=Support.TESTED,
    computes_on="the CPU",
    note="all commands, at the speed of a CPU: for small models, for trying out, for preparing and predicting runs on "
    "a GPU elsewhere, and for merging. Tested on x86-64",
)
WSL = Platform(
    name="Windows with WSL 2",
    support=Support.UNTESTED,
    computes_on="the NVIDIA GPU",
    note="the packages are those of Linux. The driver of Windows moves memory of a full GPU to the host, which slows "
    "a run down instead of ending it",
    advice="Keep models and data within the file system of Linux, not below /mnt.",
)
ROCM = Platform(
    name="Linux with an AMD GPU (ROCm)",
    support=Support.UNTESTED,
    computes_on="the GPU",
    note="PyTorch for ROCm presents it as a CUDA device, and bitsandbytes has kernels for ROCm; that is all that is "
    "known. Memory and time are predicted for NVIDIA's cards and allocator",
    advice="Compare a short run with the same one on the CPU before you trust it; predictions are for NVIDIA's cards.",
)
XPU = Platform(
    name="Linux with an Intel GPU (XPU)",
    support=Support.UNTESTED,
    computes_on="the CPU",
    note="no setting of qlora uses the GPU, although PyTorch and bitsandbytes could",
    advice="Train on an NVIDIA GPU; this machine can prepare and predict runs.",
)
MAC = Platform(
    name="macOS",
    support=Support.UNTESTED,
    computes_on="the CPU",
    note="no setting of qlora uses Apple's GPU (MPS), although PyTorch and bitsandbytes could",
    advice="Train on an NVIDIA GPU, or with mlx-lm on Apple's; this machine can prepare and predict runs.",
)
WINDOWS = Platform(
    name="Windows",
    support=Support.NONE,
    computes_on="nothing",
    note="how runs are stopped and kept needs signals of Unix, and files that are opened without following links",
    advice="Use WSL 2: install Ubuntu with wsl --install, and qlora in it.",
)
PLATFORMS = (CUDA, CPU, WSL, ROCM, XPU, MAC, WINDOWS)


def find_platform(system: str, release: str, backend: Backend) -> Platform:
    """Return the platform of a system (`sys.platform`), its kernel's `release`, and what PyTorch reaches on it."""
    if system == "win32":
        return WINDOWS
    if system == "darwin":
        return MAC
    if is_of_windows(release):
        return WSL
    return {"cuda": CUDA, "rocm": ROCM, "xpu": XPU}.get(backend, CPU)


def is_of_windows(release: str) -> bool:
    """Return whether the kernel's release is that of WSL."""
    return "microsoft" in release.lower()
