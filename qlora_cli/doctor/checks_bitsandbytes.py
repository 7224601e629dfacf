"""Check bitsandbytes: that it can be imported, and quantizes and multiplies correctly on each device.

Stored weights are compared with an independent reference, and products, forward and backward, with those of the
dequantized weights. A build for another GPU or CUDA version fails here, not hours into a run.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from qlora_cli.doctor.findings import Json, Outcome, failed, ok
from qlora_cli.settings.choices import Dtype

if TYPE_CHECKING:
    import torch

# arXiv 2305.14314, appendix E; repeated here so that bitsandbytes is not compared with itself.
NF4_LEVELS = (
    *(-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
)
BLOCK_SIZE = 64
OUT_FEATURES, IN_FEATURES = 512, 256
# One row, some, and more than the fused kernels support.
ROW_COUNTS = (1, 32, 2048)
# Of relative errors. Stored: double quantization and, for int8, rounding. Products: rounding to the dtype.
STORED_TOLERANCE = 0.02
PRODUCT_TOLERANCES = {Dtype.FP32: 1e-3, Dtype.FP16: 1e-2, Dtype.BF16: 2e-2}
INT8_PRODUCT_TOLERANCE = 0.03  # its kernels round the input to 8 bits as well
OUTLIER = 20.0  # LLM.int8() multiplies columns of the input that reach 6 in 16 bit


@dataclass(frozen=True)
class Trial:
    """A comparison with the reference: its name, the relative error in the Frobenius norm, and the tolerance."""

    name: str
    error: float
    tolerance: float

    @property
    def right(self) -> bool:
        """Whether the error is within the tolerance; NaN is not."""
        return self.error <= self.tolerance


Product = Callable[["torch.Tensor"], "torch.Tensor"]


def check_import() -> Outcome:
    """Import bitsandbytes."""
    import bitsandbytes

    return ok(f"{bitsandbytes.__version__} can be imported", version=str(bitsandbytes.__version__))


def check_device(device_name: str) -> Outcome:
    """Quantize and multiply on a device, in NF4 and int8, with the compute dtype that a run would use there."""
    import torch

    from qlora_cli.hardware.device import choose_compute_dtype

    device = torch.device(device_name)
    compute = choose_compute_dtype(Dtype.AUTO, device)
    weight = _normal(0, OUT_FEATURES, IN_FEATURES).to(device, compute.torch_dtype)
    trials = [*_nf4_trials(weight, PRODUCT_TOLERANCES[compute.name]), *_int8_trials(weight)]
    return judge(trials, device_name, compute.name)


def judge(trials: list[Trial], device: str, dtype: str) -> Outcome:
    """Return ok with the largest error of each method, or failed with the trials out of tolerance."""
    details: dict[str, Json] = {
        "device": device,
        "compute_dtype": dtype,
        # JSON has no NaN.
        "relative_errors": {trial.name: trial.error if math.isfinite(trial.error) else None for trial in trials},
        "tolerances": {trial.name: trial.tolerance for trial in trials},
    }
    wrong = [trial for trial in trials if not trial.right]
    if wrong:
        first = wrong[0]
        return failed(
            f"wrong results in {dtype}: {len(wrong)} of {len(trials)} comparisons, {first.name} is off by "
            f"{first.error:.1%}, where up to {first.tolerance:.1%} is allowed",
            "Reinstall bitsandbytes: pip install --force-reinstall --no-deps bitsandbytes. If that does not help, "
            "report it to bitsandbytes with the output of --json.",
            **details,
        )
    largest = {
        method: max(trial.error for trial in trials if trial.name.startswith(method) and "product" in trial.name)
        for method in ("nf4", "int8")
    }
    return ok(
        f"quantizes and multiplies right in {dtype}: products off by {largest['nf4']:.2%} (NF4) "
        f"and {largest['int8']:.2%} (int8)",
        **details,
    )


def _nf4_trials(weight: "torch.Tensor", tolerance: float) -> Iterator[Trial]:
    from bitsandbytes import matmul_4bit
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight, blocksize=BLOCK_SIZE, compress_statistics=True, quant_type="nf4")
    dequantized = dequantize_4bit(packed, state)
    yield Trial("nf4_stored", _error(dequantized, nf4_reference(weight)), STORED_TOLERANCE)
    for num_rows in ROW_COUNTS:
        yield from _products(
            f"nf4_{{}}_of_{num_rows}",
            partial(matmul_4bit, B=packed.t(), quant_state=state),
            _normal(num_rows, num_rows, IN_FEATURES).to(weight),
            dequantized,
            tolerance,
        )


def _int8_trials(weight: "torch.Tensor") -> Iterator[Trial]:
    from bitsandbytes import MatmulLtState, matmul
    from bitsandbytes.functional import int8_vectorwise_quant

    codes, row_maxima, _ = int8_vectorwise_quant(weight.half())
    dequantized = codes.float() * (row_maxima.float() / 127)[:, None]
    yield Trial("int8_stored", _error(dequantized, weight), STORED_TOLERANCE)
    for kind, is_training in (("train", True), ("infer", False)):
        state = MatmulLtState(CB=codes, SCB=row_maxima)
        state.has_fp16_weights, state.is_training = False, is_training
        rows = _normal(32, 32, IN_FEATURES)
        rows[:, 7] = OUTLIER
        yield from _products(
            f"int8_{{}}_to_{kind}",
            partial(matmul, B=codes, state=state, threshold=6.0),
            rows.to(weight),
            dequantized,
            INT8_PRODUCT_TOLERANCE,
        )


def _products(
    name: str, multiply: Product, rows: "torch.Tensor", dequantized: "torch.Tensor", tolerance: float
) -> Iterator[Trial]:
    """Compare `rows @ weight.T` (rows, out) and the gradient of `rows` with those of the dequantized weight."""
    rows = rows.clone().requires_grad_()
    product = multiply(rows)
    upstream = _normal(1, *product.shape).to(product)
    product.backward(upstream)  # type: ignore[no-untyped-call]
    assert rows.grad is not None
    exact = dequantized.float()
    yield Trial(name.format("product"), _error(product, rows.float() @ exact.T), tolerance)
    yield Trial(name.format("gradient"), _error(rows.grad, upstream.float() @ exact), tolerance)


def nf4_reference(weight: "torch.Tensor") -> "torch.Tensor":
    """Return `weight` after a round trip through NF4 with fp32 constants, by its definition."""
    import torch

    blocks = weight.float().reshape(-1, BLOCK_SIZE)
    scales = blocks.abs().amax(dim=1, keepdim=True)
    levels = torch.tensor(NF4_LEVELS, device=weight.device)
    nearest = ((blocks / scales)[..., None] - levels).abs().argmin(dim=-1)
    return (levels[nearest] * scales).reshape(weight.shape)


def _normal(seed: int, *shape: int) -> "torch.Tensor":
    import torch

    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _error(actual: Any, expected: "torch.Tensor") -> float:
    """Return the relative error in the Frobenius norm."""
    exact = expected.detach().double()
    return float((actual.detach().double() - exact).norm() / exact.norm())
