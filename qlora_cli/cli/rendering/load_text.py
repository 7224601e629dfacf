"""The text of `qlora load`: the model, where its bytes are, and the quantization error if it was measured."""

import re
from collections.abc import Sequence

from rich.text import Text

from qlora_cli.cli.console import Row, console, print_rows, title
from qlora_cli.quantization.load_report import (
    CalibrationReport,
    KeptPrecision,
    KindCount,
    LoadReport,
    PredictionError,
    WeightError,
)
from qlora_cli.units import counted, format_bytes, format_count, format_duration

BARS = "▁▂▃▄▅▆▇█"
MAX_BARS = 64
NUM_WORST = 3


def render_load(report: LoadReport) -> None:
    """Print a loaded model."""
    commit = f" at {report.commit}" if report.commit else ""
    title(f"{report.base_model}{commit}")
    print_rows(_rows(report))
    title("Where the bytes are")
    for line in kind_lines(report.kinds):
        console().print(Text(line), soft_wrap=True)
    if report.errors:
        title("Quantization error, relative to the weights (root mean square)")
        print_rows(error_rows(report.errors))
    if report.prediction_error is not None:
        title("What quantization costs")
        print_rows([*prediction_error_rows(report.prediction_error), *kept_rows(report.kept)])
    if report.unquantized_fits:
        size = format_bytes(report.unquantized_model_bytes)
        advice = (
            f"It would fit here unquantized ({size}) with memory left to train: "
            "LoRA with --quant none is exact and faster."
        )
        console().print(Text(advice), soft_wrap=True)


def _rows(report: LoadReport) -> list[Row]:
    rows = [
        ("architecture", f"{report.architecture} on {report.device}"),
        ("adapter", str(report.adapter) if report.adapter else ""),
        ("parameters", _describe_parameters(report)),
        ("quantization", _describe_quantization(report)),
        ("calibrated", _describe_calibration(report.calibration)),
        ("compute dtype", f"{report.compute_dtype} ({report.compute_dtype_reason})"),
        ("quantized weights", format_bytes(report.quantized_weight_bytes)),
        ("constants", format_bytes(report.quantization_constant_bytes)),
        ("16/32-bit rest", format_bytes(report.unquantized_bytes)),
        ("total", format_bytes(report.total_bytes)),
        ("than fp32", _ratio(report.float32_bytes, report.total_bytes)),
        ("than 16 bit", _ratio(report.float16_bytes, report.total_bytes)),
        ("by dtype", ", ".join(f"{name} {format_bytes(size)}" for name, size in report.dtype_bytes.items())),
        ("load time", format_duration(report.load_seconds)),
        ("peak host memory", format_bytes(report.peak_host_bytes)),
        ("peak GPU memory", f"{format_bytes(report.peak_device_bytes)} allocated" if report.peak_device_bytes else ""),
        ("saved", f"{report.saved} ({format_bytes(report.saved_bytes or 0)})" if report.saved else ""),
    ]
    return [row for row in rows if row[1]]


def _describe_parameters(report: LoadReport) -> str:
    quantized = format_count(report.num_quantized_parameters)
    return f"{format_count(report.num_parameters)}, {quantized} of them quantized"


def _describe_calibration(calibration: CalibrationReport | None) -> str:
    if calibration is None:
        return ""
    rows = counted(calibration.num_rows, "row")
    took = format_duration(calibration.seconds)
    return f"on {rows} of {', '.join(calibration.data)}, {calibration.num_tokens:,} tokens, in {took}"


def _ratio(whole_bytes: int, stored_bytes: int) -> str:
    return f"{whole_bytes / stored_bytes:.2f}x smaller ({format_bytes(whole_bytes)})"


def _describe_quantization(report: LoadReport) -> str:
    bits = report.bits_per_quantized_parameter
    return report.storage if bits is None else f"{report.storage}, {bits:.2f} bits a parameter"


