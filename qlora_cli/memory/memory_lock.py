"""A predicted peak in a file, to be committed: a later prediction is compared with it, so that CI sees what moves it.

Imports no torch.
"""

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from qlora_cli import __version__
from qlora_cli.errors import UsageError
from qlora_cli.files import read_small
from qlora_cli.memory.prediction import MemoryReport
from qlora_cli.memory.report_parts import ChangedSetting, LockCheck
from qlora_cli.visible import public_name
from qlora_cli.writing import USUAL_FILE, write_file

CHECK = "inspect_memory.check"


class LockedPeak(BaseModel):
    """The bytes of a predicted peak: of the allocator, reserved from the GPU, and of the whole process."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    allocated_bytes: int
    reserved_bytes: int
    process_bytes: int


class MemoryLock(BaseModel):
    """What was predicted, for which model, GPU and settings, by the flags' names without dashes.

    A local model is named by the last part of its path: a checkout may lie anywhere.
    """

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, protected_namespaces=())

    written_by: str
    model: str
    gpu: str
    settings: dict[str, str]
    predicted: LockedPeak

    @classmethod
    def of(cls, report: MemoryReport) -> "MemoryLock":
        """Return the lock of a prediction."""
        peak = {name: getattr(report.predicted, name) for name in LockedPeak.model_fields}
        return cls(
            written_by=f"qlora {__version__}",
            model=public_name(report.model),
            gpu=report.gpu,
            settings=dict(report.settings),
            predicted=LockedPeak(**peak),
        )


def write_lock(report: MemoryReport, file: Path) -> None:
    """Write the lock of a prediction, in place of an earlier one.

    Raises:
        OSError: it can't be written.
    """
    write_file(file, json.dumps(MemoryLock.of(report).model_dump(), indent=2) + "\n", mode=USUAL_FILE)


def read_lock(file: Path) -> MemoryLock:
    """Return a lock.

    Raises:
        UsageError: there is none, or it is none.
    """
    again = f"Write it: the same command with --write-lock {file} in place of --check."
    if not file.is_file():
        raise UsageError(f"there is no {file}", hint=again, setting=CHECK)
    try:
        return MemoryLock.model_validate_json(read_small(file))
    except (OSError, ValueError, ValidationError):
        raise UsageError(f"{file} is no lock of a predicted peak", hint=again, setting=CHECK) from None


def compare(report: MemoryReport, lock: MemoryLock, file: Path, max_change: float) -> LockCheck:
    """Return how far the peak of the process is from that of `lock`, and whether that is more than `max_change`.

    Raises:
        UsageError: the lock is of another model or GPU.
    """
    for what, asked, locked in (("model", public_name(report.model), lock.model), ("GPU", report.gpu, lock.gpu)):
        if asked != locked:
            raise UsageError(
                f"{file} is of the {what} {locked}, and {asked} is asked for",
                hint=f"Name the same {what}, or write another lock with --write-lock FILE.",
                setting=CHECK,
            )
    before, now = lock.predicted.process_bytes, report.predicted.process_bytes
    change = now / before - 1 if before else float("inf")
    names = dict.fromkeys([*lock.settings, *report.settings])
    changed = [
        ChangedSetting(setting=name, before=lock.settings.get(name), now=report.settings.get(name)) for name in names
    ]
    return LockCheck(
        file=file,
        locked_bytes=before,
        predicted_bytes=now,
        change=change,
        max_change=max_change,
        passed=abs(change) <= max_change,
        written_by=lock.written_by,
        changed_settings=tuple(one for one in changed if one.before != one.now),
    )
