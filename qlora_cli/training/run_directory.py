"""The run directory: everything that later commands need, nothing that they must ask for. Imports no torch.

run.json         settings with their origin, versions, hardware, data fingerprint, plan and result
metrics.jsonl    one line an event
report.html      all of it, to look at
checkpoints/     step-…/, complete or absent
skipped_rows.jsonl  rows that could not be used, if they were to be skipped
adapter/         PEFT adapter, tokenizer, chat template
"""

import dataclasses
import json
import os
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from qlora_cli.errors import OutputDirectoryError
from qlora_cli.events import (
    BytesDone,
    CheckpointSaved,
    EvalDone,
    EvalStarted,
    Event,
    Noted,
    PhaseStarted,
    Rehearsed,
    SampleDone,
    StepDone,
    StepSkipped,
    TrainingEnded,
    TrainingResumed,
    TrainingStarted,
)
from qlora_cli.files import as_json, write_file

EVENT_NAMES: dict[type[Event], str] = {
    PhaseStarted: "phase_started",
    BytesDone: "bytes_done",
    Noted: "noted",
    TrainingStarted: "training_started",
    TrainingResumed: "training_resumed",
    Rehearsed: "rehearsed",
    StepSkipped: "step_skipped",
    StepDone: "step_done",
    EvalStarted: "eval_started",
    EvalDone: "eval_done",
    SampleDone: "sample_done",
    CheckpointSaved: "checkpoint_saved",
    TrainingEnded: "training_ended",
}


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """Paths in a run directory, and the writing of whole files and folders: complete or absent."""

    path: Path

    @property
    def run_file(self) -> Path:
        """`run.json`."""
        return self.path / "run.json"

    @property
    def metrics_file(self) -> Path:
        """`metrics.jsonl`."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The folder of the trained adapter."""
        return self.path / "adapter"

    @property
    def request_file(self) -> Path:
        """A file that asks for a checkpoint by being there."""
        return self.path / "checkpoint-now"

    def create(self) -> None:
        """Make the directory and the folder of checkpoints."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)

    def write_run_file(self, content: Mapping[str, Any]) -> None:
        """Replace `run.json` in one move."""
        write_file(self.run_file, json.dumps(as_json(content), indent=2) + "\n")

    def read_run_file(self) -> dict[str, Any] | None:
        """Return what `run.json` holds; None if it is not there, or no object."""
        try:
            found = json.loads(self.run_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def keep_skipped_rows(self, lists: Collection[Path]) -> None:
        """Write the rows that could not be used into `skipped_rows.jsonl`, if there are any."""
        if lists:
            with (self.path / "skipped_rows.jsonl").open("wb") as file:
                for path in lists:
                    file.write(path.read_bytes())


# What a run may have written when it was killed before its first `run.json`; the last two if it goes on from another.
BEGINNINGS = {"run.lock", ".run.json.saving", ".metrics.jsonl.saving"}
TAKEN_OVER = {"checkpoints", "metrics.jsonl"}


def only_began(directory: Path, *, takes_over: bool) -> bool:
    """Whether a directory holds no more than what a run makes first; `takes_over`: one that goes on from another."""
    allowed = BEGINNINGS | TAKEN_OVER if takes_over else BEGINNINGS
    return {path.name for path in directory.iterdir()} <= allowed


class RunLock:
    """Held while a process writes to a run directory, so that no second one does; freed with the process."""

    def __init__(self, directory: RunDirectory) -> None:
        self._path = directory.path
        self._lock = FileLock(directory.path / "run.lock")

    def __enter__(self) -> "RunLock":
        """Take it.

        Raises:
            OutputDirectoryError: another process has it.
        """
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise OutputDirectoryError(
                f"another process is training into {self._path}",
                hint="Wait for it, stop it, or choose another --output.",
            ) from None
        except (OSError, NotImplementedError) as error:
            reason = getattr(error, "strerror", None) or "its disk has no locks"
            raise OutputDirectoryError(
                f"{self._path} can't be written to: {reason}", hint="Choose another --output."
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()


class MetricsWriter:
    """A reporter that appends each event to `metrics.jsonl` as one line."""

    def __init__(self, directory: RunDirectory) -> None:
        self._file = directory.metrics_file

    def report(self, event: Event) -> None:
        """Append `event`; opened anew each time, so that a line is on its way to disk when this returns."""
        line = {
            "event": EVENT_NAMES[type(event)],
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            **as_json(dataclasses.asdict(event)),
        }
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def end_cut_line(self) -> None:
        """End a line that a killed process left unfinished, so that the next one stands alone."""
        if not self._file.is_file() or self._file.stat().st_size == 0:
            return
        with self._file.open("rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
