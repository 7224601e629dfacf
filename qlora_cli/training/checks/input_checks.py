"""Check names, files and the output directory before torch is imported."""

import importlib.util
from pathlib import Path

from qlora_cli.data.opening.name_checks import column_problems, data_problems
from qlora_cli.errors import DataError, QloraError, SettingsError
from qlora_cli.files import open_regular
from qlora_cli.hub.push import push_problem
from qlora_cli.model_files.given_model import check_model_name
from qlora_cli.settings.choices import ReportTo
from qlora_cli.settings.models import TrainingSettings, TrainSettings
from qlora_cli.settings.resolve import Resolved
from qlora_cli.settings.values import OFF, ON, WHERE_CHEAP
from qlora_cli.training.resuming.resume import output_problem

FIRST_BYTES = 4096  # of a text, which show whether it is one


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
        "training.general_text": _check_general_text(settings.training),
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


def _check_general_text(training: TrainingSettings) -> QloraError | None:
    """Return why the text can't be measured: its file is missing, not text, or empty."""
    name = training.general_text
    if name in (ON, OFF, WHERE_CHEAP):
        return None
    hint = "Name a file of text in UTF-8, or give auto, on or off."
    try:
        with open_regular(Path(name).expanduser()) as file:
            text = file.read(FIRST_BYTES).decode("utf-8")
    except (OSError, RuntimeError) as error:
        return DataError(f"{name} can't be read: {getattr(error, 'strerror', None) or error}", hint=hint)
    except UnicodeDecodeError as error:
        is_cut = error.reason == "unexpected end of data"
        return None if is_cut else DataError(f"{name} is not UTF-8 text (byte {error.start})", hint=hint)
    except ValueError:
        return DataError(f"{name!r}: a path can't contain a NUL byte", hint=hint)
    return None if text.strip() else DataError(f"{name} is empty", hint=hint)
