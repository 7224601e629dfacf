"""The events of a run as text, for terminals and logs."""

import math
from collections.abc import Sequence

from qlora_cli.cli.progress.smoothed_loss import SmoothedLoss
from qlora_cli.cli.sparkline import sparkline
from qlora_cli.events import (
    CheckpointSaved,
    EvalDone,
    EvalStarted,
    Event,
    MemoryUse,
    Noted,
    PhaseStarted,
    Rehearsed,
    SampleDone,
    StepDone,
    StepSkipped,
    TrainingEnded,
    TrainingResumed,
    TrainingStarted,
    WorkAdvanced,
)
from qlora_cli.units import GIB, counted, format_bytes, format_duration
from qlora_cli.visible import LINE_BREAK, visible

MAX_ROWS = 3  # of a skipped step; `metrics.jsonl` has them all
MAX_SAMPLE_LINES, MAX_SAMPLE_CHARACTERS = 4, 300


def describe_event(event: Event) -> str | None:
    """Return an event as a line; None for one that is shown in another way."""
    match event:
        case PhaseStarted():
            return f"{event.title} …"
        case Noted():
            return f"{'warning: ' if event.level == 'warning' else ''}{event.message}"
        case TrainingStarted():
            return f"Training {counted(event.num_steps, 'step')} into {event.output}"
        case TrainingResumed(step=0):
            return f"Starting over in {event.checkpoint}: the earlier run left no checkpoint"
        case TrainingResumed():
            return f"Resuming at step {event.step:,} of {event.num_steps:,} from {event.checkpoint}"
        case Rehearsed():
            return _describe_rehearsal(event)
        case StepSkipped():
            return _describe_skipped(event)
        case EvalStarted():
            return "Evaluating …"
        case WorkAdvanced():
            done = f"{event.num_done:,} of {counted(event.num_all, event.unit)}"
            return f"{event.title}: {done}, {format_duration(event.seconds_left)} left"
        case EvalDone():
            best = ", best so far" if event.is_best else ""
            rewards = "" if event.rewards is None else f", {event.rewards}"
            seconds = format_duration(event.seconds)
            return f"step {event.step}: held-out loss {event.loss:.4f}{rewards}{best} ({seconds})"
        case SampleDone():
            prompt, answer = (text.replace("\n", " ") for text in sample_texts(event))
            return f"step {event.step}: sample: {prompt} -> {answer}"
        case CheckpointSaved():
            return f"step {event.step}: checkpoint {event.path}"
        case TrainingEnded(interrupted_by=str()):
            where = f"after step {event.step:,} of {event.num_steps:,}"
            return f"Stopped by {event.interrupted_by} {where}; the same command resumes there"
        case _:
            return None


def describe_step(step: StepDone, loss: str) -> list[str]:
    """Return the figures of a step, with a described loss, the most important first."""
    return [
        loss,
        *([] if step.rewards is None else [str(step.rewards)]),
        f"lr {step.learning_rate:.2e}",
        f"grad {step.grad_norm:.3f}",
        f"{step.tokens_per_second:,.0f} tok/s",
    ]


def describe_loss(step: StepDone, smoothed: SmoothedLoss) -> str:
    """Return the smoothed loss with its direction; that of the step itself if it is not finite."""
    return f"loss {smoothed.value if math.isfinite(step.loss) else step.loss:.4f} {smoothed.arrow}"


def describe_epoch(step: StepDone, num_epochs: float | None) -> list[str]:
    """Return the epochs that are done and how many there are; nothing for a stream."""
    return [] if num_epochs is None else [f"epoch {step.epoch:.2f} of {num_epochs:.2f}"]


def describe_memory(memory: MemoryUse, *, is_short: bool = False) -> str:
    """Return the memory in use: of the GPU if there is one, else of the process on the host."""
    if memory.device_allocated_bytes is None:
        return f"memory {format_bytes(memory.host_bytes)} resident"
    assert memory.device_reserved_bytes is not None
    assert memory.device_total_bytes is not None
    allocated, reserved = memory.device_allocated_bytes / GIB, memory.device_reserved_bytes / GIB
    figures = (
        f"{allocated:.2f} / {reserved:.2f}" if is_short else f"{allocated:.2f} allocated / {reserved:.2f} reserved"
    )
    return f"VRAM {figures} of {memory.device_total_bytes / GIB:.2f} GiB"


def describe_losses(losses: Sequence[float], width: int) -> str | None:
    """Return a sparkline of the loss and its range, at most `width` columns; None for fewer than two finite losses."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    if len(finite) < 2:
        return None
    label, span = "losses ", f"  {min(finite):.3g} to {max(finite):.3g}"
    return f"{label}{sparkline(losses, width - len(label) - len(span))}{span}"


def describe_prediction(memory: MemoryUse, predicted_reserved_bytes: int | None) -> str | None:
    """Return the predicted reserved memory, and its error; None without a prediction."""
    if predicted_reserved_bytes is None or not memory.device_reserved_bytes:
        return None
    error = 100 * (predicted_reserved_bytes / memory.device_reserved_bytes - 1)
    return f"predicted {predicted_reserved_bytes / GIB:.2f} ({error:+.1f} %)"


def describe_age(seconds: float) -> str:
    """Return an age in whole units: `42s ago`, `3m ago`, `2h 5m ago`, `1d 3h ago`."""
    minutes, whole_seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours}h ago"
    if hours:
        return f"{hours}h {minutes}m ago"
    return f"{minutes}m ago" if minutes else f"{whole_seconds}s ago"


def sample_texts(event: SampleDone) -> tuple[str, str]:
    """Return prompt and answer, truncated, with invisible and control characters made visible."""
    return _shorten(event.prompt), _shorten(event.answer)


def _shorten(text: str) -> str:
    text = text.strip()
    short = "\n".join(text.split("\n", MAX_SAMPLE_LINES)[:MAX_SAMPLE_LINES])[:MAX_SAMPLE_CHARACTERS].rstrip()
    return (visible(short, is_end=False) + (" …" if len(short) < len(text) else "")) or "(empty)"


def _describe_rehearsal(event: Rehearsed) -> str:
    tried = f"{counted(event.micro_batch_size, 'row')} of {counted(event.longest_row_tokens, 'token')}"
    seconds = format_duration(event.seconds)
    if event.device_allocated_bytes is None or event.device_reserved_bytes is None:
        return f"largest micro-batch ({tried}) tried, took {seconds}"
    return (
        f"largest micro-batch ({tried}) fits: {format_bytes(event.device_allocated_bytes)} allocated, "
        f"{format_bytes(event.device_reserved_bytes)} reserved, took {seconds}"
    )


def _describe_skipped(event: StepSkipped) -> str:
    rows = ", ".join(event.rows[:MAX_ROWS])
    more = f" and {len(event.rows) - MAX_ROWS:,} more" if len(event.rows) > MAX_ROWS else ""
    line = f"warning: step {event.step} skipped: {event.reason}"
    return _in_one_line(f"{line}; its rows: {rows}{more}" if rows else line)


def _in_one_line(text: str) -> str:
    return visible(text, is_end=False).replace(f"{LINE_BREAK}\n", f"{LINE_BREAK} ")
