"""The NVIDIA driver, and why PyTorch does not use a GPU although there is one."""

import ctypes
import os
import sys

DRIVER_LIBRARIES = {"linux": "libcuda.so.1", "win32": "nvcuda.dll"}
INSTALL_TORCH = "https://pytorch.org/get-started/locally/"


def driver_cuda_version() -> tuple[int, int] | None:
    """Return the newest CUDA version that the NVIDIA driver supports; None without a driver."""
    try:
        driver = ctypes.CDLL(DRIVER_LIBRARIES.get(sys.platform, "libcuda.so.1"))
    except OSError:
        return None
    version_number = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version_number)) != 0:
        return None
    return version_number.value // 1000, version_number.value % 1000 // 10


def explain_no_cuda(built_for: str | None, driver: tuple[int, int], visible: str | None) -> tuple[str, str]:
    """Return why PyTorch reaches no GPU although there is a driver, and what to do."""
    if built_for is None:
        return "this PyTorch is built without CUDA, so the GPU is not used", f"Install a CUDA build: {INSTALL_TORCH}"
    if driver[0] < int(built_for.split(".")[0]):
        return (
            f"PyTorch is built for CUDA {built_for}, and the driver supports up to {dotted(driver)}",
            f"Update the driver, or install PyTorch for CUDA {driver[0]}: {INSTALL_TORCH}",
        )
    if visible is not None and visible.strip() in {"", "-1"}:
        return "CUDA_VISIBLE_DEVICES hides every GPU", "Unset CUDA_VISIBLE_DEVICES, or list the GPUs to use in it."
    return f"PyTorch reaches no GPU through CUDA {built_for}", "See whether nvidia-smi lists the GPU; if not, reboot."


def unused_gpu() -> tuple[str, str] | None:
    """Return why PyTorch reaches no GPU although there is a driver, and what to do; None if nothing is wrong."""
    import torch

    driver = None if torch.cuda.is_available() else driver_cuda_version()
    if driver is None:
        return None
    return explain_no_cuda(torch.version.cuda, driver, os.environ.get("CUDA_VISIBLE_DEVICES"))


def dotted(pair: tuple[int, int]) -> str:
    """Return a version or a compute capability as it is written."""
    return f"{pair[0]}.{pair[1]}"
