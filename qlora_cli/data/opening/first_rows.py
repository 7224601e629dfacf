"""The first rows of every data set, looked at before any of them is read as a whole. Imports nothing heavy."""

from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from itertools import islice
from typing import NamedTuple

from qlora_cli.data.finding.sources import DatasetSource
from qlora_cli.data.opening.layouts import SAMPLED_ROWS, open_rows
from qlora_cli.data.opening.train_and_eval import eval_split, held_out_sources, trained_sources
from qlora_cli.data.reading.raw import RawRow, Wanted
from qlora_cli.data.reading.readers import read_rows
from qlora_cli.data.rows.column_formats import RowLayout
from qlora_cli.data.rows.groups import columns_to_read
from qlora_cli.errors import QloraError
from qlora_cli.settings.models import DataSettings


class Named(NamedTuple):
    """A data set, the split that is read of one with splits, and the setting that names it."""

    source: DatasetSource
    split: str
    setting: str
    is_trained: bool


Look = Callable[[RowLayout, Iterator[RawRow]], None]


def first_rows_errors(
    settings: DataSettings, seed: int, *, chosen: Callable[[Named], bool], look: Look | None = None
) -> Iterator[tuple[str, QloraError]]:
    """Yield why data sets can't be read as `settings` say, each with the setting that names it.

    Looked at are those that are `chosen`: their columns, and what else `look` finds in the first rows. One on the hub
    is downloaded for that.
    """
    for named in named_sources(settings):
        if chosen(named) and (error := _error_in(named, settings, seed, look)):
            yield named.setting, error


def named_sources(settings: DataSettings) -> Iterator[Named]:
    """Yield the data sets that are trained, then those that are held out.

    Raises:
        DatasetNotFoundError: one is not there.
        DataError: one can't be read.
    """
    for source in trained_sources(settings):
        yield Named(source, settings.split, "data.dataset", is_trained=True)
    setting = "data.eval_split" if settings.eval_dataset is None else "data.eval_dataset"
    for source in held_out_sources(settings):
        yield Named(source, eval_split(settings), setting, is_trained=False)


def on_this_disk(named: Named) -> bool:
    """Whether a data set need not be downloaded to be looked at."""
    return named.source.is_local


def _error_in(named: Named, settings: DataSettings, seed: int, look: Look | None) -> QloraError | None:
    source, streaming = named.source, settings.streaming
    wanted = Wanted(columns=partial(columns_to_read, settings=settings, name=source.name))
    try:
        with closing(read_rows(source, split=named.split, seed=seed, streaming=streaming, wanted=wanted)) as raw:
            layout, rows = open_rows(source.name, raw, settings)
            if look is not None:
                look(layout, islice(rows, SAMPLED_ROWS))
    except QloraError as error:
        return error
    return None
