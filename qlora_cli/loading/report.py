"""What was loaded, as plain numbers: the result that `qlora load` shows. Imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """A loaded model in numbers; sizes in bytes, exact.

    `total_bytes` is the sum of `quantized_weight_bytes` (packed 4-bit codes), `quantization_constant_bytes`
    (block scales, their own scales, offsets and code tables) and `unquantized_bytes` (all other parameters
    and buffers). `float32_bytes` and `float16_bytes` are what the parameters alone would take unquantized.
    """

    model: str
    revision: str | None
    commit: str | None
    architecture: str
    device: str
    quantization: str
    double_quant: bool
    num_parameters: int
    num_quantized_parameters: int
    total_bytes: int
    quantized_weight_bytes: int
    quantization_constant_bytes: int
    unquantized_bytes: int
    float32_bytes: int
    float16_bytes: int
    compute_dtype: str
    compute_dtype_reason: str
    load_seconds: float
    peak_host_bytes: int
    peak_device_bytes: int | None
    notes: tuple[str, ...]
