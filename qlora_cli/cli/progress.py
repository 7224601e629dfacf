"""Draw a run while it goes on, on stderr: a live display on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from qlora_cli.cli.failures import redact
from qlora_cli.events import (
    BytesDone,
    CheckpointSaved,
    EvalDone,
    EvalStarted,
    Event,
    MemoryUse,
    Noted,
    PhaseStarted,
    Reporter,
    StepDone,
    TrainingEnded,
    TrainingStarted,
)
from qlora_cli.units import format_bytes, format_duration

PLAIN_INTERVAL_SECONDS = 10.0
SMOOTHING = 0.9  # weight of the past in the smoothed loss that the arrow compares with
STEADY = 0.005  # relative change below which the loss counts as level
# What is said of bytes while they go on, and once all are done.
TRANSFERS = {
    "download": ("Downloading", "downloaded"),
    "quantize": ("Quantizing", "quantized"),
    "load": ("Loading", "loaded"),
}


@contextmanager
def reporting() -> Iterator[Reporter]:
    """Give the reporter that fits stderr, and leave the terminal as it was."""
    console = Console(stderr=True, highlight=False)
    # stdout is for the result: what trackers print while they run goes where progress goes.
    if not sys.stderr.isatty() or console.is_dumb_terminal:  # such as TERM=dumb, which can't redraw
        with redirect_stdout(sys.stderr):
            yield PlainReporter(sys.stderr)
        return
    reporter = LiveReporter(console)
    with reporter.live:
        yield reporter


class Direction:
    """Whether a noisy series goes down, up or sideways, by an exponential mean."""

    def __init__(self) -> None:
        self._smoothed: float | None = None

    def update(self, value: float) -> str:
        """Take the next value and return an arrow; the first has no direction."""
        if self._smoothed is None:
            self._smoothed = value
            return " "
        before = self._smoothed
        self._smoothed = SMOOTHING * before + (1 - SMOOTHING) * value
        change = (value - before) / max(abs(before), 1e-12)
        return "→" if abs(change) < STEADY else ("↓" if change < 0 else "↑")


def seconds_left(step: StepDone) -> float:
    """Return the time that the remaining steps take at the pace so far."""
    return step.elapsed_seconds / step.step * (step.num_steps - step.step)


def describe_step(step: StepDone, arrow: str) -> str:
    """Return a step's figures in one line."""
    return (
        f"loss {step.loss:.4f} {arrow}  lr {step.learning_rate:.2e}  grad {step.grad_norm:.3f}  "
        f"{step.tokens_per_second:,.0f} tok/s"
    )


def describe_memory(memory: MemoryUse) -> str:
    """Return the memory in use: of the GPU if there is one, else of the process on the host."""
    if memory.device_allocated_bytes is None:
        return f"memory {format_bytes(memory.host_bytes)} resident"
    assert memory.device_reserved_bytes is not None
    assert memory.device_total_bytes is not None
    return (
        f"VRAM {format_bytes(memory.device_allocated_bytes)} allocated / "
        f"{format_bytes(memory.device_reserved_bytes)} reserved / of {format_bytes(memory.device_total_bytes)}"
    )


def describe_event(event: Event) -> str | None:
    """Return the line that announces an event, or None for one that is drawn otherwise."""
    match event:
        case PhaseStarted():
            return f"{event.title} …"
        case Noted():
            return f"{'warning: ' if event.level == 'warning' else ''}{event.message}"
        case TrainingStarted():
            return f"Training {event.num_steps:,} steps into {event.output}"
        case EvalStarted():
            return "Evaluating …"
        case EvalDone():
            return f"step {event.step}: held-out loss {event.loss:.4f} ({format_duration(event.seconds)})"
        case CheckpointSaved():
            return f"step {event.step}: checkpoint {event.path}"
        case TrainingEnded(interrupted_by=str()):
            return f"Stopped by {event.interrupted_by} after step {event.step} of {event.num_steps}"
        case _:
            return None


@dataclass(kw_only=True)
class Transfer:
    """One transfer on its way, since when and from where on: what was there before does not count as speed."""

    started: float
    first_bytes: int
    last_line: float = -float("inf")

    def describe(self, event: BytesDone, now: float) -> str:
        """Return how far it is, and after a while how fast it goes and how long it will take."""
        line = (
            f"{TRANSFERS[event.kind][0]}: {format_bytes(event.done_bytes)} of {format_bytes(event.total_bytes)} "
            f"({event.done_bytes / event.total_bytes:.0%})"
        )
        speed = self._bytes_per_second(event, now)
        if not speed:
            return line
        left = format_duration((event.total_bytes - event.done_bytes) / speed)
        return f"{line}, {format_bytes(round(speed))}/s, {left} left"

    def describe_end(self, event: BytesDone, now: float) -> str:
        """Return what all of it was, and how fast it went."""
        line = f"{format_bytes(event.total_bytes)} {TRANSFERS[event.kind][1]}"
        speed = self._bytes_per_second(event, now)
        return f"{line} in {format_duration(now - self.started)} ({format_bytes(round(speed))}/s)" if speed else line

    def _bytes_per_second(self, event: BytesDone, now: float) -> float:
        seconds = now - self.started
        return max(0, event.done_bytes - self.first_bytes) / seconds if seconds > 0 else 0.0


