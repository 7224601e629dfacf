"""The dtype to compute in: the one that the hardware multiplies natively, and an error for any other."""

import pytest
import torch

from qlora_cli.errors import HardwareError
from qlora_cli.hardware import device as choosing
from qlora_cli.hardware import driver as drivers
from qlora_cli.hardware.device import choose_compute_dtype, choose_device, has_kernels
from qlora_cli.hardware.driver import unused_gpu
from qlora_cli.settings.choices import Device, Dtype

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def cpu(monkeypatch: pytest.MonkeyPatch, *, native: bool) -> torch.device:
    monkeypatch.setattr(choosing, "has_avx512bf16", lambda: native)
    return CPU


def gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> torch.device:
    """Return the label of a GPU of this capability; none is needed for it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    return GPU


@pytest.mark.parametrize(
    ("native", "dtype", "reason"),
    [
        (True, Dtype.BF16, "this CPU multiplies bf16 natively"),
        (False, Dtype.FP32, "this CPU does not multiply bf16 natively"),
    ],
)
def test_a_cpu_computes_in_its_fast_dtype(
    monkeypatch: pytest.MonkeyPatch, native: bool, dtype: Dtype, reason: str
) -> None:
    chosen = choose_compute_dtype(Dtype.AUTO, cpu(monkeypatch, native=native))
    assert (chosen.name, chosen.reason) == (dtype, reason)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("asked", [Dtype.BF16, Dtype.FP32])
def test_a_cpu_computes_in_bf16_and_fp32_as_requested(
    monkeypatch: pytest.MonkeyPatch, native: bool, asked: Dtype
) -> None:
    chosen = choose_compute_dtype(asked, cpu(monkeypatch, native=native))
    assert (chosen.name, chosen.reason) == (asked, "as asked")


@pytest.mark.parametrize("native", [True, False])
def test_fp16_is_refused_on_a_cpu(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    with pytest.raises(HardwareError, match="fp16 is not trained on a CPU") as caught:
        choose_compute_dtype(Dtype.FP16, cpu(monkeypatch, native=native))
    assert "--dtype fp32" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("capability", "dtype", "reason"),
    [
        ((7, 5), Dtype.FP16, "Some GPU has no bf16 tensor cores"),
        ((8, 0), Dtype.BF16, "Some GPU has bf16 tensor cores"),
        ((12, 0), Dtype.BF16, "Some GPU has bf16 tensor cores"),
    ],
)
def test_a_gpu_computes_in_bf16_since_ampere(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: Dtype, reason: str
) -> None:
    chosen = choose_compute_dtype(Dtype.AUTO, gpu(monkeypatch, capability))
    assert (chosen.name, chosen.reason) == (dtype, reason)
    assert chosen.torch_dtype == {Dtype.FP16: torch.float16, Dtype.BF16: torch.bfloat16}[dtype]


def test_bf16_is_refused_on_a_gpu_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HardwareError, match="bf16 was asked for, but Some GPU has no bf16 tensor cores") as caught:
        choose_compute_dtype(Dtype.BF16, gpu(monkeypatch, (7, 5)))
    assert "--dtype fp16" in str(caught.value.hint)


@pytest.mark.parametrize("capability", [(7, 5), (8, 0)])
@pytest.mark.parametrize("asked", [Dtype.FP16, Dtype.FP32])
def test_a_gpu_computes_in_fp16_and_fp32_as_requested(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], asked: Dtype
) -> None:
    chosen = choose_compute_dtype(asked, gpu(monkeypatch, capability))
    assert (chosen.name, chosen.reason) == (asked, "as asked")


# What PyTorch 2.13 is built for, with CUDA 12.6 and with CUDA 13.0.
OLDER = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
NEWER = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")


@pytest.mark.parametrize(
    ("capability", "architectures", "has"),
    [
        ((6, 0), OLDER, True),  # P100
        ((6, 0), NEWER, False),
        ((6, 1), OLDER, True),  # GTX 1080
        ((7, 0), NEWER, False),  # V100
        ((7, 5), NEWER, True),
        ((8, 9), NEWER, True),  # by code for 8.0
        ((10, 3), NEWER, True),
        ((12, 1), NEWER, True),
        ((13, 0), NEWER, True),  # compiled when it is first used
        ((10, 0), OLDER, False),
        ((9, 0), ("sm_90a",), True),
        ((8, 0), (), False),
        ((8, 0), ("gfx90a", "sm_", "sm_x"), False),
    ],
)
def test_code_runs_on_later_minor_versions_and_what_is_compiled_on_first_use_on_all_later_ones(
    capability: tuple[int, int], architectures: tuple[str, ...], has: bool
) -> None:
    assert has_kernels(capability, architectures) == has


@pytest.mark.parametrize("wanted", [Device.AUTO, Device.CUDA])
def test_a_gpu_that_pytorch_has_no_kernels_for_is_refused(monkeypatch: pytest.MonkeyPatch, wanted: Device) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(NEWER))
    gpu(monkeypatch, (7, 0))
    with pytest.raises(HardwareError, match=r"no kernels for Some GPU \(compute capability 7\.0\), only for sm_75"):
        choose_device(wanted)
    assert choose_device(Device.CPU) == CPU
    gpu(monkeypatch, (8, 6))
    assert choose_device(wanted) == GPU


@pytest.mark.parametrize(
    ("driver", "reason"),
    [(None, None), ((12, 4), "PyTorch is built for CUDA 13.0, and the driver supports up to 12.4")],
)
def test_a_gpu_that_is_not_used_is_noticed(
    monkeypatch: pytest.MonkeyPatch, driver: tuple[int, int] | None, reason: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(drivers, "driver_cuda_version", lambda: driver)
    unused = unused_gpu()
    assert (None if unused is None else unused[0]) == reason
