"""Print plans and results of runs on stdout, readable at 80 columns, without colours if it is not a terminal."""

from collections.abc import Sequence
from enum import Enum
from typing import Any

from rich.text import Text

from qlora_cli.cli.console import Row, console, print_rows, title
from qlora_cli.demo.demo_result import DemoResult
from qlora_cli.runs.directory import REPORT_FILE
from qlora_cli.runs.run_result import PeakMemory, PredictedMemory, PredictedTime, TrainPlan, TrainResult
from qlora_cli.settings.value_sources import Origin
from qlora_cli.timing.run_ratios import described
from qlora_cli.units import counted, format_bytes, format_count, format_duration
from qlora_cli.visible import visible


def render_plan(plan: TrainPlan) -> None:
    """Print the plan of a run."""
    title("Would run (nothing was written)")
    print_rows([*plan_rows(plan), ("output", str(plan.output)), ("disk, at most", format_bytes(plan.disk_bytes))])


def plan_rows(plan: TrainPlan) -> list[Row]:
    """Return a plan as rows of a table, with the batch arithmetic."""
    evaluation = f", {plan.num_eval_rows:,} held out" if plan.num_eval_rows is not None else ""
    return [
        ("model", f"{plan.model} ({format_count(plan.num_parameters)}, {plan.quantization}) on {plan.device}"),
        *([("unquantized", plan.kept_layers.sentence)] if plan.kept_layers else []),
        ("compute dtype", f"{plan.compute_dtype} ({plan.compute_dtype_reason})"),
        ("attention", plan.attention),
        ("checkpointing", plan.gradient_checkpointing),
        ("trainable", f"{format_count(plan.num_trainable_parameters)} parameters ({plan.optimizer})"),
        ("rows", f"{plan.num_train_rows:,} to train on ({plan.data_format}){evaluation}"),
        (
            "tokens",
            f"{plan.num_train_tokens:,} an epoch, {plan.num_supervised_tokens:,} trained, "
            f"longest row {plan.longest_row_tokens:,}",
        ),
        ("padding", _describe_padding(plan)),
        ("batch", plan.batch),
        ("steps", f"{plan.num_steps:,} ({_epochs(plan)}), a checkpoint every {counted(plan.save_steps, 'step')}"),
        *_memory_rows(plan.predicted_memory),
        *_time_rows(plan.predicted_time),
    ]


def _describe_padding(plan: TrainPlan) -> str:
    if plan.num_packed_rows is not None:
        return f"none: packed into {counted(plan.num_packed_rows, 'row')}"
    if plan.micro_batch_tokens is not None:
        return "none: the rows of a micro-batch are joined"
    return f"{plan.padding_share:.1%} of the tokens of the first epoch"


def _epochs(plan: TrainPlan) -> str:
    return "of a stream" if plan.num_epochs is None else f"{plan.num_epochs:.2f} epochs"


def _memory_rows(predicted: PredictedMemory | None) -> list[Row]:
    if predicted is None:
        return []
    return [
        (
            "GPU memory",
            f"{format_bytes(predicted.process_bytes)} predicted on {predicted.gpu}, "
            f"{format_bytes(predicted.allocated_bytes)} of it tensors",
        )
    ]


def _time_rows(predicted: PredictedTime | None) -> list[Row]:
    if predicted is None:
        return []
    low, high = format_duration(predicted.step_seconds_low), format_duration(predicted.step_seconds_high)
    step = f"{format_duration(predicted.step_seconds)} predicted ({low} to {high}; rates {_rates(predicted)})"
    return [("a step", step)]


def _rates(predicted: PredictedTime) -> str:
    return described(predicted.rates, predicted.learnt_ratio, predicted.learnt_runs)


def render_training(result: TrainResult) -> None:
    """Print the result of a run."""
    steps = counted(result.steps, "step")
    if result.interrupted_by is not None:
        steps = f"{result.steps:,} of {counted(result.num_steps, 'step')}"
    title(f"Trained {steps}")
    print_rows(_training_rows(result))


def _training_rows(result: TrainResult) -> list[Row]:
    rows = [
        ("loss", f"{_loss(result.final_loss)} at the last step, {_loss(result.train_loss)} on average"),
        *([("preferences", f"{result.rewards}, at the last step")] if result.rewards else []),
        ("held-out loss", _loss(result.eval_loss)),
        *([(f"held-out {result.eval_rewards.rows}", str(result.eval_rewards))] if result.eval_rewards else []),
        ("speed", f"{result.tokens_per_second:,.0f} tokens/s over all steps ({counted(result.num_tokens, 'token')})"),
        *_step_rows(result),
        ("time", _describe_time(result)),
        ("peak memory", _describe_peak(result.peak_memory, result.predicted_memory)),
        ("adapter", str(result.adapter)),
        *([("update", result.adapter_health.sentence)] if result.adapter_health else []),
        *([("general text", visible(result.forgetting.sentence))] if result.forgetting else []),
        ("report", str(result.output / REPORT_FILE)),
    ]
    return rows if result.eval_loss is not None else [row for row in rows if row[0] != "held-out loss"]


def _step_rows(result: TrainResult) -> list[Row]:
    """Return the time of a step next to its prediction; nothing without one of them."""
    measured, predicted = result.step_seconds, result.predicted_time
    if not measured or predicted is None:
        return []
    error = 100 * (predicted.step_seconds / measured - 1)
    return [
        (
            "a step",
            f"{format_duration(measured)} ({format_duration(predicted.step_seconds)} predicted, {error:+.0f} %; rates "
            f"{_rates(predicted)})",
        )
    ]


def _describe_time(result: TrainResult) -> str:
    time = f"{format_duration(result.train_seconds)} training, {format_duration(result.total_seconds)} in all"
    if result.resumed_from_step is None:
        return time
    return f"{time}; of the whole run, as all figures but peaks (resumed after step {result.resumed_from_step:,})"


def render_demo(result: DemoResult) -> None:
    """Print the result of the demonstration."""
    title("QLoRA demo: a tiny Llama learns to answer questions about Python's library")
    print_rows(
        [
            (
                "base in memory",
                f"{format_bytes(result.float32_bytes)} in fp32, {format_bytes(result.quantized_bytes)} as loaded "
                f"({result.float32_bytes / result.quantized_bytes:.2f}x smaller)",
            ),
            (
                "trained",
                f"{format_count(result.train.num_trainable_parameters)} LoRA parameters, "
                f"{counted(result.train.steps, 'step')}",
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
        console().print(Text(line, style="dim" if origin.kind == "default" else ""), soft_wrap=True)


def _show(value: Any) -> str:
    if value is None or value == ():
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Enum):
        return str(value.value)
    return ", ".join(map(_show, value)) if isinstance(value, tuple) else str(value)


def _describe_peak(peak: PeakMemory, predicted: PredictedMemory | None) -> str:
    host = f"{format_bytes(peak.host_bytes)} host"
    if peak.device_allocated_bytes is None or peak.device_reserved_bytes is None:
        return host
    allocated = _against(peak.device_allocated_bytes, predicted.allocated_bytes if predicted else None)
    reserved = _against(peak.device_reserved_bytes, predicted.reserved_bytes if predicted else None)
    return f"{allocated} allocated, {reserved} reserved on the GPU; {host}"


def _against(measured: int, predicted: int | None) -> str:
    """Return the measured bytes, with the predicted ones if there are any."""
    if predicted is None:
        return format_bytes(measured)
    error = 100 * (predicted / measured - 1) if measured else 0.0
    return f"{format_bytes(measured)} ({format_bytes(predicted)} predicted, {error:+.1f} %)"


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
