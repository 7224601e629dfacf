"""The directory and the name of a merge's result. Imports no torch."""

import os
from pathlib import Path

from qlora_cli.errors import OutputDirectoryError, QloraError
from qlora_cli.model_files.given_model import looks_local
from qlora_cli.model_files.merge_record import MERGE_FILE, read_merge_record
from qlora_cli.runs.directory import MERGED, RunDirectory, check_free_directory
from qlora_cli.settings.choices import ExportFormat
from qlora_cli.settings.models import MergeCommandSettings
from qlora_cli.writing import LEFTOVER


def output_path(request: MergeCommandSettings) -> Path:
    """Return the directory of the result: for a run inside its directory, for an adapter in the working directory."""
    if request.merge.output is not None:
        return request.merge.output
    name = request.merge.adapters[0]
    if looks_local(name):
        path = Path(name).expanduser()
        return RunDirectory(path).merged if RunDirectory(path).is_run else Path(f"{path.resolve().name}-merged")
    return Path(f"{name.rpartition('/')[2]}-merged")


def merged_directories(output: Path) -> tuple[Path, ...]:
    """Return the directories of an earlier merge in `output`: itself, or one for each format; none without one."""
    candidates = (output, *(output / name.value for name in ExportFormat))
    try:
        found = tuple(path for path in candidates if (path / MERGE_FILE).is_file())
    except OSError:  # such as a name that is too long, which checking the output reports
        return ()
    return found[:1] if output in found else found


def output_problem(request: MergeCommandSettings) -> QloraError | None:
    """Return why the result can't be written; whether an earlier merge there is the requested one is read later."""
    output = output_path(request)
    if not merged_directories(output):
        return free_output_problem(request)
    return _link_problem(request) or (_replacement_problem(output) if request.merge.overwrite else None)


def free_output_problem(request: MergeCommandSettings) -> QloraError | None:
    """Return why the result can't be written to a new or empty directory."""
    return _link_problem(request) or check_free_directory(output_path(request))


def names_to_replace(request: MergeCommandSettings) -> frozenset[str]:
    """Return the names in the output that `--overwrite` replaces."""
    output = output_path(request)
    if not (request.merge.overwrite and merged_directories(output)):
        return frozenset()
    return frozenset(path.name for path in output.iterdir() if path.name != LEFTOVER)


def sizes_of_files(directory: Path) -> dict[str, int]:
    """Return the size in bytes of every file of a result but its record, by its path in `directory`."""
    files = (path for path in sorted(directory.rglob("*")) if not path.is_dir() and path.name != MERGE_FILE)
    return {path.relative_to(directory).as_posix(): path.lstat().st_size for path in files}


def _replacement_problem(output: Path) -> QloraError | None:
    """Return why an earlier merge can't be replaced: only files that it wrote are deleted."""
    try:
        foreign = sorted(_files_of_others(output))
    except QloraError as error:
        return error
    if foreign:
        return OutputDirectoryError(
            f"{output} contains other files than the merge there wrote ({', '.join(foreign[:3])})",
            hint="Move them away, delete the directory, or choose another --output.",
        )
    if not os.access(output, os.W_OK | os.X_OK):
        return OutputDirectoryError(f"{output} can't be written to", hint="Choose another --output.")
    return None


def _files_of_others(output: Path) -> set[str]:
    held = {place: read_merge_record(place) for place in merged_directories(output)}
    ours = {place / name for place, record in held.items() if record for name in (*(record.files or ()), MERGE_FILE)}
    files = (path for path in output.rglob("*") if not path.is_dir() and path not in ours)
    return {name for path in files if not (name := path.relative_to(output).as_posix()).startswith(f"{LEFTOVER}/")}


def _link_problem(request: MergeCommandSettings) -> QloraError | None:
    """Return the error if the output is a link that the user has not named."""
    output = output_path(request)
    if request.merge.output is None and output.is_symlink():
        return OutputDirectoryError(
            f"{output} is a link, and is followed only if you name it",
            hint="Name the directory to write to with --output, or remove the link.",
        )
    return None


def result_name(output: Path) -> str:
    """Return the name of a result in `output`, for its card and files; for `merged` in a run, with the run's name."""
    path = output.expanduser().resolve()
    return f"{path.parent.name}-{path.name}" if path.name == MERGED else path.name
