"""What every reader yields, and how files are opened: decompressed, behind a byte order mark, failures explained."""

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
from qlora_cli.data.limits import ALWAYS_EXPANDED, MOST_EXPANSION
from qlora_cli.errors import DataError, MissingDependencyError
from qlora_cli.units import format_bytes

BUFFER_BYTES = 256 * 1024
UTF8_MARK = b"\xef\xbb\xbf"
# The longer ones first: that of UTF-32LE begins with that of UTF-16LE.
OTHER_MARKS = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}

# What archives begin with; the second one of .xz is that of its forerunner, the second one of .zst a skipped frame.
ARCHIVE_MARKS = {
    ".gz": re.compile(rb"\x1f\x8b"),
    ".bz2": re.compile(rb"BZh"),
    ".xz": re.compile(rb"\xfd7zXZ\0|\x5d\0\0"),
    ".zst": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
}
HEAD_BYTES = 8
VALUE_BYTES = 8  # of what is no text


class Wanted(NamedTuple):
    """What of a file is to be read.

    Attributes:
        rows: One byte for each row of the file, 0 for those to skip; None to read all.
        columns: Returns which of a file's columns are read, where others can be passed over; None to read all.
    """

    rows: bytes | None = None
    columns: Callable[[Collection[str]], Collection[str]] | None = None

    def has(self, number: int) -> bool:
        """Whether row `number`, from 1, is to be read; one that was not there when rows were chosen is not."""
        return self.rows is None or (number <= len(self.rows) and self.rows[number - 1] != 0)


EVERYTHING = Wanted()


class RawRow(NamedTuple):
    """A row as its file has it, or what is wrong with it: exactly one of `value` and `problem` is set.

    Attributes:
        file: The path, printable, or the name of a hub data set.
        number: Of the row in its file, from 1.
        line: On which it begins, from 1, where a text file has lines.
        num_bytes: About how much text it is.
        columns: The names of all columns, where the file has them apart from its rows.
    """

    file: str
    number: int
    line: int | None
    value: Mapping[str, Any] | None
    problem: str | None
    num_bytes: int
    columns: Sequence[str] = ()


def estimate_bytes(value: object) -> int:
    """Return about how many bytes the texts in `value` have, however deep they lie in lists and objects."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(estimate_bytes, value.values()))
    return sum(map(estimate_bytes, value)) if isinstance(value, list) else VALUE_BYTES


@contextmanager
def open_text(path: Path) -> Iterator[BinaryIO]:
    """Open a text file for its bytes, decompressed and behind the byte order mark of UTF-8.

    Raises:
        DataError: it can't be read, its archive is damaged, or it is in another encoding.
        MissingDependencyError: nothing here can decompress it.
    """
    with reading(path), BufferedReader(_open(path), BUFFER_BYTES) as file:
        head, name = file.peek(4)[:4], printable(Path(path.name))
        for mark, encoding in OTHER_MARKS.items():
            if head.startswith(mark):
                raise DataError(
                    f"{printable(path)} is {encoding} text, not UTF-8",
                    hint=f"Convert it: iconv -f {encoding} -t UTF-8 {name} > utf8-{name}",
                )
        if head.startswith(UTF8_MARK):
            file.read(len(UTF8_MARK))
        yield cast("BinaryIO", file)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Explain what goes wrong while the bytes of `path` are read.

    Raises:
        DataError: it can't be read, or its archive is damaged.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:  # what the decompressors raise when the archive is to blame
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
        if not ARCHIVE_MARKS[compression].match(head):
            return DataError(
                f"{printable(path)} is no {compression} archive: it begins with {head!r}",
                hint=f"If it is not compressed, take {compression} off its name; otherwise decompress it yourself.",
            )
    return DataError(f"{printable(path)} is damaged or cut short: {error}", hint="Copy or download it again.")


def _open(path: Path) -> RawIOBase:
    _, compression = suffixes_of(path) or ("", None)
    if compression is None:
        return path.open("rb", buffering=0)
    openers: Mapping[str, Callable[[Path], Any]]
    openers = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zstandard}
    return _Expanded(path, openers[compression](path))


class _Expanded(RawIOBase):
    """What is in an archive, as far as it is not so much more than the archive that it can be no text."""

    def __init__(self, path: Path, inside: RawIOBase) -> None:
        self._path = path
        self._inside = inside
        self._num_left = max(ALWAYS_EXPANDED, MOST_EXPANSION * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        num_bytes = self._inside.readinto(buffer) or 0
        self._num_left -= num_bytes
        if self._num_left < 0:
            raise DataError(
                f"{printable(self._path)} expands to more than {MOST_EXPANSION} times its size, and to more than "
                f"{format_bytes(ALWAYS_EXPANDED)}",
                hint="Is it a text to train on? If it is, decompress it yourself.",
            )
        return num_bytes

    def close(self) -> None:
        if not self.closed:
            self._inside.close()
        super().close()


def _open_zstandard(path: Path) -> RawIOBase:
    import pyarrow

    if not pyarrow.Codec.is_available("zstd"):
        raise MissingDependencyError(
            f"{printable(path)} is compressed with Zstandard, which this build of pyarrow lacks",
            hint="Install a wheel of pyarrow: pip install --force-reinstall pyarrow; or decompress it: unzstd",
        )
    return cast("RawIOBase", pyarrow.CompressedInputStream(pyarrow.OSFile(os.fsencode(path)), "zstd"))
