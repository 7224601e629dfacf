"""What a run ran on: versions and hardware, for `run.json`. No environment variable is recorded."""

import hashlib
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from qlora_cli import __version__

NUM_SAMPLES, SAMPLE_BYTES = 64, 16 * 1024
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "tokenizers")


def package_versions() -> dict[str, str]:
    """Return the versions of this package, of Python and of the libraries that shape a result."""
    found = {name: version(name) for name in PACKAGES}
    return {"qlora-cli": __version__, "python": platform.python_version(), **found}


def base_digest(directory: Path) -> str:
    """Return a digest that tells bases apart: names and sizes of the weight files, and samples of their bytes.

    All of them would take minutes to read; other weights differ nearly everywhere.
    """
    digest = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")) or sorted(directory.glob("*.bin")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for place in range(NUM_SAMPLES):
                file.seek(place * max(0, size - SAMPLE_BYTES) // (NUM_SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def describe_hardware(device: torch.device) -> dict[str, Any]:
    """Return the machine's processor, memory in bytes and, if it is used, GPU."""
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
