"""Check names, files and the output directory before torch is imported."""

import importlib.util

from qlora_cli.data.opening.name_checks import column_problems, data_problems
from qlora_cli.errors import QloraError, SettingsError
from qlora_cli.hub.push import push_problem
from qlora_cli.model_files.given_model import check_model_name
from qlora_cli.settings.choices import ReportTo
from qlora_cli.settings.models import TrainingSettings, TrainSettings
from qlora_cli.settings.resolve import Resolved
from qlora_cli.training.resuming.resume import output_problem


def check_train_inputs(resolved: Resolved[TrainSettings]) -> None:
    """Check names, files and the output directory of a run, all at once; if one is wrong, also the data's columns.

    Raises:
        SettingsError: with every problem.
    """
    settings = resolved.settings
    errors = {
        "model.name": check_model_name(settings.model),
        "output.directory": output_problem(settings.output),
        "output.report_to": _check_tracker(settings.output.report_to),
        "output.push_to_hub": push_problem(settings.output),
        "training.use_liger_kernel": _check_liger(settings.training),
    }
    problems = [resolved.problem(path, error) for path, error in errors.items() if error is not None]
    problems += data_problems(resolved, settings.data)
    if problems:  # otherwise columns are checked together with the model
        problems += column_problems(resolved, settings.data, settings.training.seed)
        raise SettingsError(problems)


def _check_tracker(report_to: ReportTo) -> QloraError | None:
    if report_to == ReportTo.NONE:
        return None
    # mlflow-skinny lacks database support, and MLflow no longer writes to plain files.
    needed = ("mlflow", "sqlalchemy", "alembic") if report_to == ReportTo.MLFLOW else (report_to.value,)
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    return QloraError(f"{missing[0]} is not installed", hint=f"Run: pip install 'qlora-cli[{report_to.value}]'")


def _check_liger(training: TrainingSettings) -> QloraError | None:
    if not training.use_liger_kernel or importlib.util.find_spec("liger_kernel") is not None:
        return None
    return QloraError("liger-kernel is not installed", hint="Run: pip install 'qlora-cli[liger]'")
