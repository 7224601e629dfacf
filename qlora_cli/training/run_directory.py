"""The run directory: everything that later commands need, nothing that they must ask for.

run.json         settings with their origin, versions, hardware, data fingerprint, plan and result
metrics.jsonl    one line an event
checkpoints/     step-…/, complete or absent
skipped_rows.jsonl  rows that could not be used, if they were to be skipped
adapter/         PEFT adapter, tokenizer, chat template
"""

import dataclasses
import json
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qlora_cli.events import (
    BytesDone,
    CheckpointSaved,
    EvalDone,
    EvalStarted,
    Event,
    Noted,
    PhaseStarted,
    StepDone,
    TrainingEnded,
    TrainingStarted,
)
from qlora_cli.files import as_json

EVENT_NAMES: dict[type[Event], str] = {
    PhaseStarted: "phase_started",
    BytesDone: "bytes_done",
    Noted: "noted",
    TrainingStarted: "training_started",
    StepDone: "step_done",
    EvalStarted: "eval_started",
    EvalDone: "eval_done",
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

    def create(self) -> None:
        """Make the directory and the folder of checkpoints."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)

    def write_run_file(self, content: Mapping[str, Any]) -> None:
        """Replace `run.json` in one move."""
        temporary = self.run_file.with_suffix(".json.saving")
        temporary.write_text(json.dumps(as_json(content), indent=2) + "\n", encoding="utf-8")
        temporary.replace(self.run_file)

    def keep_skipped_rows(self, lists: Collection[Path]) -> None:
        """Write the rows that could not be used into `skipped_rows.jsonl`, if there are any."""
        if lists:
            with (self.path / "skipped_rows.jsonl").open("wb") as file:
                for path in lists:
                    file.write(path.read_bytes())

    def list_checkpoints(self) -> list[Path]:
        """Return the complete checkpoints, oldest first."""
        return sorted(self.checkpoints.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


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
