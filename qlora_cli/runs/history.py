"""The history of a run, read from its `metrics.jsonl` alone, as if the run had never been interrupted.

A run that is resumed after a step appends to the same file, so earlier reports of later steps no longer count. The
file is read line by line, and only the numbers of each step are kept in memory.
"""

import errno
import heapq
import json
import math
from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from qlora_cli.events import (
    CheckpointSaved,
    EvalDone,
    Event,
    Noted,
    Rehearsed,
    Rewards,
    SampleDone,
    StepDone,
    StepSkipped,
    TrainingEnded,
    TrainingResumed,
    TrainingStarted,
)
from qlora_cli.runs.directory import METRICS_FILE
from qlora_cli.runs.metrics import read_event
from qlora_cli.units import MIB

NAN = float("nan")
MAX_NOTES = 1000
MAX_EVENTS_OF_KIND = 200_000  # evaluations, answers and the like; steps are only numbers, and not limited
LONGEST_LINE = 16 * MIB  # bytes; longer lines are not events
OF_STEP = ("loss", "learning_rate", "grad_norm", "num_tokens", "tokens_per_second")
OF_MEMORY = ("host_bytes", "device_allocated_bytes", "device_reserved_bytes")
# Events that show that the loop was running.
ACTIVITY = (StepDone, StepSkipped, EvalDone, SampleDone, CheckpointSaved, TrainingEnded)

OfStep = TypeVar("OfStep", SampleDone, CheckpointSaved)


@dataclass(frozen=True, kw_only=True)
class StepColumns:
    """The optimizer steps in order, one column per figure, NaN if unknown. Memory in use, in bytes."""

    step: Sequence[int]
    loss: Sequence[float]
    learning_rate: Sequence[float]
    grad_norm: Sequence[float]
    num_tokens: Sequence[float]
    tokens_per_second: Sequence[float]
    host_bytes: Sequence[float]
    device_allocated_bytes: Sequence[float]
    device_reserved_bytes: Sequence[float]

    def __len__(self) -> int:
        return len(self.step)


@dataclass(frozen=True, kw_only=True)
class RunHistory:
    """The events of a run, without those that a resumption undid.

    Attributes:
        steps: The optimizer steps.
        rewards: Those of the last step, if the run compares answers.
        start: The event that announced the training; None before it.
        num_steps: The number of steps planned; None before training started.
        evaluations: In order; `is_best` refers to this history.
        samples: Answers to sample prompts, in order of steps.
        skipped: Steps that were skipped because they were not finite.
        checkpoints: Saved checkpoints; some may have been deleted since.
        resumes: The resumptions of training after a checkpoint, in order.
        stops: The ends of training by a signal.
        end: The end of the loop, unless it was resumed after that.
        rehearsal: The last rehearsal before the first step.
        notes: Notes, each message once.
        device_total_bytes: The memory of the GPU.
        started: The time of the first event; None without events.
        last_event: The time of the last event.
        active_seconds: The time from the start of the loop to its last activity, summed over all resumptions.
        num_damaged_lines: The number of unreadable lines, without an unfinished last line.
    """

    steps: StepColumns
    rewards: Rewards | None
    start: TrainingStarted | None
    num_steps: int | None
    evaluations: tuple[EvalDone, ...]
    samples: tuple[SampleDone, ...]
    skipped: tuple[StepSkipped, ...]
    checkpoints: tuple[CheckpointSaved, ...]
    resumes: tuple[TrainingResumed, ...]
    stops: tuple[TrainingEnded, ...]
    end: TrainingEnded | None
    rehearsal: Rehearsed | None
    notes: tuple[Noted, ...]
    device_total_bytes: int | None
    started: datetime | None
    last_event: datetime | None
    active_seconds: float
    num_damaged_lines: int

    @property
    def last_step(self) -> int:
        """The last step that was reported in any way; 0 before the first."""
        last = [*self.steps.step[-1:], *([self.end.step] if self.end else [])]
        for events in (self.skipped, self.evaluations, self.resumes):
            last += [event.step for event in events[-1:]]
        return max(last, default=0)

    @property
    def compared(self) -> str | None:
        """What the losses are means over, by what was reported: pairs, or answers; None of single tokens."""
        found = (self.rewards, *(done.rewards for done in self.evaluations))
        return next((rewards.rows for rewards in found if rewards is not None), None)

    @property
    def best(self) -> EvalDone | None:
        """The best evaluation; the last of several that are equal."""
        return next((event for event in reversed(self.evaluations) if event.is_best), None)


