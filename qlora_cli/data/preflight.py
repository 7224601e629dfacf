"""What can be known to be wrong with the data's names before anything heavy is imported."""

from collections.abc import Sequence
from typing import TypeVar

from qlora_cli.data.sources import check_dataset_name, find_dataset
from qlora_cli.errors import Problem, QloraError
from qlora_cli.settings.models import DataSettings, LoadSettings, field_of
from qlora_cli.settings.resolve import Resolved
from qlora_cli.settings.values import held_out_share

SettingsT = TypeVar("SettingsT", bound=LoadSettings)


def data_problems(resolved: Resolved[SettingsT], data: DataSettings) -> list[Problem]:
    """Return what is wrong with the names of the data sets, and with splits that have no effect."""
    found = {"data.dataset": _check_names(data.dataset)}
    if data.eval_dataset is not None:
        found["data.eval_dataset"] = _check_names(data.eval_dataset)
    problems = [resolved.problem(path, error) for path, error in found.items() if error is not None]
    return problems or [*_splits_without_effect(resolved, data), *_weights_without_effect(resolved, data)]


def _check_names(names: Sequence[str]) -> QloraError | None:
    """Return the first thing that is wrong with the names of data sets."""
    return next((problem for problem in map(check_dataset_name, names) if problem is not None), None)


def _splits_without_effect(resolved: Resolved[SettingsT], data: DataSettings) -> list[Problem]:
    trained, held_out = _local(data.dataset), _local(data.eval_dataset or data.dataset)
    is_named = data.eval_split is not None and held_out_share(data.eval_split) is None
    shares = "Leave it out." if data.eval_dataset else "Give a share such as 5%, or a number of rows."
    found = [
        (
            "data.split",
            trained,
            "Leave it out.",
            data.split != field_of("data.split").default and len(trained) == len(data.dataset),
        ),
        ("data.eval_split", held_out, shares, is_named and bool(held_out)),
    ]
    return [
        Problem(
            where=resolved.where_of(path),
            message=f"has no effect on {', '.join(names)}, which is on this disk: only hub data sets have splits",
            hint=hint,
        )
        for path, names, hint, is_wrong in found
        if is_wrong
    ]


def _weights_without_effect(resolved: Resolved[SettingsT], data: DataSettings) -> list[Problem]:
    weighted = [name for name in data.eval_dataset or () if find_dataset(name).weight != 1]
    return [
        Problem(
            where=resolved.where_of("data.eval_dataset"),
            message=f"{name} has a weight, and what is held out is evaluated once",
            hint="Leave the weight out.",
        )
        for name in weighted
    ]


def _local(names: Sequence[str]) -> list[str]:
    return [name for name in names if find_dataset(name).is_local]
