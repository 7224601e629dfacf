"""The run directory: everything that later commands need, nothing that they must ask for. Every name in it is here.

run.json         settings with their origin, versions, hardware, data fingerprint, plan and result
metrics.jsonl    one line an event
report.html      all of it, to look at
checkpoints/     step-…/, complete or absent
skipped_rows.jsonl  rows that could not be used, if they were to be skipped
adapter/         PEFT adapter, tokenizer, chat template
merged/          what `qlora merge` writes by default
"""

import os
import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from qlora_cli.errors import OutputDirectoryError, QloraError
from qlora_cli.files import check_output_directory, path_problem
from qlora_cli.runs.checksums import Checksums, find_foreign_content
from qlora_cli.writing import PRIVATE_FILE, delete, discard, is_leftover, move_aside, unsafe_reason, write_file

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
REPORT_FILE = "report.html"
CHECKPOINTS = "checkpoints"
ADAPTER = "adapter"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS, ADAPTER_PICKLE = "adapter_model.safetensors", "adapter_model.bin"
MERGED = "merged"
SKIPPED_ROWS, SKIPPED_ROWS_OF_STREAM = "skipped_rows.jsonl", "skipped_rows_of_stream.jsonl"
LOCK_FILE = "run.lock"
STEP_PREFIX = "step-"  # of a checkpoint
CHECKSUMS_FILE = "checksums.json"  # in it
EVENT_BEGINS = b'{"event": "'  # a line of events
TRACKED = ("tensorboard", "trackio", "wandb")  # what trackers write, each under its name
TRACKED_FILE = "mlflow.db"


@dataclass(frozen=True)
class RunDirectory:
    """The paths in a run directory."""

    path: Path

    @property
    def run_file(self) -> Path:
        """The record."""
        return self.path / RUN_FILE

    @property
    def metrics_file(self) -> Path:
        """The events."""
        return self.path / METRICS_FILE

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / CHECKPOINTS

    @property
    def adapter(self) -> Path:
        """The folder of the trained adapter."""
        return self.path / ADAPTER

    @property
    def merged(self) -> Path:
        """The folder of the merged model."""
        return self.path / MERGED

    @property
    def report_file(self) -> Path:
        """The page."""
        return self.path / REPORT_FILE

    @property
    def request_file(self) -> Path:
        """A file that asks for a checkpoint by being there."""
        return self.path / "checkpoint-now"

    @property
    def skipped_rows_of_stream(self) -> Path:
        """The rows of a stream that could not be used."""
        return self.path / SKIPPED_ROWS_OF_STREAM

    @property
    def is_run(self) -> bool:
        """Whether a run wrote its record here."""
        return self.run_file.is_file()

    def create(self) -> None:
        """Make the directory and the folder of checkpoints."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)

    @property
    def unwritable(self) -> tuple[Path, str] | None:
        """The first of its parts that a run writes in place, and must not, with the reason; None if there is none."""
        for name in (METRICS_FILE, LOCK_FILE, SKIPPED_ROWS_OF_STREAM, TRACKED_FILE):
            if os.path.lexists(self.path / name) and (reason := unsafe_reason(self.path / name)):
                return self.path / name, reason
        for name in (CHECKPOINTS, *TRACKED):
            if (self.path / name).is_symlink():
                return self.path / name, "is a link"
        if os.path.lexists(self.checkpoints) and not self.checkpoints.is_dir():
            return self.checkpoints, "is no folder"
        return None

    @property
    def holds_adapter_weights(self) -> bool:
        """Whether there are weights in the folder of the trained adapter, whatever else is there."""
        return any((self.adapter / name).is_file() for name in (ADAPTER_WEIGHTS, ADAPTER_PICKLE))

    @property
    def has_adapter(self) -> bool:
        """Whether the trained adapter is there: its config and its weights."""
        return self.holds_adapter_weights and (self.adapter / ADAPTER_CONFIG).is_file()

    def remove_adapter(self, known: Sequence[Checksums]) -> Path | None:
        """Delete the adapter of an earlier end before the run is resumed; its checkpoints stay.

        If it holds anything but files that a run wrote, by sums that are `known`, it is moved aside, and its place
        returned.
        """
        if self.adapter.is_symlink():
            delete(self.adapter)
        elif self.adapter.is_dir():
            if find_foreign_content(self.adapter, known) is not None:
                return move_aside(self.adapter, f"{ADAPTER}-kept")
            discard(self.adapter)  # an adapter is there whole, or not at all
        return None

    def write_skipped_rows(self, lists: Collection[Path]) -> None:
        """Write the rows that could not be used into `skipped_rows.jsonl`, if there are any."""
        if lists:
            content = b"".join(path.read_bytes() for path in lists)
            write_file(self.path / SKIPPED_ROWS, content, mode=PRIVATE_FILE)


def enclosing_run(part: Path) -> RunDirectory | None:
    """Return the run that a directory is a part of, as its adapter or one of its checkpoints; None if of none."""
    places = {ADAPTER: part.parent, CHECKPOINTS: part.parent.parent}
    place = places.get(part.name) or places.get(part.parent.name)
    return RunDirectory(place) if place is not None and RunDirectory(place).is_run else None


def check_free_directory(directory: Path, flag: str = "--output") -> QloraError | None:
    """Return why nothing can be written to `directory`, which `flag` names; a run is not written over."""
    if (problem := path_problem(directory, flag)) is not None:
        return problem
    if RunDirectory(directory).is_run:
        hint = f"Choose another {flag}, or delete that one."
        return OutputDirectoryError(f"{directory} already holds a run", hint=hint)
    return check_output_directory(directory, flag)


# What a run may have written when it was killed before its first record; the last two if it resumes another.
BEGINNINGS = {LOCK_FILE}
ASIDE = re.compile(rf"\.({re.escape(RUN_FILE)}|{re.escape(METRICS_FILE)})\.[0-9a-f]+\.saving")


def only_began(directory: Path, *, takes_over: bool) -> bool:
    """Return whether a directory holds only what a run makes first; `takes_over`: a run that resumes another one."""
    return all(
        path.name in BEGINNINGS or ASIDE.fullmatch(path.name) or (takes_over and _was_taken_over(path))
        for path in directory.iterdir()
    )


def _was_taken_over(path: Path) -> bool:
    """Return whether a run took this over from another: checkpoints, each with its sums, or lines of events."""
    if path.name == CHECKPOINTS and path.is_dir() and not path.is_symlink():
        return all(
            is_leftover(one) or (one.name.startswith(STEP_PREFIX) and (one / CHECKSUMS_FILE).is_file())
            for one in path.iterdir()
        )
    if path.name != METRICS_FILE or unsafe_reason(path) is not None:
        return False
    with path.open("rb") as file:
        return file.read(len(EVENT_BEGINS)) in (EVENT_BEGINS, b"")


def clear_beginning(directory: Path, held: Collection[str], made: Sequence[Path]) -> None:
    """Delete what a run made before it failed to write its first record, and those of the folders `made` for it.

    What the directory `held` before stays.
    """
    if not directory.is_dir() or not only_began(directory, takes_over=True):
        return
    for path in directory.iterdir():
        if path.name not in held:
            delete(path)
    for folder in made:
        with suppress(OSError):  # something else is in it by now
            folder.rmdir()


class RunLock:
    """Held while a process writes to a run directory, so that no second one does; freed with the process."""

    def __init__(self, directory: RunDirectory) -> None:
        self._path = directory.path
        self._lock = FileLock(directory.path / LOCK_FILE)

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
