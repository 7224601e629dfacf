"""What the messages of an Arrow file say of its parts, checked before anything is read by it.

pyarrow takes the memory that a part says it needs, whether or not as much is there, and whatever it is when it is
decompressed. So each part has to lie in its message, and each message in the file; what a part becomes when it is
decompressed stands at its beginning. Where they lie is read here from the messages' own tables, which are FlatBuffers.
(Arrow columnar format, sections "Encapsulated message format", "IPC File Format" and "Compression".)
"""

import os
import struct
from collections.abc import Collection, Iterator
from itertools import islice
from typing import Any, BinaryIO, NamedTuple

from qlora_cli.data.limits import ALWAYS_EXPANDED, MOST_EXPANSION
from qlora_cli.errors import DataError
from qlora_cli.units import format_bytes

FILE_MARK = b"ARROW1"  # what a file begins and ends with, and a stream does not
TRAILER_BYTES = 4 + len(FILE_MARK)  # the size of the footer, and the mark
BLOCK = struct.Struct("<qi4xq")  # where a message lies, and the bytes of its table and of its parts
PART = struct.Struct("<qq")  # where a part of a message lies, and its bytes
SIZE = struct.Struct("<q")
KIND = struct.Struct("<B")
PREFIX = struct.Struct("<i")  # the bytes of a message's table
CONTINUED = -1  # before it, but in files of before Arrow 0.15
NOT_COMPRESSED = -1
# Places of fields in the tables of Arrow's Message.fbs and File.fbs.
MESSAGE_KIND, MESSAGE_HEADER, MESSAGE_BYTES = 1, 2, 3
DICTIONARY_BATCH, BATCH_PARTS, BATCH_COMPRESSION, VIEW_PARTS = 1, 2, 3, 4
FOOTER_BLOCKS = (2, 3)
DICTIONARY, ROWS = 2, 3  # kinds of messages


def check_messages(file: BinaryIO, schema: Any, columns: Collection[int], name: str) -> None:
    """Check the messages of an Arrow file or stream.

    Every part of one has to lie in it, and what is decompressed for `columns` of `schema`, by their places, not to
    become far larger than what is stored. `name` is what the file is called.

    Raises:
        DataError: one is damaged, or expands.
    """
    try:
        counts = _columns_of(schema)
        for message in _messages(file):
            if message.kind in (DICTIONARY, ROWS):
                _check_message(file, message, counts, columns, name)
    except (struct.error, ValueError) as error:
        raise DataError(f"{name} is damaged: {error}", hint="Copy or download it again.") from error


def _columns_of(schema: Any) -> list["_Column"]:
    """Return the columns of a schema; none if Arrow can't be asked for one: runs within lists, months."""
    from pyarrow import ArrowException

    try:
        return [_Column.of(field) for field in schema]
    except (ArrowException, KeyError):  # the latter of a type that pyarrow has no array of
        return []


class _Message(NamedTuple):
    """A message: what it is, its table, and where its parts lie."""

    kind: int
    header: "_Table"
    start: int
    num_bytes: int


class _Column(NamedTuple):
    """How many parts of a message are a column's, and how many of its fields are views, which may have more."""

    num_parts: int
    num_views: int

    @classmethod
    def of(cls, field: Any) -> "_Column":
        """Return those of a field of a schema, which Arrow itself is asked for."""
        import pyarrow

        kind = getattr(field.type, "storage_type", field.type)
        empty = pyarrow.RecordBatch.from_arrays([pyarrow.nulls(0, kind)], names=[""])
        message = pyarrow.ipc.read_message(empty.serialize())
        batch = _Table.root(memoryview(message.metadata)).table(MESSAGE_HEADER)
        assert batch is not None
        return cls(num_parts=len(list(batch.vector(BATCH_PARTS, PART))), num_views=_views_in(kind))


def _views_in(kind: Any) -> int:
    from pyarrow import types

    kind = getattr(kind, "storage_type", kind)
    if types.is_dictionary(kind):  # whose values are in messages of their own
        return 0
    inner = sum(_views_in(kind.field(index).type) for index in range(kind.num_fields))
    return inner + int(types.is_string_view(kind) or types.is_binary_view(kind))


def _check_message(
    file: BinaryIO, message: _Message, counts: list[_Column], columns: Collection[int], name: str
) -> None:
    batch = message.header.table(DICTIONARY_BATCH) if message.kind == DICTIONARY else message.header
    if batch is None:
        return
    parts = list(batch.vector(BATCH_PARTS, PART))
    for offset, num_bytes in parts:
        _check_place(offset, num_bytes, message.num_bytes)
    if batch.place(BATCH_COMPRESSION) is None:
        return
    if message.kind == ROWS:  # dictionaries are decompressed whether they are used or not
        parts = _parts_of(columns, parts, counts, [count for (count,) in batch.vector(VIEW_PARTS, SIZE)])
    expanded = sum(_expanded(file, message.start + offset, num_bytes) for offset, num_bytes in parts)
    if expanded > max(ALWAYS_EXPANDED, MOST_EXPANSION * message.num_bytes):
        raise DataError(
            f"{name} expands to more than {MOST_EXPANSION} times its size, to {format_bytes(expanded)} at once",
            hint="Is it a text to train on? If it is, write the file anew without compression.",
        )


