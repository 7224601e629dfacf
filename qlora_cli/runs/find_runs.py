"""Find the runs below a directory, and read a whole run."""

import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from qlora_cli.runs.directory import METRICS_FILE, RUN_FILE
from qlora_cli.runs.history import RunHistory, empty_history, parse_time, read_history
from qlora_cli.runs.record import RunRecord, read_record
from qlora_cli.runs.summary import RunSummary, summarize

UNKNOWN = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True)
class Run:
    """A run as read from its directory."""

    summary: RunSummary
    history: RunHistory
    record: RunRecord


def read_run(directory: Path, *, now: datetime | None = None) -> Run:
    """Return the run in `directory`; unreadable parts are listed in the problems of its summary."""
    record, problem = read_record(directory), None
    try:
        history = read_history(directory)
    except OSError as error:
        history, problem = empty_history(), f"{METRICS_FILE} can't be read: {error.strerror}"
    return Run(summarize(directory, record, history, problem=problem, now=now), history, record)


def is_run(directory: Path) -> bool:
    """Return whether a directory contains a run."""
    return any((directory / name).is_file() for name in (RUN_FILE, METRICS_FILE))


def find_runs(directory: Path) -> list[RunSummary]:
    """Return the runs in `directory`, which may be one itself, in the order of their start.

    Links are not followed, and runs are not searched for others.
    """
    summaries = []
    for folder, below, files in os.walk(directory):
        if RUN_FILE in files or METRICS_FILE in files:
            summaries.append(read_run(Path(folder)).summary)
            below.clear()
    return sorted(summaries, key=lambda run: (parse_time(run.started) or UNKNOWN, str(run.path)))
