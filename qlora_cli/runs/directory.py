"""The run directory: everything that later commands need. All names in it are defined here.

run.json         settings with their origin, versions, hardware, data fingerprint, plan and result
metrics.jsonl    one event per line
report.html      a report of the run, as a page
held_out_losses.json  the loss of each held-out row, once it was compared
checkpoints/     step-…/, complete or absent
skipped_rows.jsonl  rows that could not be used, if such rows are skipped
adapter/         PEFT adapter, tokenizer, chat template
base/            the calibrated base, if the run made one
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
from qlora_cli.writing import (
    PRIVATE_FILE,
    clear_leftover,
    clear_leftovers,
    clear_unfinished_files,
    delete,
    discard,
    is_leftover,
    move_aside,
    unsafe_reason,
    write_file,
)

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
REPORT_FILE = "report.html"
LOSSES_FILE = "held_out_losses.json"
CHECKPOINTS = "checkpoints"
ADAPTER = "adapter"
BASE = "base"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS, ADAPTER_PICKLE = "adapter_model.safetensors", "adapter_model.bin"
MERGED = "merged"
SKIPPED_ROWS, SKIPPED_ROWS_OF_STREAM = "skipped_rows.jsonl", "skipped_rows_of_stream.jsonl"
LOCK_FILE = "run.lock"
STEP_PREFIX = "step-"  # of a checkpoint's name
CHECKSUMS_FILE = "checksums.json"  # in a checkpoint
EVENT_PREFIX = b'{"event": "'  # of a line in the metrics file
TRACKED = ("tensorboard", "trackio", "wandb")  # the folders of trackers
TRACKED_FILE = "mlflow.db"


@dataclass(frozen=True)
class RunDirectory:
    """The paths in a run directory."""

    path: Path

    @property
    def run_file(self) -> Path:
        """The record of the run."""
        return self.path / RUN_FILE

    @property
    def base(self) -> Path:
        """The base that the run made for itself, if it did."""
        return self.path / BASE

    @property
    def metrics_file(self) -> Path:
        """The events of the run."""
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
        """The report page."""
        return self.path / REPORT_FILE

    @property
    def losses_file(self) -> Path:
        """The loss of each held-out row by the final weights."""
        return self.path / LOSSES_FILE

    @property
    def request_file(self) -> Path:
        """A file whose existence requests a checkpoint."""
        return self.path / "checkpoint-now"

    @property
    def skipped_rows_of_stream(self) -> Path:
        """The rows of a stream that could not be used."""
        return self.path / SKIPPED_ROWS_OF_STREAM

    @property
    def is_run(self) -> bool:
        """Whether the directory contains the record of a run."""
        return self.run_file.is_file()

    def create(self) -> None:
        """Create the directory and the folder of checkpoints."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)

    @property
    def unwritable(self) -> tuple[Path, str] | None:
        """The first file or folder that a run must not write into, with the reason; None if there is none."""
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
        """Whether the folder of the trained adapter contains weights, with or without a config."""
        return any((self.adapter / name).is_file() for name in (ADAPTER_WEIGHTS, ADAPTER_PICKLE))

    @property
    def has_adapter(self) -> bool:
        """Whether the trained adapter exists: its config and its weights."""
        return self.holds_adapter_weights and (self.adapter / ADAPTER_CONFIG).is_file()

    def clear_leftovers(self) -> None:
        """Delete what killed processes left half written or half deleted; the caller holds the run's lock.

        A base may be calibrated without the lock, so of that only what dead processes left is deleted; what a merge
        left is for the next merge.
        """
        clear_unfinished_files(self.path)
        clear_leftovers(self.path, BASE)
        staged = [*self.path.glob(f".{ADAPTER}.*.saving")]
        if not self.checkpoints.is_symlink():
            staged += self.checkpoints.glob(".*.saving")
        for leftover in staged:
            clear_leftover(leftover)

    def remove_adapter(self, known: Sequence[Checksums]) -> Path | None:
        """Delete the adapter of an earlier end before the run is resumed.

        If it contains anything but files with `known` checksums, it is moved aside, and its new path is returned.
        """
        if self.adapter.is_symlink():
            delete(self.adapter)
        elif self.adapter.is_dir():
            if find_foreign_content(self.adapter, known) is not None:
                return move_aside(self.adapter, f"{ADAPTER}-kept")
            discard(self.adapter)  # an adapter is complete or absent
        return None

    def write_skipped_rows(self, files: Collection[Path]) -> None:
        """Concatenate `files` of rows that could not be used into `skipped_rows.jsonl`, if there are any."""
        if files:
            content = b"".join(path.read_bytes() for path in files)
            write_file(self.path / SKIPPED_ROWS, content, mode=PRIVATE_FILE)


