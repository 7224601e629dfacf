"""Check data set names and columns before anything heavy is imported."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TypeVar

from qlora_cli.data.finding.sources import NO_SPLITS, DatasetSource, check_dataset_name
from qlora_cli.data.opening.first_rows import first_rows_errors, on_this_disk
from qlora_cli.data.opening.train_and_eval import eval_split, held_out_sources, overlapping_source, trained_sources
from qlora_cli.errors import Problem, QloraError
from qlora_cli.settings.models import DataSettings, LoadSettings, field_of
from qlora_cli.settings.resolve import Resolved

SettingsT = TypeVar("SettingsT", bound=LoadSettings)
SHARES = "Give --eval-split a share such as 5%, or a number of rows."


def data_problems(resolved: Resolved[SettingsT], data: DataSettings) -> list[Problem]:
    """Return the problems with data set names, and with split settings that have no effect."""
    errors = {"data.dataset": _name_error(data.dataset, data.split)}
    if data.eval_dataset is not None:
        errors["data.eval_dataset"] = _name_error(data.eval_dataset, eval_split(data))
    problems = [resolved.problem(path, error) for path, error in errors.items() if error is not None]
    return problems or [
        *_split_problems(resolved, data),
        *_held_out_problems(resolved, data),
        *_stream_problems(resolved, data),
    ]


def column_problems(resolved: Resolved[SettingsT], data: DataSettings, seed: int) -> list[Problem]:
    """Return the problems with the first rows of the data sets on this disk, up to one that can't be found."""
    problems: dict[Problem, None] = {}
    with suppress(QloraError):  # in a name, which `data_problems` reports
        for setting, error in first_rows_errors(data, seed, include=on_this_disk):
            problems[resolved.problem(setting, error)] = None
    return list(problems)


def _name_error(names: Sequence[str], split: str) -> QloraError | None:
    """Return the first error in the names of data sets of which `split` is read."""
    problems = (check_dataset_name(name, split) for name in names)
    return next((problem for problem in problems if problem is not None), None)


def _split_problems(resolved: Resolved[SettingsT], data: DataSettings) -> Iterator[Problem]:
    is_named = data.split != field_of("data.split").default
    trained = trained_sources(data) if is_named else []
    if trained and not any(source.has_splits for source in trained):
        yield _no_effect(resolved, "data.split", trained)
    if data.eval_dataset is not None and data.eval_split is not None:
        held_out = [source for source in held_out_sources(data) if not source.has_splits]
        if held_out:
            yield _no_effect(resolved, "data.eval_split", held_out)


def _no_effect(resolved: Resolved[SettingsT], path: str, sources: Sequence[DatasetSource]) -> Problem:
    names = ", ".join(source.name for source in sources)
    message = f"has no effect on {names}: {NO_SPLITS}"
    return Problem(where=resolved.where_of(path), message=message, hint="Leave it out.")


def _held_out_problems(resolved: Resolved[SettingsT], data: DataSettings) -> Iterator[Problem]:
    is_split = data.eval_dataset is None
    path = "data.eval_split" if is_split else "data.eval_dataset"
    try:
        held_out = held_out_sources(data)
    except QloraError as error:
        yield resolved.problem(path, error)
        return
    for source in held_out:
        if source.weight != 1 and not is_split:
            message = f"{source.name} has a weight, but held-out rows are evaluated once"
            yield Problem(where=resolved.where_of(path), message=message, hint="Leave the weight out.")
    if (overlap := overlapping_source(trained_sources(data), held_out, data)) is not None:
        description = "is the split that is trained on" if is_split else "names data that is trained on too"
        message = f"{description}: all rows of {overlap.name} would be held out, and none trained on"
        yield Problem(where=resolved.where_of(path), message=message, hint=f"Name other rows. {SHARES}")


def _stream_problems(resolved: Resolved[SettingsT], data: DataSettings) -> Iterator[Problem]:
    streamed = trained_sources(data) if data.streaming else []
    if len(streamed) == 1 and streamed[0].weight != 1:
        message = f"{streamed[0].name} has a weight, but a stream of a single data set is not mixed"
        hint = "Leave the weight out; #500 after the name takes a sample."
        yield Problem(where=resolved.where_of("data.dataset"), message=message, hint=hint)
