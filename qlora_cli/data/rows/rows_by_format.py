"""Read rows of any format: as examples, as pairs of them, or as examples with a label."""

from collections.abc import Mapping
from typing import Any

from qlora_cli.data.rows.column_formats import RowLayout
from qlora_cli.data.rows.examples import Example, Labelled, Pair
from qlora_cli.data.rows.label_reader import LabelReader
from qlora_cli.data.rows.pair_reader import PairReader
from qlora_cli.data.rows.row_reader import RowReader
from qlora_cli.settings.choices import LossOn
from qlora_cli.settings.objectives import DataFormat

READERS: Mapping[DataFormat, type[RowReader]] = {
    DataFormat.PREFERENCE: PairReader,
    DataFormat.UNPAIRED_PREFERENCE: LabelReader,
}


def reader_of(layout: RowLayout, loss_on: LossOn, *, use_chat: bool) -> RowReader:
    """Return what reads the rows of a layout."""
    return READERS.get(layout.format, RowReader)(layout, loss_on, use_chat=use_chat)


def read_row(reader: RowReader, row: Mapping[str, Any]) -> Example | Labelled | Pair:
    """Return `row` as an example, with its label if it has one, or as a pair.

    Raises:
        RowError: a part is missing, empty or of the wrong type.
    """
    if isinstance(reader, PairReader):
        return reader.read_pair(row)
    return reader.read_labelled(row) if isinstance(reader, LabelReader) else reader.read(row)
