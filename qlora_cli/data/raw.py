"""What every reader yields, and how files are opened: decompressed, behind a byte order mark, failures explained."""

import bz2
import gzip
import lzma
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from qlora_cli.data.sources import printable, suffixes_of
from qlora_cli.errors import DataError, MissingDependencyError

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

# One byte for each row of a file, 0 for those to skip; None to read all.
Kept = bytes | None


class RawRow(NamedTuple):
    """A row as its file has it, or what is wrong with it: exactly one of `value` and `problem` is set.

    Attributes:
        file: The path, printable, or the name of a hub data set.
        number: Of the row in its file, from 1.
        line: On which it begins, from 1, where a text file has lines.
        num_bytes: About how much text it is.
    """

    file: str
    number: int
    line: int | None
    value: Mapping[str, Any] | None
    problem: str | None
    num_bytes: int


def is_kept(kept: Kept, number: int) -> bool:
    """Whether row `number`, from 1, is to be read; a row that was not there when rows were chosen is not."""
    return kept is None or (number <= len(kept) and kept[number - 1] != 0)


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
    if compression == ".gz":
        return cast("RawIOBase", gzip.open(path))
    if compression == ".bz2":
        return cast("RawIOBase", bz2.open(path))
    if compression == ".xz":
        return cast("RawIOBase", lzma.open(path))
    if compression == ".zst":
        return _open_zstandard(path)
    return path.open("rb", buffering=0)


def _open_zstandard(path: Path) -> RawIOBase:
    import pyarrow

    if not pyarrow.Codec.is_available("zstd"):
        raise MissingDependencyError(
            f"{printable(path)} is compressed with Zstandard, which this build of pyarrow lacks",
            hint="Install a wheel of pyarrow: pip install --force-reinstall pyarrow; or decompress it: unzstd",
        )
    return cast("RawIOBase", pyarrow.CompressedInputStream(pyarrow.OSFile(os.fsencode(path)), "zstd"))
