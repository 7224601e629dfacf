"""How much the compressed parts of an Arrow file are when decompressed, before any is.

pyarrow takes the memory that a part says it needs, and tells nobody before. What it says stands at the beginning of
each part; where the parts lie is read here from the messages' own tables, which are FlatBuffers. (Arrow columnar
format, sections "Encapsulated message format", "IPC File Format" and "Compression".)
"""

import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from qlora_cli.data.limits import ALWAYS_EXPANDED, MOST_EXPANSION
from qlora_cli.errors import DataError
from qlora_cli.units import format_bytes

FILE_MARK = b"ARROW1"  # what a file begins and ends with, and a stream does not
TRAILER_BYTES = 4 + len(FILE_MARK)  # the size of the footer, and the mark
BLOCK = struct.Struct("<qi4xq")  # where a message lies, and the bytes of its table and of its parts
PART = struct.Struct("<qq")  # where a part of a message lies, and its bytes
SIZE = struct.Struct("<q")
NOT_COMPRESSED = -1
# Places of fields in the tables of Arrow's Message.fbs and File.fbs.
MESSAGE_HEADER, DICTIONARY_BATCH, BATCH_PARTS, BATCH_COMPRESSION, FOOTER_BLOCKS = 2, 1, 2, 3, (2, 3)


def check_expansion(file: Any, name: str) -> None:
    """Check that no message in the Arrow file or stream expands to far more than is stored of it.

    `file` is mapped into memory, `name` what it is called.

    Raises:
        DataError: one does, or its table is damaged.
        ArrowException: a message can't be read.
    """
    try:
        for message in _messages(file):
            if message.type in ("record batch", "dictionary"):
                _check_message(message, name)
    except (struct.error, ValueError) as error:
        raise DataError(f"{name} is damaged: {error}", hint="Copy or download it again.") from error


def _check_message(message: Any, name: str) -> None:
    batch = _Table.root(memoryview(message.metadata)).table(MESSAGE_HEADER)
    if batch is not None and message.type == "dictionary":
        batch = batch.table(DICTIONARY_BATCH)
    if batch is None or batch.place(BATCH_COMPRESSION) is None:
        return
    body = memoryview(message.body)
    expanded = sum(_expanded(body, *part) for part in batch.vector(BATCH_PARTS, PART))
    if expanded > max(ALWAYS_EXPANDED, MOST_EXPANSION * len(body)):
        raise DataError(
            f"{name} expands to more than {MOST_EXPANSION} times its size, to {format_bytes(expanded)} at once",
            hint="Is it a text to train on? If it is, write the file anew without compression.",
        )


def _expanded(body: memoryview, offset: int, num_bytes: int) -> int:
    if num_bytes < SIZE.size:
        return 0
    (size,) = SIZE.unpack_from(body, offset)
    return num_bytes if size == NOT_COMPRESSED else max(0, int(size))


def _messages(file: Any) -> Iterator[Any]:
    """Yield the messages of a stream, or those that the footer of a file names."""
    import pyarrow

    file.seek(0)
    if file.read(len(FILE_MARK)) != FILE_MARK:
        file.seek(0)
        yield from pyarrow.ipc.MessageReader.open_stream(file)
        return
    file.seek(max(0, file.size() - TRAILER_BYTES))
    (num_bytes,) = struct.unpack_from("<i", file.read(TRAILER_BYTES))
    file.seek(max(0, file.size() - TRAILER_BYTES - num_bytes))
    footer = _Table.root(memoryview(file.read(num_bytes)))
    for field in FOOTER_BLOCKS:
        for offset, _, _ in footer.vector(field, BLOCK):
            file.seek(offset)
            yield pyarrow.ipc.read_message(file)


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

    def vector(self, field: int, kind: struct.Struct) -> Iterator[tuple[int, ...]]:
        """Yield what a field lists."""
        place = self._behind(field)
        if place is not None:
            (count,) = struct.unpack_from("<I", self.content, place)
            yield from (kind.unpack_from(self.content, place + 4 + index * kind.size) for index in range(count))

    def _behind(self, field: int) -> int | None:
        place = self.place(field)
        return None if place is None else place + struct.unpack_from("<I", self.content, place)[0]
