"""The result of `qlora load` in plain numbers. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue


@dataclass(frozen=True, kw_only=True)
class KindCount:
    """The number and bytes of weights of one kind, with their constants. `why_not_quantized` is None if they are.

    Kinds: linear layers, experts, embedding, output head, routers, convolutions, other weights, and norms, biases,
    vectors.
    """

    kind: str
    why_not_quantized: str | None
    num_weights: int
    num_parameters: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class WeightError:
    """The quantization error of one weight: the root mean square of the error over that of the weight."""

    name: str
    relative_rms: float


@dataclass(frozen=True, kw_only=True)
class CalibrationReport:
    """What the codes of a base were chosen by: rows of the data sets `data`, and how long it took.

    `fingerprint` is that of all rows of the data, of which `num_rows` with `num_tokens` were computed.
    """

    data: tuple[str, ...]
    fingerprint: str
    num_rows: int
    num_tokens: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class PredictionError:
    """What quantization costs on rows of the data sets `data`.

    `mean_kl` is the divergence of the predictions from those of the unquantized model, in nats a token;
    `top_token_agreement` the share of tokens after which both find the same one most likely. Perplexities are over the
    actual next tokens. `layers` has the error of each layer's output, in order, relative to it (root mean square).
    """

    data: tuple[str, ...]
    num_rows: int
    num_tokens: int
    mean_kl: float
    top_token_agreement: float
    unquantized_perplexity: float
    perplexity: float
    layers: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class KeptPrecision:
    """The linear layers and weights of experts, by full name, that stay in 16 bit since `budget_bytes` allow it.

    Of `num_layers` that would be quantized, these take `extra_bytes` more. `mean_kl_quantized` is the divergence from
    the unquantized model, in nats a token, with all of them quantized, and `expected_kl` that with these in 16 bit, on
    the rows that they were chosen by.
    """

    budget_bytes: int
    extra_bytes: int
    num_layers: int
    modules: tuple[str, ...]
    mean_kl_quantized: float
    expected_kl: float


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """A loaded model in numbers; sizes in bytes, exact.

    `quantization_settings` are those with an effect on the method `quantization`; `storage` describes both in words.
    `total_bytes` is the sum of `quantized_weight_bytes` (packed codes), `quantization_constant_bytes` (block scales,
    their own scales, offsets and code tables) and `unquantized_bytes` (all other parameters and buffers).
    `float32_bytes` and `float16_bytes` are the bytes of the parameters alone if unquantized. `errors` and
    `prediction_error` are measured on request, and `kept` are layers in 16 bit by a budget; `saved` is the quantized
    checkpoint, if one was written. For a run, `adapter_step` is the step of its weights, and `run_is_done` whether it
    was trained to its end.
    """

    model: str
    base_model: str
    revision: str | None
    commit: str | None
    adapter: Path | None
    adapter_step: int | None = None
    run_is_done: bool | None = None
    architecture: str
    device: str
    quantization: str
    quantization_settings: Mapping[str, JsonValue]
    storage: str
    prequantized: bool
    num_parameters: int
    num_quantized_parameters: int
    bits_per_quantized_parameter: float | None
    total_bytes: int
    quantized_weight_bytes: int
    quantization_constant_bytes: int
    unquantized_bytes: int
    float32_bytes: int
    float16_bytes: int
    unquantized_fits: bool
    unquantized_model_bytes: int
    kinds: tuple[KindCount, ...]
    dtype_bytes: Mapping[str, int]
    errors: tuple[WeightError, ...] | None
    prediction_error: PredictionError | None = None
    kept: KeptPrecision | None = None
    calibration: CalibrationReport | None = None
    compute_dtype: str
    compute_dtype_reason: str
    load_seconds: float
    peak_host_bytes: int
    peak_device_bytes: int | None
    saved: Path | None
    saved_bytes: int | None
    notes: tuple[str, ...]