class PlainReporter:
    """One line an event, and of the steps the first, the last and one an interval."""

    def __init__(self, file: TextIO, interval_seconds: float = PLAIN_INTERVAL_SECONDS) -> None:
        self._file = file
        self._interval_seconds = interval_seconds
        self._last_line = -float("inf")
        self._direction = Direction()
        self._transfers: dict[str, Transfer] = {}

    def report(self, event: Event) -> None:
        """Write a line, if it is time for one."""
        if isinstance(event, StepDone):
            self._report_step(event)
        elif isinstance(event, BytesDone):
            self._report_bytes(event)
        elif line := describe_event(event):
            self._write(line)

    def _report_step(self, step: StepDone) -> None:
        arrow = self._direction.update(step.loss)
        now = time.monotonic()
        if step.step not in (1, step.num_steps) and now - self._last_line < self._interval_seconds:
            return
        self._last_line = now
        self._write(
            f"step {step.step}/{step.num_steps}  {describe_step(step, arrow)}  "
            f"{describe_memory(step.memory)}  {format_duration(seconds_left(step))} left"
        )

    def _report_bytes(self, event: BytesDone) -> None:
        now = time.monotonic()
        if event.kind not in self._transfers:
            transfer = self._transfers[event.kind] = Transfer(started=now, first_bytes=event.done_bytes)
        else:
            transfer = self._transfers[event.kind]
            if event.done_bytes < event.total_bytes and now - transfer.last_line < self._interval_seconds:
                return
        transfer.last_line = now
        if event.done_bytes < event.total_bytes:
            self._write(transfer.describe(event, now))
            return
        del self._transfers[event.kind]
        if event.total_bytes:
            self._write(transfer.describe_end(event, now))

    def _write(self, line: str) -> None:
        # A reader that left, or a full disk below the log, must not cost a run its training.
        with suppress(OSError):
            print(redact(line), file=self._file, flush=True)


class SpeedColumn(ProgressColumn):
    """Bytes a second in the units of everything else; rich's own column counts in thousands."""

    def render(self, task: Task) -> Text:
        """Return the speed of the last half minute."""
        return Text(f"{format_bytes(round(task.speed))}/s" if task.speed else "")


class LiveReporter:
    """A bar with the figures of the last step below it, and one for each transfer; notes scroll above."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._direction = Direction()
        self._status = Text("Starting …", style="dim")
        self._figures = Text()
        self._memory = Text()
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            # Not rich's own column: it forgets steps after 30 seconds, and so never shows a time for slow ones.
            TextColumn("ETA {task.fields[eta]}"),
            console=console,
            expand=True,
        )
        self._task: TaskID | None = None
        self._bytes = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            DownloadColumn(binary_units=True),
            SpeedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(compact=True),
            console=console,
            expand=True,
        )
        self._transfers: dict[str, TaskID] = {}
        self.live = Live(get_renderable=self._draw, console=console, refresh_per_second=8, transient=True)

    def report(self, event: Event) -> None:
        """Draw the event."""
        if isinstance(event, StepDone):
            self._report_step(event)
            return
        if isinstance(event, BytesDone):
            self._report_bytes(event)
            return
        if isinstance(event, TrainingStarted):
            self._task = self._progress.add_task("train", total=event.num_steps, eta="-:--")
        line = describe_event(event)
        if line is None:
            return
        if isinstance(event, PhaseStarted | EvalStarted | TrainingStarted):
            self._status = Text(redact(line), style="dim")
        else:
            style = "yellow" if isinstance(event, Noted) and event.level == "warning" else ""
            self.live.console.print(Text(redact(line), style=style))

    def _report_step(self, step: StepDone) -> None:
        assert self._task is not None, "a step before the training started"
        self._progress.update(self._task, completed=step.step, eta=format_duration(seconds_left(step)))
        self._figures = Text(describe_step(step, self._direction.update(step.loss)))
        self._memory = Text(f"{describe_memory(step.memory)}  epoch {step.epoch:.2f}", style="dim")

    def _report_bytes(self, event: BytesDone) -> None:
        if event.done_bytes >= event.total_bytes:
            if (task := self._transfers.pop(event.kind, None)) is not None:
                self._bytes.remove_task(task)
        elif event.kind in self._transfers:
            self._bytes.update(self._transfers[event.kind], completed=event.done_bytes, total=event.total_bytes)
        else:
            self._transfers[event.kind] = self._bytes.add_task(
                TRANSFERS[event.kind][0], completed=event.done_bytes, total=event.total_bytes
            )

    def _draw(self) -> RenderableType:
        lines: list[RenderableType] = [self._status]
        if self._transfers:
            lines.append(self._bytes)
        if self._task is not None:
            lines += [self._progress, self._figures, self._memory]
        return Group(*lines)
