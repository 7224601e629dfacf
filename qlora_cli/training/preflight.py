"""What can be known to be wrong before torch is imported: names, files, the output directory."""

import importlib.util

from qlora_cli.data.preflight import data_problems
from qlora_cli.errors import Problem, QloraError, SettingsError
from qlora_cli.files import check_output_directory
from qlora_cli.loading.source import check_model_name
from qlora_cli.settings.models import ReportTo, TrainSettings
from qlora_cli.settings.resolve import Resolved


def check_train_inputs(resolved: Resolved[TrainSettings]) -> None:
    """Check names, files and the output directory of a run, all at once.

    Raises:
        SettingsError: with every problem found.
    """
    settings = resolved.settings
    found = {
        "model.name": check_model_name(settings.model),
        "output.directory": check_output_directory(settings.output.directory),
        "output.report_to": _check_tracker(settings.output.report_to),
    }
    problems = [
        Problem(where=resolved.origin_of(path).where, message=error.message, hint=error.hint)
        for path, error in found.items()
        if error is not None
    ]
    problems += data_problems(resolved, settings.data)
    if problems:
        raise SettingsError(problems)


def _check_tracker(report_to: ReportTo) -> QloraError | None:
    if report_to == ReportTo.NONE or importlib.util.find_spec(report_to.value) is not None:
        return None
    name = report_to.value
    return QloraError(f"{name} is not installed", hint=f"Run: pip install 'qlora-cli[{name}]'")
