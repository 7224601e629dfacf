"""Check the message headers of an Arrow file before pyarrow reads it.

pyarrow allocates whatever size a buffer claims, stored or decompressed, whether or not the file has as much. So each
buffer has to lie within its message, and each message within the file; the decompressed size precedes a buffer's data.
The positions are read here from the FlatBuffers in the messages' headers.
(Arrow columnar format, sections "Encapsulated message format", "IPC File Format" and "Compression".)
"""

import os
import struct
from collections.abc import Collection, Iterator
from itertools import islice
from typing import Any, BinaryIO, NamedTuple

from qlora_cli.data.limits import ALWAYS_ALLOWED_BYTES, MAX_EXPANSION
from qlora_cli.errors import DataError
from qlora_cli.units import format_bytes

FILE_MAGIC = b"ARROW1"  # at the start and end of a file, but not of a stream
TRAILER_BYTES = 4 + len(FILE_MAGIC)  # the size of the footer, and the magic
FOOTER_BLOCK = struct.Struct("<qi4xq")  # the offset of a message, and the bytes of its header and its body
BUFFER = struct.Struct("<qq")  # the offset of a buffer in the body, and its bytes
SIZE = struct.Struct("<q")
KIND = struct.Struct("<B")
PREFIX = struct.Struct("<i")  # the bytes of a message's header
CONTINUATION = -1  # precedes it since Arrow 0.15
NOT_COMPRESSED = -1
# Indices of fields in the tables of Arrow's Message.fbs and File.fbs.
MESSAGE_KIND, MESSAGE_HEADER, MESSAGE_BYTES = 1, 2, 3
DICTIONARY_BATCH, BATCH_BUFFERS, BATCH_COMPRESSION, BATCH_VIEW_COUNTS = 1, 2, 3, 4
FOOTER_BLOCK_FIELDS = (2, 3)
DICTIONARY_MESSAGE, RECORD_BATCH_MESSAGE = 2, 3  # message types


def check_messages(file: BinaryIO, schema: Any, columns: Collection[int], name: str) -> None:
    """Check the messages of an Arrow file or stream; `name` is the file's, for errors.

    Each buffer has to lie within its message, and those of `columns`, by their indices in `schema`, must not
    decompress to a multiple of their stored size.

    Raises:
        DataError: a message is damaged, or expands too much.
    """
    try:
        column_buffers = _column_buffers(schema)
        for message in _messages(file):
            if message.kind in (DICTIONARY_MESSAGE, RECORD_BATCH_MESSAGE):
                _check_message(file, message, column_buffers, columns, name)
    except (struct.error, ValueError) as error:
        raise DataError(f"{name} is damaged: {error}", hint="Copy or download it again.") from error


def _column_buffers(schema: Any) -> list["_ColumnBuffers"]:
    """Return the buffers of each column; an empty list if pyarrow can't make an array of one, as of months."""
    from pyarrow import ArrowException

    try:
        return [_ColumnBuffers.from_field(field) for field in schema]
    except (ArrowException, KeyError):  # the latter for a type without an array class
        return []


class _Message(NamedTuple):
    """A message: its type and header, and where its body starts."""

    kind: int
    header: "_Table"
    start: int
    num_bytes: int


class _ColumnBuffers(NamedTuple):
    """The number of a column's buffers in a message, and of its view fields, each of which may have more buffers."""

    num_buffers: int
    num_views: int

    @classmethod
    def from_field(cls, field: Any) -> "_ColumnBuffers":
        """Return the counts for a field of a schema, read from the header of an empty batch."""
        import pyarrow

        kind = getattr(field.type, "storage_type", field.type)
        empty = pyarrow.RecordBatch.from_arrays([pyarrow.nulls(0, kind)], names=[""])
        message = pyarrow.ipc.read_message(empty.serialize())
        batch = _Table.root(memoryview(message.metadata)).table(MESSAGE_HEADER)
        assert batch is not None
        return cls(num_buffers=len(list(batch.vector(BATCH_BUFFERS, BUFFER))), num_views=_views_in(kind))


def _views_in(kind: Any) -> int:
    from pyarrow import types

    kind = getattr(kind, "storage_type", kind)
    if types.is_dictionary(kind):  # whose values are in separate messages
        return 0
    inner = sum(_views_in(kind.field(index).type) for index in range(kind.num_fields))
    return inner + int(types.is_string_view(kind) or types.is_binary_view(kind))


def _check_message(
    file: BinaryIO, message: _Message, column_buffers: list[_ColumnBuffers], columns: Collection[int], name: str
) -> None:
    batch = message.header.table(DICTIONARY_BATCH) if message.kind == DICTIONARY_MESSAGE else message.header
    if batch is None:
        return
    buffers = list(batch.vector(BATCH_BUFFERS, BUFFER))
    for start, num_bytes in buffers:
        _check_range(start, num_bytes, message.num_bytes)
    if batch.offset_of(BATCH_COMPRESSION) is None:
        return
    if message.kind == RECORD_BATCH_MESSAGE:  # dictionaries are decompressed even if unused
        buffers = _buffers_of(
            columns, buffers, column_buffers, [count for (count,) in batch.vector(BATCH_VIEW_COUNTS, SIZE)]
        )
    expanded = sum(_decompressed_bytes(file, message.start + start, num_bytes) for start, num_bytes in buffers)
    if expanded > max(ALWAYS_ALLOWED_BYTES, MAX_EXPANSION * message.num_bytes):
        raise DataError(
            f"{name} expands to more than {MAX_EXPANSION} times its size, to {format_bytes(expanded)} at once",
            hint="If it is text to train on, rewrite the file without compression.",
        )


