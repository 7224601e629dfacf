"""The checkpoints of a run: complete or absent, sealed with checksums, the oldest deleted. Imports no torch."""

import json
import os
import re
import shutil
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from qlora_cli.errors import TrainingError
from qlora_cli.files import read_small
from qlora_cli.runs.checksums import Checksums, checksums_of, find_foreign_content, is_as_written
from qlora_cli.runs.directory import CHECKSUMS_FILE as CHECKSUMS_FILE
from qlora_cli.runs.directory import STEP_PREFIX
from qlora_cli.units import format_bytes
from qlora_cli.writing import clear_leftover, discard, flush, move_aside, publish_directory, staging

TRAINER_STATE = "trainer_state.json"
STEP = re.compile(rf"{re.escape(STEP_PREFIX)}[0-9]{{1,18}}")  # no run has a step with more digits


def step_of(checkpoint: Path) -> int:
    """Return the step that a checkpoint was written after."""
    return int(checkpoint.name.removeprefix(STEP_PREFIX))


def checkpoint_of(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint of a step in a folder, whether it exists or not."""
    return folder / f"{STEP_PREFIX}{step}"


def seal(folder: Path) -> None:
    """Write the size and SHA-256 of each file of a checkpoint into it."""
    (folder / CHECKSUMS_FILE).write_text(json.dumps(checksums_of(folder), indent=2) + "\n", encoding="utf-8")


def damage_of(checkpoint: Path) -> str | None:
    """Return how a checkpoint is damaged; None if all files are as they were written."""
    try:
        sums = checkpoint / CHECKSUMS_FILE
        if sums.exists() and not sums.is_file():
            return f"{CHECKSUMS_FILE} is no file"
        files = json.loads(read_small(sums))
        for name, expected in files.items():
            path = checkpoint / name
            if not path.resolve().is_relative_to(checkpoint.resolve()):
                return f"{CHECKSUMS_FILE} names {name}, which is elsewhere"
            if path.exists() and not path.is_file():
                return f"{name} is no file"
            if not is_as_written(path, expected):
                return f"{name} is not as it was written"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:  # the last: a link loop
        return f"{CHECKSUMS_FILE} can't be read ({error})"
    if TRAINER_STATE not in files:
        return f"{TRAINER_STATE} is missing"
    # Files without a checksum may be read too, and reading a pipe would block.
    irregular = next((path for path in sorted(checkpoint.rglob("*")) if not (path.is_file() or path.is_dir())), None)
    return None if irregular is None else f"{irregular.relative_to(checkpoint)} is no file"


def read_checksums(checkpoint: Path) -> Checksums:
    """Return the checksums of a checkpoint; empty if they can't be read."""
    try:
        sums = json.loads(read_small(checkpoint / CHECKSUMS_FILE))
    except (OSError, ValueError, RecursionError):
        return {}
    return sums if isinstance(sums, dict) else {}


def reason_to_keep(checkpoint: Path, *, reads: bool = True) -> str | None:
    """Return why a checkpoint must not be deleted; None if it contains exactly what a run wrote.

    With `reads`, the content of its files is checked, otherwise only their names.
    """
    if checkpoint.is_symlink():
        return "it is a link"
    if not (sums := read_checksums(checkpoint)):
        return f"it has no {CHECKSUMS_FILE} that can be read"
    return find_foreign_content(checkpoint, [sums], but=CHECKSUMS_FILE, reads=reads)


@dataclass(frozen=True)
class PublishedCheckpoint:
    """A checkpoint that was moved into place.

    Attributes:
        path: Where it is.
        not_deleted: Checkpoints that were not deleted because they contain more than a run wrote, with the reasons.
    """

    path: Path
    not_deleted: dict[Path, str]


@dataclass(frozen=True)
class CheckpointStore:
    """The folder of a run's checkpoints, of which the newest `num_kept` and the best one are kept.

    `needed_bytes` is the size of a checkpoint. `journal` is flushed before each is published, so that after a power
    failure it lacks no step that a checkpoint has.
    """

    folder: Path
    num_kept: int
    needed_bytes: int
    journal: Path

    def all(self) -> list[Path]:
        """Return the checkpoints, oldest first."""
        return list_checkpoints(self.folder)

    def path_of(self, step: int) -> Path:
        """Return the path of the checkpoint of a step, whether it exists or not."""
        return checkpoint_of(self.folder, step)

    def staging(self, step: int) -> AbstractContextManager[Path]:
        """Yield a folder to write the checkpoint of a step into, before it is published."""
        return staging(self.path_of(step))

    def clear_leftovers(self) -> None:
        """Delete folders that a killed process left half written or half deleted; the caller holds the run's lock."""
        for leftover in self.folder.glob(".*.saving"):
            clear_leftover(leftover)

    def move_damaged_aside(self, step: int) -> list[Path]:
        """Rename the damaged checkpoints after `step`, so that they do not count as newer ones."""
        newer = [checkpoint for checkpoint in self.all() if step_of(checkpoint) > step]
        return [move_aside(checkpoint, f".damaged-{checkpoint.name}") for checkpoint in newer]

    def check_free_space(self) -> None:
        """Check that another checkpoint fits on the disk, before it is written.

        Raises:
            TrainingError: it does not.
        """
        free = shutil.disk_usage(self.folder).free
        if free < self.needed_bytes:
            raise TrainingError(
                f"not enough free space for a checkpoint: it takes up to {format_bytes(self.needed_bytes)}, and "
                f"{format_bytes(free)} are free on the disk of {self.folder}",
                hint="Free disk space and give the same command again: it resumes from the last checkpoint.",
            )

    def publish(self, finished: Path, step: int, best_step: int | None) -> PublishedCheckpoint:
        """Seal a finished checkpoint, flush it to disk, move it into place, and delete those beyond the limit.

        A folder that contains anything but a checkpoint is never deleted.
        """
        seal(finished)
        if self.journal.exists():
            flush(self.journal)
        target, moved = self.path_of(step), self.free_path(step)
        publish_directory(finished, target)
        return PublishedCheckpoint(path=target, not_deleted={**moved, **self.delete_old(step, best_step)})

    def delete_old(self, step: int, best_step: int | None) -> dict[Path, str]:
        """Delete the checkpoints beyond the limit, never that of `step`; return those that stay, and why."""
        checkpoints = self.all()
        foreign = {path: reason for path in checkpoints if (reason := reason_to_keep(path, reads=False))}
        old = [path for path in checkpoints if path not in foreign]
        old = [path for path in self._beyond_limit(old, best_step) if path != self.path_of(step)]
        foreign |= {path: reason for path in old if (reason := reason_to_keep(path))}
        for path in old:
            if path not in foreign:
                discard(path)
        return {path: foreign[path] for path in self._beyond_limit(checkpoints, best_step) if path in foreign}

    def free_path(self, step: int) -> dict[Path, str]:
        """Move aside what is at a checkpoint's path and must not be deleted; return its new path and the reason."""
        target = self.path_of(step)
        reason = reason_to_keep(target) if os.path.lexists(target) else None
        return {} if reason is None else {move_aside(target, f".kept-{target.name}"): reason}

    def _beyond_limit(self, checkpoints: list[Path], best_step: int | None) -> list[Path]:
        return beyond_limit(checkpoints, self.num_kept, best_step)


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, oldest first."""
    return sorted(filter(is_checkpoint_name, folder.glob(f"{STEP_PREFIX}*")), key=step_of)


def is_checkpoint_name(path: Path) -> bool:
    """Return whether a path has the name of a checkpoint."""
    return STEP.fullmatch(path.name) is not None


def beyond_limit(checkpoints: list[Path], num_kept: int, best_step: int | None) -> list[Path]:
    """Return the checkpoints to delete: all but the newest `num_kept` and the best."""
    return [path for path in checkpoints[:-num_kept] if step_of(path) != best_step]
