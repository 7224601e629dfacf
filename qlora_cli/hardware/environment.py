"""The versions and the hardware of a run, for `run.json`. No environment variable is recorded."""

import os
import platform
from functools import cache
from importlib.metadata import version
from typing import Any

import psutil
import torch

from qlora_cli import __version__

PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "tokenizers")


def package_versions() -> dict[str, str]:
    """Return the versions of this package, of Python and of the libraries that affect results."""
    versions = {name: _version_of(name) for name in PACKAGES}
    return {"qlora-cli": __version__, "python": platform.python_version(), **versions}


@cache
def _version_of(package: str) -> str:
    """Return the installed version, which takes a search through all metadata; no process sees it change."""
    return version(package)


def describe_hardware(device: torch.device) -> dict[str, Any]:
    """Return the machine's processor, memory in bytes and, if used, GPU."""
    hardware: dict[str, Any] = {
        "platform": platform.platform(),
        "machine": platform.machine(),
        "num_cpus": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        hardware["gpu"] = properties.name
        hardware["gpu_memory_bytes"] = properties.total_memory
        hardware["cuda"] = torch.version.cuda
    return hardware
