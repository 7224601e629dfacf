"""Summarize a run in a few figures, from its directory alone, whether it ended or not."""

import math
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import psutil

from qlora_cli.events import Rewards
from qlora_cli.runs.checkpoints import list_checkpoints
from qlora_cli.runs.directory import METRICS_FILE, RUN_FILE, RunDirectory
from qlora_cli.runs.history import RunHistory, StepColumns, parse_time
from qlora_cli.runs.record import RecordedPeak, RecordedPrediction, RecordedResult, RunRecord, as_name
from qlora_cli.units import counted

State = Literal["running", "done", "interrupted", "failed", "killed"]
ENDED: dict[str, State] = {"done": "done", "interrupted": "interrupted", "failed": "failed"}

QUIET_SECONDS = 15 * 60  # a run on another host counts as killed after this time without an event


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """A run in a few figures. Sizes are in bytes, times in seconds; None stands for an unknown value.

    Attributes:
        name: The name of the directory.
        path: The directory.
        state: `killed` is a run that was running when its process disappeared.
        step: The last step.
        num_steps: The number of steps planned.
        loss: The loss of the last step.
        best_loss: The lowest loss on held-out data.
        best_step: The step of that evaluation.
        rewards: Of the held-out rows at the last evaluation, or else of the rows of the last step; None if the run
            does not compare answers.
        tokens_per_second: The mean over all steps, as in the result of a run.
        step_seconds: The median of the first steps, as in the result of a run.
        predicted_step_seconds: The prediction of `step_seconds`.
        peak_allocated_bytes: The peak of tensors on the GPU, as far as it was reported.
        peak_reserved_bytes: The peak of PyTorch's allocator.
        peak_host_bytes: The largest resident set of the process.
        predicted_allocated_bytes: The prediction of `peak_allocated_bytes`.
        predicted_reserved_bytes: The prediction of `peak_reserved_bytes`.
        predicted_process_bytes: The prediction for the process, with the CUDA context.
        gpu: The GPU of the prediction.
        started: When the run started, in ISO 8601.
        duration_seconds: The duration of training, with all resumptions.
        model: The base, as given.
        dataset: The data sets, as given.
        rank: The rank of the adapter.
        checkpoints: The existing checkpoints, oldest first.
        num_resumes: How often training was resumed from a checkpoint.
        num_skipped_steps: The number of steps that were skipped because they were not finite.
        error: Why the run failed.
        problems: What could not be read in the directory, as sentences.
    """

    name: str
    path: Path
    state: State
    step: int
    num_steps: int | None
    loss: float | None
    best_loss: float | None
    best_step: int | None
    rewards: Rewards | None
    tokens_per_second: float | None
    step_seconds: float | None
    predicted_step_seconds: float | None
    peak_allocated_bytes: int | None
    peak_reserved_bytes: int | None
    peak_host_bytes: int | None
    predicted_allocated_bytes: int | None
    predicted_reserved_bytes: int | None
    predicted_process_bytes: int | None
    gpu: str | None
    started: str | None
    duration_seconds: float
    model: str | None
    dataset: tuple[str, ...]
    rank: int | None
    checkpoints: tuple[Path, ...]
    num_resumes: int
    num_skipped_steps: int
    error: str | None
    problems: tuple[str, ...]

    @property
    def sentence(self) -> str:
        """How far the run is, or got."""
        of = f" of {self.num_steps:,}" if self.num_steps else ""
        steps = f"{self.step:,} of {counted(self.num_steps, 'step')}" if self.num_steps else counted(self.step, "step")
        when = f"after step {self.step:,}{of}" if self.step else "before the first step"
        return {
            "running": f"Running, {when}",
            "done": f"Done, {steps}",
            "interrupted": f"Interrupted {when}",
            "failed": f"Failed {when}",
            "killed": f"Killed {when}",
        }[self.state]


