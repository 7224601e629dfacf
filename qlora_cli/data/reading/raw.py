"""Raw rows, as every reader yields them, and files opened for reading: decompressed, without a byte order mark."""

import bz2
import gzip
import lzma
import os
import re
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from qlora_cli.data.finding.file_types import printable, suffixes_of
from qlora_cli.data.limits import ALWAYS_ALLOWED_BYTES, MAX_EXPANSION
from qlora_cli.errors import DataError, MissingDependencyError
from qlora_cli.units import format_bytes

BUFFER_BYTES = 256 * 1024
UTF8_BOM = b"\xef\xbb\xbf"
# Longest first: the mark of UTF-32LE begins with that of UTF-16LE.
FOREIGN_BOMS = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}

# The second alternative of .xz is the older .lzma format, that of .zst a skippable frame.
ARCHIVE_MAGIC = {
    ".gz": re.compile(rb"\x1f\x8b"),
    ".bz2": re.compile(rb"BZh"),
    ".xz": re.compile(rb"\xfd7zXZ\0|\x5d\0\0"),
    ".zst": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
}
HEAD_BYTES = 8
SCALAR_BYTES = 8  # assumed for values other than text


class Selection(NamedTuple):
    """The rows and columns of a file to read.

    Attributes:
        rows: A mask with one byte per row of the file, 0 to skip it; None to read all rows.
        columns: Returns which of a file's columns to read, for formats that can skip columns; None to read all.
        required: Returns which columns must be readable: a value of them that is not makes its row a bad one, and of
            others becomes `Unreadable`; None if all must.
    """

    rows: bytes | None = None
    columns: Callable[[Collection[str]], Collection[str]] | None = None
    required: Callable[[Collection[str]], Collection[str]] | None = None

    def includes(self, number: int) -> bool:
        """Return whether row `number`, from 1, is selected; a row beyond the end of the mask is not."""
        return self.rows is None or (number <= len(self.rows) and self.rows[number - 1] != 0)


SELECT_ALL = Selection()


class RawRow(NamedTuple):
    """A row as read from its file, or the problem with it: exactly one of `value` and `problem` is set.

    Attributes:
        file: The printable path, or the name of a hub data set.
        number: The number of the row in its file, from 1.
        line: The line on which the row begins, from 1, in text files.
        num_bytes: The approximate bytes of its text.
        columns: The names of all columns, if the file lists them separately from its rows.
    """

    file: str
    number: int
    line: int | None
    value: Mapping[str, Any] | None
    problem: str | None
    num_bytes: int
    columns: Sequence[str] = ()


def estimate_bytes(value: object) -> int:
    """Return the approximate bytes of all texts in `value`, at any depth of lists and objects."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(estimate_bytes, value.values()))
    return sum(map(estimate_bytes, value)) if isinstance(value, list) else SCALAR_BYTES


@contextmanager
def open_text(path: Path) -> Iterator[BinaryIO]:
    """Open a text file to read its bytes, decompressed and after the UTF-8 byte order mark.

    Raises:
        DataError: it can't be read, its archive is damaged, or it is in another encoding.
        MissingDependencyError: the package that decompresses it is not installed.
    """
    with explain_read_errors(path), BufferedReader(_open(path), BUFFER_BYTES) as file:
        head, name = file.peek(4)[:4], printable(Path(path.name))
        for mark, encoding in FOREIGN_BOMS.items():
            if head.startswith(mark):
                raise DataError(
                    f"{printable(path)} is {encoding} text, not UTF-8",
                    hint=f"Convert it: iconv -f {encoding} -t UTF-8 {name} > utf8-{name}",
                )
        if head.startswith(UTF8_BOM):
            file.read(len(UTF8_BOM))
        yield cast("BinaryIO", file)


@contextmanager
def explain_read_errors(path: Path) -> Iterator[None]:
    """Turn errors while the bytes of `path` are read into a `DataError`.

    Raises:
        DataError: it can't be read, or its archive is damaged.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:  # raised by the decompressors for a damaged archive
            raise _damaged(path, error) from error
        # Not `error.strerror`, in which pyarrow repeats the path.
        raise DataError(
            f"{printable(path)} can't be read: {os.strerror(error.errno)}", hint="Is it there, and readable?"
        ) from error
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> DataError:
    _, compression = suffixes_of(path) or ("", None)
    if compression is not None:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
        if not ARCHIVE_MAGIC[compression].match(head):
            return DataError(
                f"{printable(path)} is not a {compression} archive: it starts with {head!r}",
                hint=f"If it is not compressed, take {compression} off its name; otherwise decompress it yourself.",
            )
    return DataError(f"{printable(path)} is damaged or truncated: {error}", hint="Copy or download it again.")


def _open(path: Path) -> RawIOBase:
    _, compression = suffixes_of(path) or ("", None)
    if compression is None:
        return path.open("rb", buffering=0)
    openers: Mapping[str, Callable[[Path], Any]]
    openers = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zstandard}
    return _LimitedArchive(path, openers[compression](path))


class _LimitedArchive(RawIOBase):
    """Decompresses an archive, and raises a `DataError` once it has expanded more than text does."""

    def __init__(self, path: Path, archive: RawIOBase) -> None:
        self._path = path
        self._archive = archive
        self._remaining_bytes = max(ALWAYS_ALLOWED_BYTES, MAX_EXPANSION * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        num_bytes = self._archive.readinto(buffer) or 0
        self._remaining_bytes -= num_bytes
        if self._remaining_bytes < 0:
            raise DataError(
                f"{printable(self._path)} expands to more than {MAX_EXPANSION} times its size, and to more than "
                f"{format_bytes(ALWAYS_ALLOWED_BYTES)}",
                hint="If it is text to train on, decompress it yourself.",
            )
        return num_bytes

    def close(self) -> None:
        if not self.closed:
            self._archive.close()
        super().close()


def _open_zstandard(path: Path) -> RawIOBase:
    import pyarrow

    if not pyarrow.Codec.is_available("zstd"):
        raise MissingDependencyError(
            f"{printable(path)} is compressed with Zstandard, which this build of pyarrow lacks",
            hint="Install a wheel of pyarrow: pip install --force-reinstall pyarrow; or decompress it: unzstd",
        )
    return cast("RawIOBase", pyarrow.CompressedInputStream(pyarrow.OSFile(os.fsencode(path)), "zstd"))
