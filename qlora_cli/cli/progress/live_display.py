"""A run as a live display: bars and figures at the bottom of a terminal, notes scrolling above."""

import time

from rich.console import Console, Group, RenderableType
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
from rich.table import Column, Table
from rich.text import Text

from qlora_cli.cli.progress.event_text import describe_event, describe_losses, sample_texts
from qlora_cli.cli.progress.live_lines import NARROW, headline, training_lines
from qlora_cli.cli.progress.resized_display import ResizedLive
from qlora_cli.cli.progress.run_state import RunState
from qlora_cli.cli.progress.transfers import TRANSFERS
from qlora_cli.cli.sparkline import can_show_blocks
from qlora_cli.cli.stderr import sanitize
from qlora_cli.events import (
    BytesDone,
    EvalDone,
    EvalStarted,
    Event,
    Noted,
    PhaseStarted,
    SampleDone,
    StepDone,
    StepSkipped,
    TrainingEnded,
    TrainingResumed,
    TrainingStarted,
    WorkAdvanced,
)
from qlora_cli.units import format_bytes, format_duration


class SpeedColumn(ProgressColumn):
    """Bytes per second in binary units; rich's own column uses decimal ones."""

    def render(self, task: Task) -> Text:
        """Return the speed of the last half minute."""
        return Text(f"{format_bytes(round(task.speed))}/s" if task.speed else "")


class Bars(Progress):
    """Bars of one kind; each column has a minimum width of the terminal below which it is hidden."""

    def __init__(self, console: Console, columns: dict[ProgressColumn, int]) -> None:
        super().__init__(*columns, console=console, expand=True)
        self._least_widths = columns

    def __rich__(self) -> RenderableType:
        """Return the bars for the current width of the terminal."""
        self.columns = tuple(column for column, least in self._least_widths.items() if self.console.width >= least)
        return self.get_renderable()


class LiveReporter:
    """Shows a bar of the steps with their figures, and one for each transfer; notes scroll above."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shows_blocks = can_show_blocks(console.encoding)
        self._state = RunState()
        self._steps = Bars(
            console,
            {
                TextColumn("step"): 0,
                MofNCompleteColumn(): 0,
                BarColumn(bar_width=None, table_column=Column(ratio=1)): 0,  # the space that is left
                TextColumn("{task.percentage:>3.0f} %"): NARROW,
                TimeElapsedColumn(): NARROW,
                # Not rich's own column: it forgets steps after 30 seconds, and so never shows a time for slow ones.
                TextColumn("ETA {task.fields[eta]}"): 0,
            },
        )
        self._task: TaskID | None = None
        self._bytes = Bars(
            console,
            {
                TextColumn("{task.description}"): 0,
                BarColumn(bar_width=None): NARROW,
                DownloadColumn(binary_units=True): 0,
                SpeedColumn(): NARROW,
                TextColumn("ETA"): 0,
                TimeRemainingColumn(compact=True): 0,
            },
        )
        self._transfers: dict[str, TaskID] = {}
        self.live = ResizedLive(self._draw, console)

    def report(self, event: Event) -> None:
        """Handle an event; the display is redrawn several times per second, notes at once."""
        self._state.update(event, time.monotonic())
        match event:
            case BytesDone():
                self._report_bytes(event)
            case TrainingStarted():
                self._task = self._steps.add_task("train", total=event.num_steps, eta="-:--")
            case StepDone() | PhaseStarted() | EvalStarted() | WorkAdvanced():
                pass  # drawn from the state
            case SampleDone():
                self._print(f"step {event.step}: sample")
                self.live.console.print(_sample_table(event))
            case _:
                self._note(event)

    def _note(self, event: Event) -> None:
        if isinstance(event, TrainingEnded) and self._shows_blocks:
            self._print(describe_losses(self._state.losses.means(), self._console.width))
        self._print(describe_event(event), _style(event))

    def _print(self, line: str | None, style: str = "") -> None:
        if line is not None:
            self.live.console.print(Text(sanitize(line), style=style))

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
        state = self._state
        lines: list[RenderableType] = [headline(state, self._console.width)]
        if self._transfers:
            lines.append(self._bytes)
        if self._task is not None:
            eta = "-:--" if state.seconds_left is None else format_duration(state.seconds_left)
            self._steps.update(self._task, completed=state.step, eta=eta)
            lines.append(self._steps)
            width, now = self._console.width, time.monotonic()
            lines += training_lines(state, width, now, can_show_blocks=self._shows_blocks)
        return Group(*lines)


def _style(event: Event) -> str:
    match event:
        case TrainingResumed():
            return "bold cyan"
        case StepSkipped() | Noted(level="warning"):
            return "yellow"
        case EvalDone(is_best=True):
            return "green"
        case _:
            return ""


def _sample_table(event: SampleDone) -> Table:
    prompt, answer = sample_texts(event)
    table = Table.grid(Column(min_width=len("  answer")), Column(overflow="fold"), padding=(0, 2))
    table.add_row("  prompt", Text(sanitize(prompt), style="dim"))
    table.add_row("  answer", Text(sanitize(answer)))
    return table
