"""What can be known to be wrong before torch is imported: names, files, the output directory."""

import importlib.util
import os
import shutil
from pathlib import Path

from qlora_cli.data.sources import check_dataset_name
from qlora_cli.errors import DiskSpaceError, OutputDirectoryError, Problem, QloraError, SettingsError
from qlora_cli.loading.source import check_model_name
from qlora_cli.settings.models import ReportTo, TrainSettings
from qlora_cli.settings.resolve import Resolved
from qlora_cli.units import format_bytes


def check_train_inputs(resolved: Resolved[TrainSettings]) -> None:
    """Check names, files and the output directory of a run, all at once.

    Raises:
        SettingsError: with every problem found.
    """
    settings = resolved.settings
    found = {
        "model.name": check_model_name(settings.model),
        "data.dataset": check_dataset_name(settings.data.dataset),
        "output.directory": check_output_directory(settings.output.directory),
        "output.report_to": _check_tracker(settings.output.report_to),
    }
    if settings.data.eval_dataset is not None:
        found["data.eval_dataset"] = check_dataset_name(settings.data.eval_dataset)
    problems = [
        Problem(where=resolved.origin_of(path).where, message=error.message, hint=error.hint)
        for path, error in found.items()
        if error is not None
    ]
    problems += _splits_without_effect(resolved)
    if problems:
        raise SettingsError(problems)


def _splits_without_effect(resolved: Resolved[TrainSettings]) -> list[Problem]:
    data = resolved.settings.data
    return [
        Problem(
            where=resolved.origin_of(path).where,
            message=f"{path} has no effect on {name}, which is on this disk: only hub data sets have splits",
            hint="Leave it out.",
        )
        for path, name in (("data.split", data.dataset), ("data.eval_split", data.eval_dataset))
        if path in resolved.origins and name is not None and Path(name).expanduser().exists()
    ]


def check_output_directory(directory: Path) -> QloraError | None:
    """Return why a run can't be written to `directory`: it is not empty, or can't be made."""
    if directory.is_dir():
        held = sorted(path.name for path in directory.iterdir())
        if "run.json" in held:
            return OutputDirectoryError(
                f"{directory} already holds a run", hint="Choose another --output, or delete that one."
            )
        if held:
            return OutputDirectoryError(
                f"{directory} holds something else ({', '.join(held[:3])})",
                hint="Choose an --output that is empty or does not exist.",
            )
    elif directory.exists():
        return OutputDirectoryError(f"{directory} is a file", hint="Choose another --output.")
    parent = existing_parent(directory)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        return OutputDirectoryError(f"{parent} can't be written to", hint="Choose another --output.")
    return None


def check_disk_space(directory: Path, needed_bytes: int) -> None:
    """Check that `needed_bytes` fit on the disk that `directory` is or will be on.

    Raises:
        DiskSpaceError: they do not.
    """
    free = shutil.disk_usage(existing_parent(directory)).free
    if free < needed_bytes:
        raise DiskSpaceError(
            f"the run would write up to {format_bytes(needed_bytes)} to {directory}, "
            f"but only {format_bytes(free)} are free",
            hint="Free room, choose another --output, or lower output.max_checkpoints or --rank.",
        )


def existing_parent(path: Path) -> Path:
    """Return `path` or its nearest ancestor that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _check_tracker(report_to: ReportTo) -> QloraError | None:
    if report_to == ReportTo.NONE or importlib.util.find_spec(report_to.value) is not None:
        return None
    name = report_to.value
    return QloraError(f"{name} is not installed", hint=f"Run: pip install 'qlora-cli[{name}]'")
