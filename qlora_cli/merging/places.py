"""Where the result of a merge goes, and what it is called. Imports no torch."""

from pathlib import Path

from qlora_cli.errors import OutputDirectoryError, QloraError
from qlora_cli.model_files.given_model import looks_local
from qlora_cli.runs.directory import MERGED, RunDirectory, check_free_directory
from qlora_cli.settings.models import MergeCommandSettings


def output_of(request: MergeCommandSettings) -> Path:
    """Return where the result goes: of a run into its directory, of an adapter into the working directory."""
    if request.merge.output is not None:
        return request.merge.output
    name = request.merge.adapters[0]
    if looks_local(name):
        path = Path(name).expanduser()
        return RunDirectory(path).merged if RunDirectory(path).is_run else Path(f"{path.resolve().name}-merged")
    return Path(f"{name.rpartition('/')[2]}-merged")


def output_problem(request: MergeCommandSettings) -> QloraError | None:
    """Return why nothing can be written where the result goes; a link there is followed only if it was named."""
    output = output_of(request)
    if request.merge.output is None and output.is_symlink():
        return OutputDirectoryError(
            f"{output} is a link, and is not followed unless it is named",
            hint="Name the directory to write to with --output, or remove the link.",
        )
    return check_free_directory(output)


def name_of(output: Path) -> str:
    """Return what a result in `output` is called, in its card and as a file: of `merged` in a run, as the run is."""
    path = output.expanduser().resolve()
    return f"{path.parent.name}-{path.name}" if path.name == MERGED else path.name
