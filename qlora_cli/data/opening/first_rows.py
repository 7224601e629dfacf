"""Check the first rows of every data set before any of them is read as a whole. Imports nothing heavy."""

from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from typing import NamedTuple

from qlora_cli.data.finding.sources import DatasetSource
from qlora_cli.data.opening.layouts import SAMPLED_ROWS, open_rows
from qlora_cli.data.opening.train_and_eval import eval_split, held_out_sources, trained_sources
from qlora_cli.data.reading.raw import RawRow
from qlora_cli.data.reading.readers import read_rows, selection_for
from qlora_cli.data.rows.column_formats import RowLayout
from qlora_cli.errors import QloraError
from qlora_cli.settings.models import DataSettings


class ConfiguredDataset(NamedTuple):
    """A data set, the split to read if it has splits, and the setting that names it."""

    source: DatasetSource
    split: str
    setting: str
    is_trained: bool


RowCheck = Callable[[RowLayout, Iterator[RawRow]], None]


def first_rows_errors(
    settings: DataSettings,
    seed: int,
    *,
    include: Callable[[ConfiguredDataset], bool],
    check_rows: RowCheck | None = None,
) -> Iterator[tuple[str, QloraError]]:
    """Yield why data sets can't be read as `settings` say, each error with the setting that names the data set.

    Only data sets that `include` selects are checked: their columns, and their first rows by `check_rows`. A data set
    on the hub is downloaded for that.
    """
    for dataset in configured_datasets(settings):
        if include(dataset) and (error := _error_in(dataset, settings, seed, check_rows)):
            yield dataset.setting, error


def configured_datasets(settings: DataSettings) -> Iterator[ConfiguredDataset]:
    """Yield the data sets to train on, then those to evaluate on.

    Raises:
        DatasetNotFoundError: one does not exist.
        DataError: one can't be read.
    """
    for source in trained_sources(settings):
        yield ConfiguredDataset(source, settings.split, "data.dataset", is_trained=True)
    setting = "data.eval_split" if settings.eval_dataset is None else "data.eval_dataset"
    for source in held_out_sources(settings):
        yield ConfiguredDataset(source, eval_split(settings), setting, is_trained=False)


def on_this_disk(dataset: ConfiguredDataset) -> bool:
    """Return whether a data set can be checked without a download."""
    return dataset.source.is_local


def _error_in(
    dataset: ConfiguredDataset, settings: DataSettings, seed: int, check_rows: RowCheck | None
) -> QloraError | None:
    source, streaming = dataset.source, settings.streaming
    selection = selection_for(settings, source.name)
    try:
        with closing(
            read_rows(source, split=dataset.split, seed=seed, streaming=streaming, selection=selection)
        ) as raw:
            layout, rows = open_rows(source.name, raw, settings)
            if check_rows is not None:
                check_rows(layout, islice(rows, SAMPLED_ROWS))
    except QloraError as error:
        return error
    return None