def read_history(directory: Path) -> RunHistory:
    """Return the history of the run in `directory`; an empty one if it has no `metrics.jsonl`.

    Raises:
        OSError: the file can't be read.
    """
    reader, path = _HistoryReader(), directory / METRICS_FILE
    if path.exists() and not (path.is_file() or path.is_dir()):  # opening a pipe would block
        raise OSError(errno.EINVAL, "it is no file", str(path))
    try:
        with path.open("rb") as file:
            for line in iter(partial(file.readline, LONGEST_LINE), b""):
                reader.take(line)
    except FileNotFoundError:
        pass
    return reader.history()


def empty_history() -> RunHistory:
    """Return the history of a run without events."""
    return _HistoryReader().history()


class _HistoryReader:
    """Reads the lines of a metrics file in order, and drops the steps that a resumption undoes."""

    def __init__(self) -> None:
        self._columns: dict[str, array[Any]] = {
            "step": array("q"),
            **{name: array("d") for name in (*OF_STEP, *OF_MEMORY)},
        }
        self._add_figures = [column.append for name, column in self._columns.items() if name != "step"]
        self._rewards: Rewards | None = None
        self._evaluations: list[EvalDone] = []
        self._samples: _ByStep[SampleDone] = _ByStep()
        self._skipped: list[StepSkipped] = []
        self._checkpoints: _ByStep[CheckpointSaved] = _ByStep()
        self._resumes: list[TrainingResumed] = []
        self._stops: list[TrainingEnded] = []
        self._end: TrainingEnded | None = None
        self._rehearsal: Rehearsed | None = None
        self._notes: dict[str, Noted] = {}
        self._start: TrainingStarted | None = None
        self._num_steps: int | None = None
        self._device_total_bytes: int | None = None
        self._times = _Times()
        self._num_damaged_lines = 0

    def take(self, line: bytes) -> None:
        """Read a line, with its line break if it has one; of an event of an unknown kind, only the time is used."""
        try:
            content = json.loads(line.decode(errors="replace"))
            event = read_event(content)
            if event is not None:
                self._take_event(event)
            self._times.take(event, content.get("time"))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            # Only the last line can lack its end: a process was killed while it wrote it.
            self._num_damaged_lines += line.endswith(b"\n") and bool(line.strip())

    def history(self) -> RunHistory:
        """Return the history so far."""
        return RunHistory(
            steps=StepColumns(**self._columns),
            rewards=self._rewards,
            start=self._start,
            num_steps=self._num_steps,
            evaluations=_with_best(self._evaluations),
            samples=self._samples.events,
            skipped=tuple(self._skipped),
            checkpoints=self._checkpoints.events,
            resumes=tuple(self._resumes),
            stops=tuple(self._stops),
            end=self._end,
            rehearsal=self._rehearsal,
            notes=tuple(self._notes.values()),
            device_total_bytes=self._device_total_bytes,
            started=self._times.first,
            last_event=self._times.last,
            active_seconds=self._times.active_seconds,
            num_damaged_lines=self._num_damaged_lines,
        )

    def _take_event(self, event: Event) -> None:
        match event:
            case StepDone():
                self._add_step(event)
            case EvalDone():  # repeated for a run that was resumed after its last step
                _forget(self._evaluations, event.step - 1)
                _add(self._evaluations, event)
            case SampleDone():
                self._samples.put(event, event.prompt)
            case StepSkipped():
                _forget(self._skipped, event.step - 1)
                _add(self._skipped, event)
            case CheckpointSaved():
                self._checkpoints.put(event)
            case TrainingStarted():
                self._num_steps, self._start = event.num_steps or self._num_steps, event
            case TrainingResumed():
                self._add_resumption(event)
            case TrainingEnded():
                self._end = event
                if event.interrupted_by is not None:
                    _add(self._stops, event)
            case Rehearsed():
                self._rehearsal = event
            case Noted():
                if len(self._notes) < MAX_NOTES:
                    self._notes.setdefault(event.message, event)

    def _add_step(self, event: StepDone) -> None:
        steps, memory = self._columns["step"], event.memory
        figures = (event.loss, event.learning_rate, event.grad_norm, event.num_tokens, event.tokens_per_second)
        in_use = (memory.host_bytes or NAN, memory.device_allocated_bytes, memory.device_reserved_bytes)
        # Converted before any is added: a number may be too large for a float, and then the whole line is ignored.
        row = [NAN if figure is None else float(figure) for figure in (*figures, *in_use)]
        if steps and event.step <= steps[-1]:  # restarted, without a checkpoint to resume from
            self._forget_after(event.step - 1)
        steps.append(event.step)
        for add, figure in zip(self._add_figures, row, strict=True):
            add(figure)
        self._rewards = event.rewards
        self._num_steps = event.num_steps or self._num_steps
        self._device_total_bytes = memory.device_total_bytes or self._device_total_bytes
        self._end = None

    def _add_resumption(self, event: TrainingResumed) -> None:
        self._num_steps = event.num_steps or self._num_steps
        self._forget_after(event.step)
        self._end = None
        if event.step:  # else there was no checkpoint, and the run restarted
            _add(self._resumes, event)

    def _forget_after(self, step: int) -> None:
        steps = self._columns["step"]
        num_left = len(steps)
        while num_left and steps[num_left - 1] > step:
            num_left -= 1
        for column in self._columns.values():
            del column[num_left:]
        self._rewards = None  # of a later step, or of this one, which the next one replaces
        for events in (self._evaluations, self._skipped, self._resumes):
            _forget(events, step)
        self._samples.forget_after(step)
        self._checkpoints.forget_after(step)