def _buffers_of(
    columns: Collection[int],
    buffers: list[tuple[int, ...]],
    column_buffers: list[_ColumnBuffers],
    view_counts: list[int],
) -> list[tuple[int, ...]]:
    """Return the buffers of a message that belong to `columns`; all of them if the counts do not add up."""
    selected: list[tuple[int, ...]] = []
    remaining, views = iter(buffers), iter(view_counts)
    for index, column in enumerate(column_buffers):
        own = list(islice(remaining, column.num_buffers + sum(islice(views, column.num_views))))
        selected += own if index in columns else []
    is_understood = next(remaining, None) is None
    return selected if is_understood else buffers


def _decompressed_bytes(file: BinaryIO, offset: int, num_bytes: int) -> int:
    if num_bytes < SIZE.size:
        return 0
    file.seek(offset)
    (size,) = SIZE.unpack(file.read(SIZE.size))
    return num_bytes if size == NOT_COMPRESSED else max(0, int(size))


def _messages(file: BinaryIO) -> Iterator[_Message]:
    """Yield the messages of a stream, or those that the footer of a file lists."""
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    if file.read(len(FILE_MAGIC)) != FILE_MAGIC:
        offset = 0
        while message := _message_at(file, offset, end):
            yield message
            offset = message.start + message.num_bytes
        return
    (num_bytes,) = PREFIX.unpack_from(_bytes_at(file, end - TRAILER_BYTES, TRAILER_BYTES, end))
    footer = _Table.root(_bytes_at(file, end - TRAILER_BYTES - num_bytes, num_bytes, end))
    for field in FOOTER_BLOCK_FIELDS:
        for offset, table_bytes, body_bytes in footer.vector(field, FOOTER_BLOCK):
            _check_range(offset, max(0, table_bytes) + max(0, body_bytes), end)
            if message := _message_at(file, offset, end):
                yield message


def _message_at(file: BinaryIO, offset: int, end: int) -> _Message | None:
    """Return the message at `offset` of a file that ends at `end`; None where a stream ends."""
    if offset == end:
        return None
    (table_bytes,) = PREFIX.unpack(_bytes_at(file, offset, PREFIX.size, end))
    offset += PREFIX.size
    if table_bytes == CONTINUATION:
        (table_bytes,) = PREFIX.unpack(_bytes_at(file, offset, PREFIX.size, end))
        offset += PREFIX.size
    if table_bytes == 0:
        return None
    table = _Table.root(_bytes_at(file, offset, table_bytes, end))
    header = table.table(MESSAGE_HEADER)
    if header is None:
        raise ValueError("one of its messages has no content")
    start, num_bytes = offset + table_bytes, table.number(MESSAGE_BYTES, SIZE)
    _check_range(start, num_bytes, end)
    return _Message(table.number(MESSAGE_KIND, KIND), header, start, num_bytes)


def _bytes_at(file: BinaryIO, offset: int, num_bytes: int, end: int) -> memoryview:
    _check_range(offset, num_bytes, end)
    file.seek(offset)
    return memoryview(file.read(num_bytes))


def _check_range(offset: int, num_bytes: int, end: int) -> None:
    if offset < 0 or num_bytes < 0 or offset + num_bytes > end:
        raise ValueError("it refers to a position outside of it")


class _Table(NamedTuple):
    """A FlatBuffers table: the bytes that contain it, and its offset."""

    content: memoryview
    start: int

    @classmethod
    def root(cls, content: memoryview) -> "_Table":
        """Return the root table of `content`."""
        return cls(content, struct.unpack_from("<I", content)[0])

    def offset_of(self, field: int) -> int | None:
        """Return the offset of a field's value; None if it is not set."""
        (back,) = struct.unpack_from("<i", self.content, self.start)
        names = self.start - back
        (num_bytes,) = struct.unpack_from("<H", self.content, names)
        if 4 + 2 * field >= num_bytes:
            return None
        (offset,) = struct.unpack_from("<H", self.content, names + 4 + 2 * field)
        return self.start + offset if offset else None

    def table(self, field: int) -> "_Table | None":
        """Return the table in a field; None if it is not set."""
        offset = self._follow(field)
        return None if offset is None else _Table(self.content, offset)

    def number(self, field: int, kind: struct.Struct) -> int:
        """Return the number in a field; 0 if it is not set."""
        offset = self.offset_of(field)
        return 0 if offset is None else int(kind.unpack_from(self.content, offset)[0])

    def vector(self, field: int, kind: struct.Struct) -> Iterator[tuple[int, ...]]:
        """Yield the structs in a vector field."""
        offset = self._follow(field)
        if offset is not None:
            (count,) = struct.unpack_from("<I", self.content, offset)
            yield from (kind.unpack_from(self.content, offset + 4 + index * kind.size) for index in range(count))

    def _follow(self, field: int) -> int | None:
        offset = self.offset_of(field)
        return None if offset is None else offset + struct.unpack_from("<I", self.content, offset)[0]
