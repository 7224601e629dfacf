"""What can be known to be wrong with the names of the data and with its columns before anything heavy is imported."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TypeVar

from qlora_cli.data.finding.sources import NO_SPLITS, DatasetSource, check_dataset_name
from qlora_cli.data.opening.first_rows import first_rows_errors, on_this_disk
from qlora_cli.data.opening.train_and_eval import eval_split, held_out_sources, trained_and_held_out, trained_sources
from qlora_cli.errors import Problem, QloraError
from qlora_cli.settings.models import DataSettings, LoadSettings, field_of
from qlora_cli.settings.resolve import Resolved

SettingsT = TypeVar("SettingsT", bound=LoadSettings)
SHARES = "Give --eval-split a share such as 5%, or a number of rows."


def data_problems(resolved: Resolved[SettingsT], data: DataSettings) -> list[Problem]:
    """Return what is wrong with the names of the data sets, and with splits that have no effect."""
    found = {"data.dataset": _check_names(data.dataset, data.split)}
    if data.eval_dataset is not None:
        found["data.eval_dataset"] = _check_names(data.eval_dataset, eval_split(data))
    problems = [resolved.problem(path, error) for path, error in found.items() if error is not None]
    return problems or [
        *_about_splits(resolved, data),
        *_about_held_out(resolved, data),
        *_about_streams(resolved, data),
    ]


def column_problems(resolved: Resolved[SettingsT], data: DataSettings, seed: int) -> list[Problem]:
    """Return what is wrong with the first rows of the data sets on this disk, up to one that can't be found."""
    found: dict[Problem, None] = {}
    with suppress(QloraError):  # of a name, which `data_problems` tells
        for setting, error in first_rows_errors(data, seed, chosen=on_this_disk):
            found[resolved.problem(setting, error)] = None
    return list(found)


def _check_names(names: Sequence[str], split: str) -> QloraError | None:
    """Return the first thing that is wrong with the names of data sets, of which `split` is read."""
    problems = (check_dataset_name(name, split) for name in names)
    return next((problem for problem in problems if problem is not None), None)


def _about_splits(resolved: Resolved[SettingsT], data: DataSettings) -> Iterator[Problem]:
    is_named = data.split != field_of("data.split").default
    trained = trained_sources(data) if is_named else []
    if trained and not any(source.has_splits for source in trained):
        yield _without_effect(resolved, "data.split", trained)
    if data.eval_dataset is not None and data.eval_split is not None:
        held_out = [source for source in held_out_sources(data) if not source.has_splits]
        if held_out:
            yield _without_effect(resolved, "data.eval_split", held_out)


def _without_effect(resolved: Resolved[SettingsT], path: str, sources: Sequence[DatasetSource]) -> Problem:
    names = ", ".join(source.name for source in sources)
    message = f"has no effect on {names}: {NO_SPLITS}"
    return Problem(where=resolved.where_of(path), message=message, hint="Leave it out.")


def _about_held_out(resolved: Resolved[SettingsT], data: DataSettings) -> Iterator[Problem]:
    is_split = data.eval_dataset is None
    path = "data.eval_split" if is_split else "data.eval_dataset"
    try:
        held_out = held_out_sources(data)
    except QloraError as error:
        yield resolved.problem(path, error)
        return
    for source in held_out:
        if source.weight != 1 and not is_split:
            message = f"{source.name} has a weight, and what is held out is evaluated once"
            yield Problem(where=resolved.where_of(path), message=message, hint="Leave the weight out.")
    if (same := trained_and_held_out(trained_sources(data), held_out, data)) is not None:
        what = "is the split that is trained" if is_split else "names what is trained too"
        message = f"{what}: all rows of {same.name} would be held out, and none trained"
        yield Problem(where=resolved.where_of(path), message=message, hint=f"Name other rows. {SHARES}")


def _about_streams(resolved: Resolved[SettingsT], data: DataSettings) -> Iterator[Problem]:
    streamed = trained_sources(data) if data.streaming else []
    if len(streamed) == 1 and streamed[0].weight != 1:
        message = f"{streamed[0].name} has a weight, and a stream of one data set is mixed with nothing"
        hint = "Leave the weight out; #500 behind the name takes a sample."
        yield Problem(where=resolved.where_of("data.dataset"), message=message, hint=hint)