def _parts_of(
    columns: Collection[int], parts: list[tuple[int, ...]], counts: list[_Column], more: list[int]
) -> list[tuple[int, ...]]:
    """Return those of the parts of a message that belong to `columns`; all of them if that can't be told."""
    chosen: list[tuple[int, ...]] = []
    left, views = iter(parts), iter(more)
    for place, column in enumerate(counts):
        own = list(islice(left, column.num_parts + sum(islice(views, column.num_views))))
        chosen += own if place in columns else []
    is_understood = next(left, None) is None
    return chosen if is_understood else parts


def _expanded(file: BinaryIO, place: int, num_bytes: int) -> int:
    if num_bytes < SIZE.size:
        return 0
    file.seek(place)
    (size,) = SIZE.unpack(file.read(SIZE.size))
    return num_bytes if size == NOT_COMPRESSED else max(0, int(size))


def _messages(file: BinaryIO) -> Iterator[_Message]:
    """Yield the messages of a stream, or those that the footer of a file names."""
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    if file.read(len(FILE_MARK)) != FILE_MARK:
        place = 0
        while message := _message_at(file, place, end):
            yield message
            place = message.start + message.num_bytes
        return
    (num_bytes,) = PREFIX.unpack_from(_bytes_at(file, end - TRAILER_BYTES, TRAILER_BYTES, end))
    footer = _Table.root(_bytes_at(file, end - TRAILER_BYTES - num_bytes, num_bytes, end))
    for field in FOOTER_BLOCKS:
        for place, table_bytes, part_bytes in footer.vector(field, BLOCK):
            _check_place(place, max(0, table_bytes) + max(0, part_bytes), end)
            if message := _message_at(file, place, end):
                yield message


def _message_at(file: BinaryIO, place: int, end: int) -> _Message | None:
    """Return the message at `place` of a file that ends at `end`; None where a stream ends."""
    if place == end:
        return None
    (table_bytes,) = PREFIX.unpack(_bytes_at(file, place, PREFIX.size, end))
    place += PREFIX.size
    if table_bytes == CONTINUED:
        (table_bytes,) = PREFIX.unpack(_bytes_at(file, place, PREFIX.size, end))
        place += PREFIX.size
    if table_bytes == 0:
        return None
    table = _Table.root(_bytes_at(file, place, table_bytes, end))
    header = table.table(MESSAGE_HEADER)
    if header is None:
        raise ValueError("a message of it has no content")
    start, num_bytes = place + table_bytes, table.number(MESSAGE_BYTES, SIZE)
    _check_place(start, num_bytes, end)
    return _Message(table.number(MESSAGE_KIND, KIND), header, start, num_bytes)


def _bytes_at(file: BinaryIO, place: int, num_bytes: int, end: int) -> memoryview:
    _check_place(place, num_bytes, end)
    file.seek(place)
    return memoryview(file.read(num_bytes))


def _check_place(place: int, num_bytes: int, end: int) -> None:
    if place < 0 or num_bytes < 0 or place + num_bytes > end:
        raise ValueError("it names a place that is not in it")


class _Table(NamedTuple):
    """A table of FlatBuffers: the bytes that it lies in, and where."""

    content: memoryview
    start: int

    @classmethod
    def root(cls, content: memoryview) -> "_Table":
        """Return the table that `content` is."""
        return cls(content, struct.unpack_from("<I", content)[0])

    def place(self, field: int) -> int | None:
        """Return where the value of a field lies; None if it has none."""
        (back,) = struct.unpack_from("<i", self.content, self.start)
        names = self.start - back
        (num_bytes,) = struct.unpack_from("<H", self.content, names)
        if 4 + 2 * field >= num_bytes:
            return None
        (offset,) = struct.unpack_from("<H", self.content, names + 4 + 2 * field)
        return self.start + offset if offset else None

    def table(self, field: int) -> "_Table | None":
        """Return the table in a field."""
        place = self._behind(field)
        return None if place is None else _Table(self.content, place)

    def number(self, field: int, kind: struct.Struct) -> int:
        """Return the number in a field, 0 if there is none."""
        place = self.place(field)
        return 0 if place is None else int(kind.unpack_from(self.content, place)[0])

    def vector(self, field: int, kind: struct.Struct) -> Iterator[tuple[int, ...]]:
        """Yield what a field lists."""
        place = self._behind(field)
        if place is not None:
            (count,) = struct.unpack_from("<I", self.content, place)
            yield from (kind.unpack_from(self.content, place + 4 + index * kind.size) for index in range(count))

    def _behind(self, field: int) -> int | None:
        place = self.place(field)
        return None if place is None else place + struct.unpack_from("<I", self.content, place)[0]
