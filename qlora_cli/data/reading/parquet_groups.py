"""Estimate how many rows of a Parquet file can be decoded at once, from the metadata of its row groups.

A dictionary-encoded column stores each distinct value once, and then indices: a thousand rows of the same long text
take a few bytes until they are decoded.
"""

import re
from collections.abc import Sequence
from typing import Any, BinaryIO

from qlora_cli.data.limits import ALWAYS_ALLOWED_BYTES, MAX_EXPANSION
from qlora_cli.errors import DataError
from qlora_cli.units import MIB, format_bytes

BATCH_ROWS = 1000
DECODED_BYTES = 256 * MIB  # dictionaries are limited to 1 MiB by default
# A page header in Thrift's compact protocol: the page type and the decompressed size.
PAGE_HEADER = re.compile(rb"\x15[\x80-\xff]*[\x00-\x7f]\x15(?P<size>[\x80-\xff]{0,4}[\x00-\x7f])", re.DOTALL)
HEADER_BYTES = 16
NUMBER_BYTES = 12  # of the largest type that is not text


def decodable_rows(file: BinaryIO, group: Any, columns: Sequence[str], name: str) -> int:
    """Return how many rows of a row group may be decoded at once, if only `columns` are read.

    `group` is the metadata of the group, `name` the file's name, for errors.

    Raises:
        DataError: a column decompresses to a multiple of its stored size.
    """
    row_bytes = 0.0
    for index in range(group.num_columns):
        chunk = group.column(index)
        if _belongs_to(chunk, columns):
            _check_expansion(chunk, name)
            row_bytes += _max_row_bytes(file, chunk, max(1, group.num_rows))
    return max(1, min(BATCH_ROWS, int(DECODED_BYTES // max(1.0, row_bytes))))


def num_values(group: Any, columns: Sequence[str]) -> int:
    """Return the number of values in `columns` of a row group, including nulls, from its metadata."""
    chunks = (group.column(index) for index in range(group.num_columns))
    return sum(chunk.num_values for chunk in chunks if _belongs_to(chunk, columns))


def _belongs_to(chunk: Any, columns: Sequence[str]) -> bool:
    path = chunk.path_in_schema
    return any(path == column or path.startswith(f"{column}.") for column in columns)


def _check_expansion(chunk: Any, name: str) -> None:
    expanded, stored = chunk.total_uncompressed_size, chunk.total_compressed_size
    if expanded > max(ALWAYS_ALLOWED_BYTES, MAX_EXPANSION * stored):
        raise DataError(
            f"{name}: the column {chunk.path_in_schema} expands to more than {MAX_EXPANSION} times its size, to "
            f"{format_bytes(expanded)}",
            hint="If it is text to train on, rewrite the file without compression.",
        )


def _max_row_bytes(file: BinaryIO, chunk: Any, num_rows: int) -> float:
    """Return an upper estimate of the decoded bytes of a row in a column."""
    stored: float = chunk.total_uncompressed_size / num_rows
    if not chunk.has_dictionary_page:
        return stored
    values: float = max(1.0, chunk.num_values / num_rows)
    if not chunk.physical_type.endswith("BYTE_ARRAY"):
        return stored + NUMBER_BYTES * values
    # Every row may have the longest value of the dictionary.
    return stored + _dictionary_bytes(file, chunk) * values


def _dictionary_bytes(file: BinaryIO, chunk: Any) -> int:
    """Return the decompressed size of a column's dictionary; that of the whole column if the header can't be read."""
    offset = chunk.dictionary_page_offset
    file.seek(chunk.data_page_offset if offset is None else min(offset, chunk.data_page_offset))
    match = PAGE_HEADER.match(file.read(HEADER_BYTES))
    if match is None:
        return int(chunk.total_uncompressed_size)
    # A zigzag-encoded varint: seven bits a byte, lowest first, and doubled because it is not negative.
    doubled: int = sum((byte & 0x7F) << (7 * index) for index, byte in enumerate(match["size"]))
    return doubled // 2