def kind_lines(kinds: Sequence[KindCount]) -> list[str]:
    """Return a line per kind: weights, parameters, bytes, bits per parameter, and why it is not quantized."""
    cells = [
        (
            kind.kind,
            f"{kind.num_weights:,}",
            format_count(kind.num_parameters),
            format_bytes(kind.num_bytes),
            f"{8 * kind.num_bytes / kind.num_parameters:.2f} bits",
            "quantized" if kind.why_not_quantized is None else kind.why_not_quantized,
        )
        for kind in kinds
    ]
    widths = [max(len(row[column]) for row in cells) for column in range(5)]
    return [
        f"  {row[0]:<{widths[0]}}  "
        + "  ".join(f"{cell:>{width}}" for cell, width in zip(row[1:5], widths[1:], strict=True))
        + f"  {row[5]}"
        for row in cells
    ]


def error_rows(errors: Sequence[WeightError]) -> list[Row]:
    """Return the error of the layers as a line of bars, its range, and the weights with the largest."""
    layers = errors_by_layer(errors)
    values = [error.relative_rms for error in errors]
    worst = sorted(errors, key=lambda error: -error.relative_rms)[:NUM_WORST]
    return [
        ("by layer", f"{bars(layers)}  from {min(layers):.2%} to {max(layers):.2%}"),
        ("all weights", f"{min(values):.2%} to {max(values):.2%}, on average {sum(values) / len(values):.2%}"),
        *(("largest", f"{error.relative_rms:.2%}  {error.name}") for error in worst),
    ]


def prediction_error_rows(error: PredictionError) -> list[Row]:
    """Return the error of the predictions, and that of the outputs of the layers as a line of bars."""
    where = f"{counted(error.num_tokens, 'token')} of {', '.join(error.data)}"
    perplexities = f"perplexity {error.perplexity:.2f}, and {error.unquantized_perplexity:.2f} unquantized"
    rows = [
        ("predictions", f"{error.mean_kl:.3g} nats a token from the unquantized model, on {where}"),
        ("", f"the same token first at {error.top_token_agreement:.1%}; {perplexities}"),
    ]
    if error.layers:
        low, high = min(error.layers), max(error.layers)
        rows.append(("outputs of layers", f"{bars(error.layers)}  off by {low:.1%} to {high:.1%}"))
    return rows


def kept_rows(kept: KeptPrecision | None) -> list[Row]:
    """Return the layers that a budget keeps unquantized, what they take, and what was expected of them."""
    if kept is None:
        return []
    layers = f"{len(kept.modules):,} of {counted(kept.num_layers, 'quantized layer')}"
    more = f"{format_bytes(kept.extra_bytes)} more, within {format_bytes(kept.budget_bytes)}"
    expected = f"{kept.mean_kl_quantized:.3g} nats a token without them, {kept.expected_kl:.3g} expected with them"
    return [("kept unquantized", f"{layers}, {more}"), ("", f"on the rows that they were chosen by: {expected}")]


def errors_by_layer(errors: Sequence[WeightError]) -> list[float]:
    """Return the mean error of each decoder layer, in order; weights outside of layers come last, as one."""
    layers: dict[int, list[float]] = {}
    outside: list[float] = []
    for error in errors:
        number = re.search(r"\.(\d+)\.", error.name)
        (layers.setdefault(int(number[1]), []) if number else outside).append(error.relative_rms)
    groups = [layers[key] for key in sorted(layers)] + ([outside] if outside else [])
    return [sum(group) / len(group) for group in groups]


def bars(values: Sequence[float]) -> str:
    """Return one bar per value, scaled from the smallest to the largest; more values than fit are averaged."""
    step = -(-len(values) // MAX_BARS)
    shown = [sum(values[i : i + step]) / len(values[i : i + step]) for i in range(0, len(values), step)]
    low, high = min(shown), max(shown)
    span = (high - low) or 1.0
    return "".join(BARS[min(len(BARS) - 1, int((value - low) / span * len(BARS)))] for value in shown)
