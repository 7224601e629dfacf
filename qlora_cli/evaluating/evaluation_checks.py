"""Check an evaluation before torch is imported: names, files, settings without effect."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from qlora_cli.data.finding.sources import NO_SPLITS, check_dataset_name, find_dataset
from qlora_cli.data.opening.train_and_eval import EVAL_SPLIT
from qlora_cli.errors import MissingDependencyError, Problem, QloraError, SettingsError
from qlora_cli.files import existing_path
from qlora_cli.model_files.adapter_files import ADAPTER_CONFIG
from qlora_cli.model_files.given_model import check_model_name, looks_local
from qlora_cli.runs.directory import RunDirectory
from qlora_cli.settings.error_collector import ErrorCollector
from qlora_cli.settings.models import EvaluateSettings, ModelSettings
from qlora_cli.settings.resolve import Resolved
from qlora_cli.settings.rules.conflicts import is_off_or_default

YAML_SUFFIXES = (".yaml", ".yml")


def check_evaluation(resolved: Resolved[EvaluateSettings]) -> None:
    """Check names and files, all at once.

    Raises:
        MissingDependencyError: tasks are requested, lm-eval is not installed, and nothing else is wrong.
        SettingsError: with every problem.
    """
    request, wrong = resolved.settings.evaluate, ErrorCollector(resolved.where_of)
    if request.tasks and importlib.util.find_spec("lm_eval") is None:
        missing = MissingDependencyError(
            f"{','.join(request.tasks)} needs lm-eval, which is not installed",
            hint="Run: pip install 'qlora-cli[eval]'",
            setting="evaluate.tasks",
        )
        wrong.add("evaluate.tasks", missing)
    if problems := list(_problems(resolved)):
        wrong.add("model.name", SettingsError(problems))
    wrong.raise_collected()


def names_rows(resolved: Resolved[EvaluateSettings]) -> bool:
    """Return whether the rows to evaluate were named explicitly; in a settings file `data.dataset` is for training."""
    return resolved.origin_of("data.dataset").kind in {"flag", "set"}


def _problems(resolved: Resolved[EvaluateSettings]) -> Iterator[Problem]:
    request = resolved.settings.evaluate
    if wrong := check_model_name(resolved.settings.model):
        yield resolved.problem("model.name", wrong)
    if request.merged is not None and (wrong := _check_merged(str(request.merged))):
        yield resolved.problem("evaluate.merged", wrong)
    yield from _data_problems(resolved)
    yield from _task_problems(resolved)


def _check_merged(name: str) -> QloraError | None:
    path = existing_path(name)
    if path is None:
        return QloraError(f"there is no directory {name}", hint="Check the path.")
    if _is_run_or_adapter(path):
        hint = "Give the directory that qlora merge wrote; a run or an adapter is evaluated as MODEL."
        return QloraError(f"{name} is no merged model", hint=hint)
    return check_model_name(ModelSettings(name=name))


def _data_problems(resolved: Resolved[EvaluateSettings]) -> Iterator[Problem]:
    data, request = resolved.settings.data, resolved.settings.evaluate
    if not names_rows(resolved):
        if request.split is not None:
            message = "has no effect without --dataset"
            yield Problem(
                where=resolved.where_of("evaluate.split"),
                message=message,
                hint="Name a data set of the hub with --dataset.",
            )
        holds_out = data.eval_dataset is not None or (data.dataset is not None and data.eval_split is not None)
        needs_rows = not request.tasks or request.with_unquantized
        if not holds_out and needs_rows and not _may_hold_out(resolved):
            yield Problem(
                where="--dataset",
                message="is missing. Only of a run the rows to evaluate are known: those that it held out",
                hint="Name the rows with --dataset.",
            )
    rows = "data.dataset" if names_rows(resolved) else "data.eval_dataset"
    yield from _without_effect(resolved)
    for name in _named(resolved):
        split = request.split or EVAL_SPLIT
        if wrong := check_dataset_name(name, split):
            yield resolved.problem(rows, wrong)
            continue
        source = find_dataset(name, split)
        if source.weight != 1:
            message = f"{name} has a weight, and every row is evaluated once"
            yield Problem(where=resolved.where_of(rows), message=message, hint="Leave the weight out.")
        if not source.has_splits and request.split is not None:
            message = f"has no effect on {name}: {NO_SPLITS}"
            yield Problem(where=resolved.where_of("evaluate.split"), message=message, hint="Leave it out.")


def _without_effect(resolved: Resolved[EvaluateSettings]) -> Iterator[Problem]:
    """Yield settings that were given for this evaluation without an effect; settings files are for training, too."""
    unused = (
        ("eval_dataset", "eval_split", "eval_group", "mixing", "split", "streaming") if names_rows(resolved) else ()
    )
    without = {**dict.fromkeys(unused, "with rows that are named"), "packing": "on a loss that is measured"}
    for key, why in without.items():
        path = f"data.{key}"
        if resolved.origin_of(path).kind in ("flag", "set") and not is_off_or_default(resolved.settings.data, key):
            hint = "Leave it out." if key != "split" else "Name the split of a hub data set with --split."
            yield Problem(where=resolved.where_of(path), message=f"has no effect {why}", hint=hint)


def _named(resolved: Resolved[EvaluateSettings]) -> tuple[str, ...]:
    """Return the names of the rows to evaluate, as given on the command line or in a file."""
    data = resolved.settings.data
    return (data.dataset if names_rows(resolved) else data.eval_dataset) or ()


def _may_hold_out(resolved: Resolved[EvaluateSettings]) -> bool:
    """Return whether the model may be a run, or a part of one, with held-out rows; a missing path may be anything."""
    name = resolved.settings.model.name
    path = existing_path(name)
    if path is None:
        return looks_local(name)
    return _is_run_or_adapter(path)


def _is_run_or_adapter(path: Path) -> bool:
    return RunDirectory(path).is_run or (path / ADAPTER_CONFIG).is_file()


def _task_problems(resolved: Resolved[EvaluateSettings]) -> Iterator[Problem]:
    request = resolved.settings.evaluate
    for key in ("limit", "task_path"):
        if getattr(request, key) is not None and not request.tasks:
            where = resolved.where_of(f"evaluate.{key}")
            yield Problem(where=where, message="has no effect without --tasks", hint="Leave it out, or give --tasks.")
    if request.task_path is not None and not request.task_path.is_dir():
        yield Problem(
            where=resolved.where_of("evaluate.task_path"),
            message=f"there is no directory {request.task_path}",
            hint="Check the path.",
        )
    for task in request.tasks:
        path = existing_path(task)
        if task.endswith(YAML_SUFFIXES) and (path is None or not path.is_file()):
            yield Problem(
                where=resolved.where_of("evaluate.tasks"), message=f"there is no file {task}", hint="Check the path."
            )
