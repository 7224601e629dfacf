"""The dtype to compute in: the one that the hardware multiplies natively, and an error for any other."""

import pytest
import torch

from qlora_cli.errors import HardwareError
from qlora_cli.hardware import device as choosing
from qlora_cli.hardware.device import choose_compute_dtype
from qlora_cli.settings.choices import Dtype

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
