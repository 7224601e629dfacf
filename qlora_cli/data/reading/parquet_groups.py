"""How many rows of a Parquet file may be decoded at once, by what its groups of rows say of their columns.

A column lists its distinct values once, in a dictionary, and then their numbers: a thousand rows of one long text take
a few bytes until they are decoded.
"""

import re
from collections.abc import Sequence
from typing import Any, BinaryIO

from qlora_cli.data.limits import ALWAYS_EXPANDED, MOST_EXPANSION
from qlora_cli.errors import DataError
from qlora_cli.units import MIB, format_bytes

BATCH_ROWS = 1000
DECODED_BYTES = 256 * MIB  # a dictionary is of one mebibyte where nobody asked for more
# The header of a page in Thrift's compact protocol: its kind, and its bytes when decompressed.
PAGE_HEADER = re.compile(rb"\x15[\x80-\xff]*[\x00-\x7f]\x15(?P<size>[\x80-\xff]{0,4}[\x00-\x7f])", re.DOTALL)
HEADER_BYTES = 16
NUMBER_BYTES = 12  # the longest of those that are no text


def rows_at_once(file: BinaryIO, group: Any, columns: Sequence[str], name: str) -> int:
    """Return how many rows of a group of the Parquet `file` are decoded at once, of its `columns`.

    `group` is its metadata, `name` what the file is called.

    Raises:
        DataError: a column is far larger than what is stored of it.
    """
    row_bytes = 0.0
    for place in range(group.num_columns):
        chunk = group.column(place)
        if _is_of(chunk, columns):
            _check_expansion(chunk, name)
            row_bytes += _most_row_bytes(file, chunk, max(1, group.num_rows))
    return max(1, min(BATCH_ROWS, int(DECODED_BYTES // max(1.0, row_bytes))))


def num_values(group: Any, columns: Sequence[str]) -> int:
    """Return how many values a group of rows has in `columns` by its metadata, nulls among them."""
    chunks = (group.column(place) for place in range(group.num_columns))
    return sum(chunk.num_values for chunk in chunks if _is_of(chunk, columns))


def _is_of(chunk: Any, columns: Sequence[str]) -> bool:
    path = chunk.path_in_schema
    return any(path == column or path.startswith(f"{column}.") for column in columns)


def _check_expansion(chunk: Any, name: str) -> None:
    expanded, stored = chunk.total_uncompressed_size, chunk.total_compressed_size
    if expanded > max(ALWAYS_EXPANDED, MOST_EXPANSION * stored):
        raise DataError(
            f"{name}: the column {chunk.path_in_schema} expands to more than {MOST_EXPANSION} times its size, to "
            f"{format_bytes(expanded)}",
            hint="Is it a text to train on? If it is, write the file anew without compression.",
        )


def _most_row_bytes(file: BinaryIO, chunk: Any, num_rows: int) -> float:
    """Return about how much a row of a column is at most when it is decoded."""
    stored: float = chunk.total_uncompressed_size / num_rows
    if not chunk.has_dictionary_page:
        return stored
    values: float = max(1.0, chunk.num_values / num_rows)
    if not chunk.physical_type.endswith("BYTE_ARRAY"):
        return stored + NUMBER_BYTES * values
    # Every value may be the longest one of the dictionary.
    return stored + _dictionary_bytes(file, chunk) * values


def _dictionary_bytes(file: BinaryIO, chunk: Any) -> int:
    """Return the size of a column's dictionary, decompressed; that of the whole column where it is not told."""
    offset = chunk.dictionary_page_offset
    file.seek(chunk.data_page_offset if offset is None else min(offset, chunk.data_page_offset))
    found = PAGE_HEADER.match(file.read(HEADER_BYTES))
    if found is None:
        return int(chunk.total_uncompressed_size)
    # Seven bits a byte, the lowest first, doubled because no size is negative.
    doubled: int = sum((byte & 0x7F) << (7 * place) for place, byte in enumerate(found["size"]))
    return doubled // 2
