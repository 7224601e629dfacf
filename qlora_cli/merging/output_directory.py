"""The directory and the name of a merge's result. Imports no torch."""

from pathlib import Path

from qlora_cli.errors import OutputDirectoryError, QloraError
from qlora_cli.model_files.given_model import looks_local
from qlora_cli.runs.directory import MERGED, RunDirectory, check_free_directory
from qlora_cli.settings.models import MergeCommandSettings


def output_path(request: MergeCommandSettings) -> Path:
    """Return the directory of the result: for a run inside its directory, for an adapter in the working directory."""
    if request.merge.output is not None:
        return request.merge.output
    name = request.merge.adapters[0]
    if looks_local(name):
        path = Path(name).expanduser()
        return RunDirectory(path).merged if RunDirectory(path).is_run else Path(f"{path.resolve().name}-merged")
    return Path(f"{name.rpartition('/')[2]}-merged")


def output_problem(request: MergeCommandSettings) -> QloraError | None:
    """Return why the result can't be written; a link is followed only if the user named it."""
    output = output_path(request)
    if request.merge.output is None and output.is_symlink():
        return OutputDirectoryError(
            f"{output} is a link, and is followed only if you name it",
            hint="Name the directory to write to with --output, or remove the link.",
        )
    return check_free_directory(output)


def result_name(output: Path) -> str:
    """Return the name of a result in `output`, for its card and files; for `merged` in a run, with the run's name."""
    path = output.expanduser().resolve()
    return f"{path.parent.name}-{path.name}" if path.name == MERGED else path.name
