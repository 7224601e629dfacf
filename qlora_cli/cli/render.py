"""Frozen results as text on stdout, readable at 80 columns, without colour where there is no terminal."""

from collections.abc import Sequence
from enum import Enum
from typing import Any

from rich.console import Console
from rich.text import Text

from qlora_cli.demo.result import DemoResult
from qlora_cli.loading.report import LoadReport
from qlora_cli.settings.sources import Origin
from qlora_cli.training.result import PeakMemory, TrainPlan, TrainResult
from qlora_cli.units import format_bytes, format_count, format_duration

Row = tuple[str, str]


def render_load(report: LoadReport) -> None:
    """Print what was loaded."""
    commit = f" at {report.commit}" if report.commit else ""
    _title(f"{report.model}{commit}")
    rows = [
        ("architecture", f"{report.architecture} on {report.device}"),
        (
            "parameters",
            f"{format_count(report.num_parameters)}, {format_count(report.num_quantized_parameters)} of them in 4 bit",
        ),
        ("quantization", _describe_quantization(report)),
        ("compute dtype", f"{report.compute_dtype} ({report.compute_dtype_reason})"),
        ("quantized weights", format_bytes(report.quantized_weight_bytes)),
        ("constants", format_bytes(report.quantization_constant_bytes)),
        ("16/32-bit rest", format_bytes(report.unquantized_bytes)),
        ("total", format_bytes(report.total_bytes)),
        (
            "than fp32",
            f"{report.float32_bytes / report.total_bytes:.2f}x smaller ({format_bytes(report.float32_bytes)})",
        ),
        (
            "than 16 bit",
            f"{report.float16_bytes / report.total_bytes:.2f}x smaller ({format_bytes(report.float16_bytes)})",
        ),
        ("load time", format_duration(report.load_seconds)),
        ("peak host memory", format_bytes(report.peak_host_bytes)),
    ]
    if report.peak_device_bytes is not None:
        rows.append(("peak GPU memory", f"{format_bytes(report.peak_device_bytes)} allocated"))
    _print_rows(rows)


def render_plan(plan: TrainPlan) -> None:
    """Print what a run would do."""
    _title("Would run (nothing was written)")
    _print_rows([*plan_rows(plan), ("output", str(plan.output)), ("disk, at most", format_bytes(plan.disk_bytes))])


def plan_rows(plan: TrainPlan) -> list[Row]:
    """Return a plan as rows of a table, the batch arithmetic among them."""
    evaluation = f", {plan.num_eval_rows:,} held out" if plan.num_eval_rows is not None else ""
    return [
        ("model", f"{plan.model} ({format_count(plan.num_parameters)}, {plan.quantization}) on {plan.device}"),
        ("compute dtype", f"{plan.compute_dtype} ({plan.compute_dtype_reason})"),
        ("attention", plan.attention),
        ("checkpointing", "on" if plan.gradient_checkpointing else "off"),
        ("trainable", f"{format_count(plan.num_trainable_parameters)} parameters ({plan.optimizer})"),
        ("rows", f"{plan.num_train_rows:,} to train on ({plan.data_format}){evaluation}"),
        (
            "tokens",
            f"{plan.num_train_tokens:,} an epoch, {plan.num_supervised_tokens:,} trained, "
            f"longest row {plan.longest_row_tokens:,}",
        ),
        (
            "batch",
            f"{plan.micro_batch_size} micro-batch x {plan.gradient_accumulation_steps} accumulation x "
            f"{plan.num_devices} device = {plan.examples_per_step} examples a step",
        ),
        ("steps", f"{plan.num_steps:,} ({plan.num_epochs:.2f} epochs)"),
    ]


def render_training(result: TrainResult) -> None:
    """Print what a run did."""
    if result.interrupted_by is not None:
        _title(f"Stopped by {result.interrupted_by} after step {result.steps} of {result.num_steps}")
    else:
        _title(f"Trained {result.steps:,} steps")
    _print_rows(_training_rows(result))


def _training_rows(result: TrainResult) -> list[Row]:
    rows = [
        ("loss", f"{_loss(result.final_loss)} at the last step, {_loss(result.train_loss)} on average"),
        ("held-out loss", _loss(result.eval_loss)),
        ("speed", f"{result.tokens_per_second:,.0f} tokens/s ({result.num_tokens:,} tokens)"),
        ("time", f"{format_duration(result.train_seconds)} training, {format_duration(result.total_seconds)} in all"),
        ("peak memory", _describe_peak(result.peak_memory)),
        ("adapter", str(result.adapter)),
    ]
    return rows if result.eval_loss is not None else [row for row in rows if row[0] != "held-out loss"]


def render_demo(result: DemoResult) -> None:
    """Print what the demonstration showed."""
    _title("QLoRA demo: a tiny Llama learns to answer questions about Python's library")
    _print_rows(
        [
            (
                "base in memory",
                f"{format_bytes(result.float32_bytes)} in fp32, {format_bytes(result.quantized_bytes)} as loaded "
                f"({result.float32_bytes / result.quantized_bytes:.2f}x smaller)",
            ),
            (
                "trained",
                f"{format_count(result.train.num_trainable_parameters)} LoRA parameters, {result.train.steps} steps",
            ),
            (
                "held-out loss",
                f"{result.loss_before:.3f} before, {result.loss_after:.3f} after ({-100 * result.loss_drop:+.0f} %)",
            ),
            ("speed", f"{result.train.tokens_per_second:,.0f} tokens/s"),
            ("time", format_duration(result.total_seconds)),
            ("question", result.prompt),
            ("before", result.answer_before),
            ("after", result.answer_after),
            ("documentation", result.reference),
        ]
        + ([("kept in", str(result.kept))] if result.kept else [])
    )


def render_settings(rows: Sequence[tuple[str, Any, Origin]]) -> None:
    """Print every setting with its value and origin."""
    shown = [(path, _show(value), origin) for path, value, origin in rows]
    name_width = max(len(path) for path, _, _ in shown)
    value_width = max(len(value) for _, value, _ in shown)
    for path, value, origin in shown:
        line = f"{path:<{name_width}}  {value:<{value_width}}  {origin.where}"
        _console().print(Text(line, style="dim" if origin.kind == "default" else ""), soft_wrap=True)


def _show(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Enum):
        return str(value.value)
    return ", ".join(value) if isinstance(value, tuple) else str(value)


def _describe_quantization(report: LoadReport) -> str:
    if report.num_quantized_parameters == 0:
        return report.quantization
    constants = report.quantization_constant_bytes + report.quantized_weight_bytes
    bits = 8 * constants / report.num_quantized_parameters
    double = "double quantization" if report.double_quant else "single quantization"
    return f"{report.quantization}, {double}, {bits:.2f} bits a parameter"


def _describe_peak(peak: PeakMemory) -> str:
    host = f"{format_bytes(peak.host_bytes)} host"
    if peak.device_allocated_bytes is None or peak.device_reserved_bytes is None:
        return host
    return (
        f"{format_bytes(peak.device_allocated_bytes)} allocated, "
        f"{format_bytes(peak.device_reserved_bytes)} reserved on the GPU; {host}"
    )


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


class _PipeConsole(Console):
    """Leaves a closed pipe to the one place that ends commands; rich would exit by itself, with 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def _console() -> Console:
    return _PipeConsole(highlight=False)


def _title(text: str) -> None:
    _console().print(Text(text, style="bold"))


def _print_rows(rows: Sequence[Row]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        line = Text.assemble((f"  {name:<{width}}", "cyan"), "  ", value)
        _console().print(line, soft_wrap=True)  # whole lines, also into a pipe
