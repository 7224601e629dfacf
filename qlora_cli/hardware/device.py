"""Choose the device and the dtype to compute in, and say why."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from bitsandbytes.functional import has_avx512bf16

from qlora_cli.errors import HardwareError
from qlora_cli.hardware.driver import INSTALL_TORCH, dotted
from qlora_cli.settings.choices import Device, Dtype

TORCH_DTYPES = {Dtype.BF16: torch.bfloat16, Dtype.FP16: torch.float16, Dtype.FP32: torch.float32}
AMPERE = (8, 0)  # the first compute capability with bf16 tensor cores
# Models trained in bf16, with activations beyond 65504, the largest fp16 number, which overflow in fp16. These are
# prefixes of model types: the text decoder of gemma3 is gemma3_text.
OVERFLOWS_FP16 = ("gemma2", "gemma3", "gemma4", "gpt_oss", "qwen3_moe", "qwen3_5_moe", "qwen3_omni_moe", "glm4_moe")


@dataclass(frozen=True, kw_only=True)
class ComputeDtype:
    """The dtype of matrix products, and of the base's unquantized tensors, with the reason for it."""

    name: Dtype
    reason: str

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype in torch."""
        return TORCH_DTYPES[self.name]


def choose_device(wanted: Device) -> torch.device:
    """Return the device to load on: the current GPU if there is one, unless the CPU is `wanted`.

    Raises:
        HardwareError: a GPU was asked for and there is none, or this PyTorch has no kernels for it.
    """
    if wanted == Device.CPU:
        return torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        _check_architecture(device)
        return device
    if wanted == Device.CUDA:
        raise HardwareError(
            "no NVIDIA GPU is visible to PyTorch",
            hint="Check nvidia-smi and that torch is a CUDA build, or leave --device out to use the CPU.",
        )
    return torch.device("cpu")


def has_kernels(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Return whether one of a PyTorch build's `architectures`, such as `sm_80`, runs on a GPU of `capability`.

    Code for `sm_80` runs on later minor versions of the same major version, code for `compute_80` on all later ones.
    """
    for architecture in architectures:
        kind, _, digits = architecture.partition("_")
        if match := re.fullmatch(r"(\d+)(\d)[a-z]?", digits):
            built_for = int(match[1]), int(match[2])
            if built_for <= capability and (kind == "compute" or built_for[0] == capability[0]):
                return True
    return False


def _check_architecture(device: torch.device) -> None:
    architectures = torch.cuda.get_arch_list()
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and architectures and not has_kernels(capability, architectures):
        raise HardwareError(
            f"PyTorch {torch.__version__} has no kernels for {torch.cuda.get_device_name(device)} (compute capability "
            f"{dotted(capability)}), only for {' '.join(architectures)}",
            hint=f"Install a build that has them; older GPUs need one for an earlier CUDA version: {INSTALL_TORCH}",
        )


def choose_compute_dtype(wanted: Dtype, device: torch.device, model_type: str | None = None) -> ComputeDtype:
    """Return the dtype to compute in: bf16 where the hardware has it, else fp16 on a GPU and fp32 on a CPU.

    Models of a `model_type` that overflows fp16 are computed in fp32 instead.

    Raises:
        HardwareError: fp16 was asked for on a CPU or for such a model, or bf16 on a GPU without it.
    """
    return settle_compute_dtype(wanted, device.type, model_type, *_native_bf16(device))


def settle_compute_dtype(
    wanted: Dtype, device_type: str, model_type: str | None, native: bool, reason: str
) -> ComputeDtype:
    """Return the dtype for any device, which has native bf16 products if `native`; `reason` explains that.

    Raises:
        HardwareError: as in `choose_compute_dtype`.
    """
    if model_type is not None and model_type.startswith(OVERFLOWS_FP16):
        if wanted == Dtype.FP16:
            raise HardwareError(
                f"{model_type} overflows fp16: its activations grow beyond 65504",
                hint=f"Use {'bf16' if native else 'fp32'}.",
            )
        if wanted == Dtype.AUTO and not native:
            return ComputeDtype(name=Dtype.FP32, reason=f"{reason}, and {model_type} overflows fp16")
    if wanted == Dtype.AUTO:
        fallback = Dtype.FP16 if device_type == "cuda" else Dtype.FP32
        return ComputeDtype(name=Dtype.BF16 if native else fallback, reason=reason)
    if wanted == Dtype.FP16 and device_type == "cpu":
        raise HardwareError("fp16 is not trained on a CPU", hint="Use --dtype fp32 or --dtype bf16.")
    if wanted == Dtype.BF16 and device_type == "cuda" and not native:
        raise HardwareError(f"bf16 was asked for, but {reason}", hint="Use --dtype fp16 or --dtype fp32.")
    return ComputeDtype(name=wanted, reason="as asked")


def _native_bf16(device: torch.device) -> tuple[bool, str]:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        native = torch.cuda.get_device_capability(device) >= AMPERE
        return native, f"{name} {'has' if native else 'has no'} bf16 tensor cores"
    # Emulated bf16 products are several times slower than fp32 ones.
    native = bool(has_avx512bf16())
    return native, f"this CPU {'multiplies' if native else 'does not multiply'} bf16 natively"


def device_of(weight: torch.Tensor) -> torch.device:
    """Return where a weight is used; that of a sharded base may be in host memory until it is gathered."""
    mesh = getattr(weight, "device_mesh", None)  # of a `DTensor`, whose import takes time
    return weight.device if mesh is None else torch.device(mesh.device_type)