def summarize(
    directory: Path, record: RunRecord, history: RunHistory, *, problem: str | None = None, now: datetime | None = None
) -> RunSummary:
    """Return the summary of the run in `directory`; `problem` says why its history could not be read."""
    path = directory.absolute()
    steps, best, rehearsal, start = history.steps, history.best, history.rehearsal, history.start
    result, predicted = record.result or RecordedResult(), record.plan.predicted_memory or RecordedPrediction()
    peak = result.peak_memory or RecordedPeak()
    state = state_of(directory, record, history, now or datetime.now(UTC))
    return RunSummary(
        name=path.name or str(path),
        path=directory,
        state=state,
        step=max(history.last_step, result.steps or 0),
        num_steps=history.num_steps or record.plan.num_steps,
        loss=_finite(steps.loss[-1]) if len(steps) else None,
        best_loss=best.loss if best else None,
        best_step=best.step if best else None,
        rewards=history.evaluations[-1].rewards if history.evaluations else history.rewards,
        tokens_per_second=_speed(steps),
        step_seconds=result.step_seconds,
        predicted_step_seconds=record.plan.predicted_time.step_seconds if record.plan.predicted_time else None,
        peak_allocated_bytes=_peak(
            peak.device_allocated_bytes,
            rehearsal.device_allocated_bytes if rehearsal else None,
            steps.device_allocated_bytes,
        ),
        peak_reserved_bytes=_peak(
            peak.device_reserved_bytes,
            rehearsal.device_reserved_bytes if rehearsal else None,
            steps.device_reserved_bytes,
        ),
        peak_host_bytes=_peak(peak.host_bytes, None, steps.host_bytes),
        predicted_allocated_bytes=predicted.allocated_bytes or (start.predicted_allocated_bytes if start else None),
        predicted_reserved_bytes=predicted.reserved_bytes or (start.predicted_reserved_bytes if start else None),
        predicted_process_bytes=predicted.process_bytes,
        gpu=predicted.gpu or as_name(record.hardware.get("gpu")),
        started=_started(record, history),
        duration_seconds=history.active_seconds,
        model=as_name(record.setting("model.name")) or record.plan.model,
        dataset=_names(record.setting("data.dataset")),
        rank=_whole(record.setting("lora.rank")),
        checkpoints=tuple(list_checkpoints(RunDirectory(directory).checkpoints)),
        num_resumes=len(history.resumes),
        num_skipped_steps=len(history.skipped),
        error=record.error if state == "failed" else None,
        problems=tuple(_problems(record, history, problem)),
    )


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def state_of(directory: Path, record: RunRecord, history: RunHistory, now: datetime) -> State:
    """Return how a run ended, or whether it is still running."""
    if ended := ENDED.get(record.status or ""):
        return ended
    if record.status != "running" and history.end is not None:
        return "done" if history.end.interrupted_by is None else "interrupted"
    return "running" if _is_running(directory, record, history, now) else "killed"


def _is_running(directory: Path, record: RunRecord, history: RunHistory, now: datetime) -> bool:
    """Return whether the process of a run exists; on another host, whether it has written lately."""
    pid = record.pid
    if pid is not None and record.host == socket.gethostname():
        return _is_alive(pid, _written_at(directory / RUN_FILE))
    last = history.last_event or parse_time(record.started)
    return last is not None and (now - last).total_seconds() < QUIET_SECONDS


def _is_alive(pid: int, recorded_at: float) -> bool:
    """Return whether a process is the one that recorded its pid at `recorded_at`, because pids are reused."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= recorded_at + 1
    except (psutil.Error, ValueError, OverflowError):
        return False


def _written_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return math.inf


def _started(record: RunRecord, history: RunHistory) -> str | None:
    """Return when the run first started: the record of a resumed one is newer."""
    times = [time for time in (parse_time(record.started), history.started) if time]
    return min(times).isoformat(timespec="seconds") if times else None


def _speed(steps: StepColumns) -> float | None:
    """Return the tokens per second over all steps; steps of unknown tokens or duration are left out."""
    tokens = seconds = before = 0.0
    for num_tokens, speed in zip(steps.num_tokens, steps.tokens_per_second, strict=True):
        if num_tokens > before and 0 < speed < math.inf:
            tokens += num_tokens - before
            seconds += (num_tokens - before) / speed
        before = max(before, num_tokens)
    return tokens / seconds if seconds else None


def _peak(recorded: int | None, rehearsed: int | None, reported: Iterable[float]) -> int | None:
    """Return the largest figure; the record has only the peak of the process that ended the run."""
    figures = [figure for figure in (recorded, rehearsed) if figure is not None]
    figures.append(int(max((figure for figure in reported if math.isfinite(figure)), default=0)))
    return max(figures) or None


def _names(value: object) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list) else (value,) if isinstance(value, str) else ()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _problems(record: RunRecord, history: RunHistory, problem: str | None) -> Iterable[str]:
    yield from record.problems
    if problem:
        yield problem
    if history.num_damaged_lines:
        yield f"{counted(history.num_damaged_lines, 'line')} of {METRICS_FILE} could not be read"
