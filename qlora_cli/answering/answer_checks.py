"""Check a merged model that was named for a comparison, before torch is imported."""

from pathlib import Path

from qlora_cli.errors import ModelError, QloraError
from qlora_cli.model_files.adapter_files import ADAPTER_CONFIG
from qlora_cli.model_files.given_model import check_model_name, looks_local
from qlora_cli.runs.directory import RunDirectory
from qlora_cli.settings.models import ModelSettings


def check_merged(directory: Path) -> QloraError | None:
    """Return what is wrong with a named merged model, as far as can be checked at once."""
    if not directory.is_dir() or not looks_local(str(directory)):
        return ModelError(f"{directory} is no directory", hint="Merge first: qlora merge RUN")
    if RunDirectory(directory).is_run or (directory / ADAPTER_CONFIG).is_file():
        return ModelError(
            f"{directory} is an adapter or a run, not a merged model",
            hint="Name the directory that the merged model was written to.",
        )
    return check_model_name(ModelSettings(name=str(directory.absolute())))
