"""Check the hardware through PyTorch: the driver, CUDA, each GPU and its memory, attention kernels."""

import contextlib
import os
import platform
import shutil
import subprocess
import sys
import warnings
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from qlora_cli.doctor.findings import Json, Outcome, failed, ok, skipped, warning
from qlora_cli.doctor.isolation import without_home
from qlora_cli.errors import HardwareError
from qlora_cli.hardware.driver import DRIVER_LIBRARIES, INSTALL_TORCH, dotted, driver_cuda_version, explain_no_cuda
from qlora_cli.platforms import is_of_windows
from qlora_cli.settings.choices import Device, Dtype
from qlora_cli.units import counted, format_bytes

if TYPE_CHECKING:
    import torch

DRIVER_SECONDS = 20
SDPA_BACKENDS = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")
NO_FALLBACK = (
    "In NVIDIA's control panel set 'CUDA - Sysmem Fallback Policy' to 'Prefer No Sysmem Fallback', so that a run that "
    "does not fit ends with an error."
)
ON_CPU = "Small models train on the CPU; for others use a machine with an NVIDIA GPU."


@dataclass(frozen=True, kw_only=True)
class DetectedGpu:
    """A GPU as PyTorch sees it. The CUDA context of this process does not count as free."""

    index: int
    name: str
    compute_capability: str
    bf16: bool
    total_bytes: int
    free_bytes: int

    def __str__(self) -> str:
        bf16 = "bf16" if self.bf16 else "no bf16"
        memory = f"{format_bytes(self.free_bytes)} of {format_bytes(self.total_bytes)} free"
        return f"{self.index}: {self.name} ({self.compute_capability}, {bf16}), {memory}"

    @property
    def crowded(self) -> bool:
        """Whether other processes use more than half of its memory."""
        return self.free_bytes < self.total_bytes / 2


def check_torch() -> Outcome:
    """Import PyTorch and test a matrix product."""
    import torch

    product = torch.ones(64, 64) @ torch.ones(64, 64)
    if not bool((product == 64).all()):
        return failed("multiplies wrong on the CPU", f"Reinstall PyTorch: {INSTALL_TORCH}")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "ROCm" if torch.version.hip else "CPU"
    return ok(
        f"{torch.__version__}, a {build} build, {torch.get_num_threads()} CPU threads",
        version=str(torch.__version__),
        built_for_cuda=torch.version.cuda,
        num_threads=torch.get_num_threads(),
    )


def check_driver() -> Outcome:
    """Ask the NVIDIA driver for its version, and for the newest CUDA version that it supports."""
    cuda = driver_cuda_version()
    named = _driver_version()
    if cuda is None and named is None:
        return skipped(
            "no NVIDIA driver is installed", "If there is an NVIDIA GPU in this machine, install its driver."
        )
    if cuda is None:
        return failed(
            f"driver {named} is installed, but its library {DRIVER_LIBRARIES.get(sys.platform)} can't be used",
            "Reboot after an update of the driver, else reinstall it; in a container, start it with GPU support.",
            driver_version=named,
        )
    return ok(
        f"driver {named or 'of unknown version'}, for CUDA up to {dotted(cuda)}",
        driver_version=named,
        newest_cuda=dotted(cuda),
    )


def _driver_version() -> str | None:
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(subprocess.SubprocessError, OSError):
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=DRIVER_SECONDS)  # noqa: S603 - a fixed question
        return done.stdout.split("\n")[0].strip() or None
    return None


def check_cuda() -> Outcome:
    """Check that PyTorch can use a GPU, or compare the CUDA version that it was built for with the driver's."""
    import torch

    driver = driver_cuda_version()
    built_for = torch.version.cuda
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        through = f"CUDA {built_for}" if built_for else f"ROCm {torch.version.hip}"
        finding = f"PyTorch reaches {counted(count, 'GPU')} through {through}"
        return ok(finding, built_for_cuda=built_for, num_gpus=count)
    if driver is None:
        advice = "Nothing to do without an NVIDIA GPU; with one, see driver."
        return skipped("no driver to reach a GPU through", advice, built_for_cuda=built_for, num_gpus=0)
    finding, advice = explain_no_cuda(built_for, driver, os.environ.get("CUDA_VISIBLE_DEVICES"))
    return warning(finding, advice, built_for_cuda=built_for, num_gpus=0, error=_cuda_error())


def _cuda_error() -> str | None:
    import torch

    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return without_home(str(error))
    return None


def check_gpu() -> Outcome:
    """Read each GPU's memory, and test a matrix product on it."""
    import torch

    if not torch.cuda.is_available():
        return warning("no GPU that PyTorch can use: training runs on the CPU, slowly", ON_CPU, gpus=[])
    gpus = [_detect_gpu(index) for index in range(torch.cuda.device_count())]
    details: list[Json] = [asdict(gpu) for gpu in gpus]
    finding = "; ".join(map(str, gpus))
    if any(gpu.crowded for gpu in gpus):
        return warning(finding, "See nvidia-smi for the processes that use the memory of a GPU.", gpus=details)
    if pages_gpu_memory():
        finding += "; on Windows the driver moves GPU memory to host memory when it is full, which slows a run down"
        return warning(finding, NO_FALLBACK, gpus=details)
    return ok(finding, gpus=details)


def pages_gpu_memory() -> bool:
    """Return whether the driver is that of Windows, also within WSL: it can move GPU memory to host memory."""
    return sys.platform == "win32" or is_of_windows(platform.release())


def _detect_gpu(index: int) -> DetectedGpu:
    import torch

    device = torch.device("cuda", index)
    ones = torch.ones(64, 64, device=device)
    if float((ones @ ones).sum()) != 64**3:
        raise HardwareError(f"GPU {index} multiplies wrong")
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    capability = torch.cuda.get_device_capability(device)
    return DetectedGpu(
        index=index,
        name=torch.cuda.get_device_name(device),
        compute_capability=dotted(capability),
        bf16=capability >= (8, 0),
        total_bytes=total_bytes,
        free_bytes=free_bytes,
    )


def check_attention() -> Outcome:
    """Run each backend of PyTorch's attention once, forward and backward."""

    from qlora_cli.hardware.device import choose_compute_dtype, choose_device

    device = choose_device(Device.AUTO)
    dtype = choose_compute_dtype(Dtype.AUTO, device)
    backends = [name for name in SDPA_BACKENDS if _runs(name, device, dtype.torch_dtype)]
    details: dict[str, Json] = {
        "device": device.type,
        "compute_dtype": dtype.name,
        "eager": True,
        "sdpa_backends": [name.lower() for name in backends],
    }
    names = ", ".join(name.lower().removesuffix("_attention") for name in backends) or "no backend"
    finding = f"on {device.type} in {dtype.name}: eager, sdpa ({names})"
    if device.type == "cuda" and set(backends) <= {"MATH"}:
        advice = "Long rows will take much memory: lower --max-length, or use a newer GPU or PyTorch."
        return warning(f"{finding}: no backend that saves memory", advice, **details)
    return ok(finding, **details)


def _runs(backend: str, device: "torch.device", dtype: "torch.dtype") -> bool:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    heads = torch.ones(1, 2, 128, 64, device=device, dtype=dtype, requires_grad=True)  # (batch, head, seq, feature)
    with warnings.catch_warnings(), sdpa_kernel([getattr(SDPBackend, backend)]):
        warnings.simplefilter("ignore")  # PyTorch warns of each reason why a backend is not available
        try:
            torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True).sum().backward()  # type: ignore[no-untyped-call]
            return bool(heads.grad is not None and heads.grad.isfinite().all())
        except RuntimeError:
            return False