class _ByStep(Generic[OfStep]):
    """Events that come in any order of steps, the last one for each step and name; each is forgotten once."""

    def __init__(self) -> None:
        self._events: dict[tuple[int, str], OfStep] = {}
        self._latest: list[tuple[int, str]] = []  # a heap of the same keys, with steps negated

    @property
    def events(self) -> tuple[OfStep, ...]:
        """The remaining events, in the order of their first occurrence."""
        return tuple(self._events.values())

    def put(self, event: OfStep, name: str = "") -> None:
        """Add an event.

        Raises:
            ValueError: there are too many.
        """
        key = (event.step, name)
        if key not in self._events:
            _check_number(self._events)
            heapq.heappush(self._latest, (-event.step, name))
        self._events[key] = event

    def forget_after(self, step: int) -> None:
        """Forget the events of later steps."""
        while self._latest and -self._latest[0][0] > step:
            negated, name = heapq.heappop(self._latest)
            del self._events[-negated, name]


class _Times:
    """The times of events; the time between a run's end and its resumption does not count as active."""

    def __init__(self) -> None:
        self._first = self._last = self._begun = self._alive = ""
        self._before_seconds = 0.0

    def take(self, event: Event | None, time: object) -> None:
        """Add the time of an event; None is an event of an unknown kind."""
        if not isinstance(time, str):
            return
        self._first = self._first or time
        self._last = time
        if isinstance(event, ACTIVITY):
            self._begun = self._begun or time
            self._alive = time
        elif isinstance(event, TrainingStarted | TrainingResumed):
            self._before_seconds = self.active_seconds
            self._begun, self._alive = time, ""

    @property
    def first(self) -> datetime | None:
        """The time of the first event."""
        return parse_time(self._first)

    @property
    def last(self) -> datetime | None:
        """The time of the last event."""
        return parse_time(self._last)

    @property
    def active_seconds(self) -> float:
        """The duration of the loop, summed over all resumptions."""
        begun, alive = parse_time(self._begun), parse_time(self._alive)
        if begun is None or alive is None:
            return self._before_seconds
        return self._before_seconds + max(0.0, (alive - begun).total_seconds())


def parse_time(text: object) -> datetime | None:
    """Return an ISO time, in UTC if it has no time zone; None if it is invalid."""
    try:
        time = datetime.fromisoformat(str(text))
    except ValueError:
        return None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _forget(events: list[Any], step: int) -> None:
    """Remove the events of steps after `step`, which come last."""
    while events and events[-1].step > step:
        events.pop()


def _add(events: list[Any], event: Event) -> None:
    _check_number(events)
    events.append(event)


def _check_number(events: Collection[object]) -> None:
    if len(events) >= MAX_EVENTS_OF_KIND:
        raise ValueError(f"more than {MAX_EVENTS_OF_KIND:,} events of a kind")


def _with_best(evaluations: Sequence[EvalDone]) -> tuple[EvalDone, ...]:
    marked, best = [], math.inf
    for done in evaluations:
        is_best = math.isfinite(done.loss) and done.loss <= best
        best = done.loss if is_best else best
        marked.append(replace(done, is_best=is_best))
    return tuple(marked)