def enclosing_run(part: Path) -> RunDirectory | None:
    """Return the run that contains an adapter or a checkpoint; None if no run does."""
    candidates = {ADAPTER: part.parent, CHECKPOINTS: part.parent.parent}
    directory = candidates.get(part.name) or candidates.get(part.parent.name)
    return RunDirectory(directory) if directory is not None and RunDirectory(directory).is_run else None


def check_free_directory(directory: Path, flag: str = "--output") -> QloraError | None:
    """Return why nothing can be written to `directory`, given by `flag`; a run is never overwritten."""
    if (problem := path_problem(directory, flag)) is not None:
        return problem
    if RunDirectory(directory).is_run:
        hint = f"Choose another {flag}, or delete that one."
        return OutputDirectoryError(f"{directory} already holds a run", hint=hint)
    return check_output_directory(directory, flag)


# What a run may have written if it was killed before its first record.
STARTUP_FILES = {LOCK_FILE, BASE}
TEMPORARY = re.compile(rf"\.({re.escape(RUN_FILE)}|{re.escape(METRICS_FILE)})\.[0-9a-f]+\.saving")


def has_only_startup_files(directory: Path, *, is_copying: bool) -> bool:
    """Return whether a directory contains only what a run writes before its first record.

    `is_copying` allows for what a run that resumes another one copies from it.
    """
    return all(
        path.name in STARTUP_FILES or TEMPORARY.fullmatch(path.name) or (is_copying and _was_copied(path))
        for path in directory.iterdir()
    )


def _was_copied(path: Path) -> bool:
    """Return whether a run copied this from another one: checkpoints with their checksums, or lines of events."""
    if path.name == CHECKPOINTS and path.is_dir() and not path.is_symlink():
        return all(
            is_leftover(folder) or (folder.name.startswith(STEP_PREFIX) and (folder / CHECKSUMS_FILE).is_file())
            for folder in path.iterdir()
        )
    if path.name != METRICS_FILE or unsafe_reason(path) is not None:
        return False
    with path.open("rb") as file:
        return file.read(len(EVENT_PREFIX)) in (EVENT_PREFIX, b"")


def clear_startup_files(directory: Path, existing: Collection[str], created: Sequence[Path]) -> None:
    """Delete what a run wrote before it failed to write its first record, and the folders `created` for it.

    Names that were `existing` in the directory before are left alone.
    """
    if not directory.is_dir() or not has_only_startup_files(directory, is_copying=True):
        return
    for path in directory.iterdir():
        if path.name not in existing:
            delete(path)
    for folder in created:
        with suppress(OSError):  # no longer empty
            folder.rmdir()


class RunLock:
    """The lock of a run directory, so that only one process writes to it; it is released when the process ends."""

    def __init__(self, directory: RunDirectory) -> None:
        self._path = directory.path
        self._lock = FileLock(directory.path / LOCK_FILE)

    def __enter__(self) -> "RunLock":
        """Acquire the lock.

        Raises:
            OutputDirectoryError: another process holds it.
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
