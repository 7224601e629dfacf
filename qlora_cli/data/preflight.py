"""What can be known to be wrong with the data's names before anything heavy is imported."""

from collections.abc import Sequence
from typing import TypeVar

from qlora_cli.data.sources import check_dataset_name, find_dataset
from qlora_cli.errors import Problem, QloraError
from qlora_cli.settings.models import DataSettings, LoadSettings, held_out_share
from qlora_cli.settings.resolve import Resolved

SettingsT = TypeVar("SettingsT", bound=LoadSettings)


def data_problems(resolved: Resolved[SettingsT], data: DataSettings) -> list[Problem]:
    """Return what is wrong with the names of the data sets, and with splits that have no effect."""
    found = {"data.dataset": _check_names(data.dataset)}
    if data.eval_dataset is not None:
        found["data.eval_dataset"] = _check_names(data.eval_dataset)
    problems = [
        Problem(where=resolved.origin_of(path).where, message=error.message, hint=error.hint)
        for path, error in found.items()
        if error is not None
    ]
    return problems + _splits_without_effect(resolved, data)


def _check_names(names: Sequence[str]) -> QloraError | None:
    """Return the first thing that is wrong with the names of data sets."""
    return next((problem for problem in map(check_dataset_name, names) if problem is not None), None)


def _all_local(names: Sequence[str]) -> bool:
    return _check_names(names) is None and all(find_dataset(name).is_local for name in names)


def _splits_without_effect(resolved: Resolved[SettingsT], data: DataSettings) -> list[Problem]:
    found = []
    if "data.split" in resolved.origins and _all_local(data.dataset):
        found.append(("data.split", data.dataset))
    held_out = data.eval_dataset or data.dataset
    if data.eval_split is not None and not held_out_share(data.eval_split) and _all_local(held_out):
        found.append(("data.eval_split", held_out))
    return [
        Problem(
            where=resolved.origin_of(path).where,
            message=f"{path} has no effect on {', '.join(names)}, which is on this disk: only hub data sets have "
            "splits",
            hint="Leave it out." if path == "data.split" else "Give a share such as 5%, or a number of rows.",
        )
        for path, names in found
    ]
