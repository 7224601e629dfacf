"""Progress as plain lines, for logs, pipes, and terminals that can't redraw."""

import time
from typing import TextIO

from qlora_cli.cli.progress.event_text import (
    describe_epoch,
    describe_event,
    describe_loss,
    describe_losses,
    describe_memory,
    describe_prediction,
    describe_step,
)
from qlora_cli.cli.progress.run_state import RunState
from qlora_cli.cli.progress.transfers import Transfer
from qlora_cli.cli.robust_stream import RobustStream
from qlora_cli.cli.sparkline import can_show_blocks
from qlora_cli.cli.stderr import sanitize
from qlora_cli.events import BytesDone, Event, Noted, StepDone, StepSkipped, TrainingEnded, WorkAdvanced
from qlora_cli.units import format_duration

PLAIN_INTERVAL_SECONDS = 10.0
CURVE_WIDTH = 80


class PlainReporter:
    """Writes one line per event; of the steps, the first, the last and one per interval."""

    def __init__(self, file: TextIO, interval_seconds: float = PLAIN_INTERVAL_SECONDS) -> None:
        self._file = RobustStream(file)
        self._interval_seconds = interval_seconds
        self._last_line = -float("inf")
        self._state = RunState()
        self._transfers: dict[str, Transfer] = {}
        self._shows_curves = can_show_blocks(file.encoding)

    def report(self, event: Event) -> None:
        """Write a line for the event, unless the last one is too recent."""
        self._state.update(event, time.monotonic())
        if isinstance(event, StepDone):
            self._report_step(event)
        elif isinstance(event, BytesDone):
            self._report_bytes(event)
        elif isinstance(event, WorkAdvanced):
            self._report_work(event)
        else:
            if isinstance(event, TrainingEnded) and self._shows_curves:
                self._write(describe_losses(self._state.losses.means(), CURVE_WIDTH))
            self._write(describe_event(event))

    def _report_step(self, step: StepDone) -> None:
        now = time.monotonic()
        if step.step not in (1, step.num_steps) and now - self._last_line < self._interval_seconds:
            return
        self._last_line = now
        self._write("  ".join([f"step {step.step}/{step.num_steps}", *self._figures(step)]))

    def _figures(self, step: StepDone) -> list[str]:
        loss = f"{describe_loss(step, self._state.loss)} ({step.loss:.4f} in this step)"
        figures = [*describe_step(step, loss), *describe_epoch(step, self._state.num_epochs)]
        figures.append(describe_memory(step.memory))
        if predicted := describe_prediction(step.memory, self._state.predicted_reserved_bytes):
            figures.append(predicted)
        if (seconds := self._state.seconds_left) is not None:
            figures.append(f"{format_duration(seconds)} left")
        return figures

    def _report_work(self, event: WorkAdvanced) -> None:
        now = time.monotonic()
        if event.num_done < event.num_all and now - self._last_line >= self._interval_seconds:
            self._last_line = now
            self._write(describe_event(event))

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

    def _write(self, line: str | None) -> None:
        if line is not None:
            print(sanitize(line), file=self._file, flush=True)


class WarningReporter:
    """Writes warnings only, and how a run that was stopped is resumed."""

    def __init__(self, file: TextIO) -> None:
        self._file = RobustStream(file)

    def report(self, event: Event) -> None:
        """Write a line for a warning."""
        is_warning = isinstance(event, Noted) and event.level == "warning"
        is_stopped = isinstance(event, TrainingEnded) and event.interrupted_by is not None
        if is_warning or is_stopped or isinstance(event, StepSkipped):
            self._file.write(f"{sanitize(describe_event(event) or '')}\n")
