"""Read JSON lines and JSON lists, object by object, exactly as they are written.

`datasets` reads them into columns, in which every nested object gets the keys of all others: tools and their schemas
would be changed in the prompt.
"""

from collections.abc import Iterator
from enum import Enum, auto
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from qlora_cli.data.finding.file_types import printable, suffixes_of
from qlora_cli.data.limits import MAX_COLUMNS, MAX_ROW_BYTES, TOO_LONG, check_blank_lines
from qlora_cli.data.reading.json_text import WINDOW_BYTES, BrokenJsonError, Decoded, JsonText
from qlora_cli.data.reading.json_values import JsonValues, Required
from qlora_cli.data.reading.raw import SELECT_ALL, RawRow, Selection, open_text
from qlora_cli.data.rows.column_formats import PARTS
from qlora_cli.settings.objectives import DataFormat
from qlora_cli.units import counted

KINDS = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
# A list of objects under one of these is one conversation, not a list of rows.
CONVERSATION_KEYS = frozenset(PARTS[DataFormat.MESSAGES]["messages"] + PARTS[DataFormat.SHAREGPT]["conversations"])
NAME_IT_JSON = "; a file that holds one list or object over several lines must be named .json"


def read_json_lines(path: Path, selection: Selection = SELECT_ALL) -> Iterator[RawRow]:
    """Yield the row of each line that is not blank.

    Raises:
        DataError: the file can't be read or is not UTF-8 text.
    """
    file_name, values, advice = printable(path), JsonValues(selection.required), ""
    with open_text(path) as file:
        for number, (line, content) in enumerate(_lines(path, file), start=1):
            if number == 1 and _begins_json(path, content):
                advice = NAME_IT_JSON
            if selection.includes(number):
                value, problem = _decode_line(content, values) if content else (None, f"the line is {TOO_LONG}")
                yield _row(file_name, number, Decoded(line, value, problem, len(content)), advice)


def count_json_lines(path: Path) -> int:
    """Return the number of lines that are not blank."""
    with open_text(path) as file:
        return sum(1 for _ in _lines(path, file))


def read_json(path: Path, selection: Selection = SELECT_ALL) -> Iterator[RawRow]:
    """Yield the rows of a list of objects, of an object that only wraps such a list, of lines, or of a single object.

    Nothing after a syntax error can be read; the error is the last row.

    Raises:
        DataError: the file can't be read or is not UTF-8 text.
    """
    layout = _layout_of(path)
    if layout == _Layout.LINES:
        yield from read_json_lines(path, selection)
        return
    yield from (row for row in _rows(path, layout, selection.required) if selection.includes(row.number))


def count_json(path: Path) -> int:
    """Return the number of rows that `read_json` yields."""
    layout = _layout_of(path)
    return count_json_lines(path) if layout == _Layout.LINES else sum(1 for _ in _rows(path, layout))


def _lines(path: Path, file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield number and bytes of each line that is not blank; of a line that is too long, no bytes.

    Only a line feed ends a line.
    """
    num_blank = 0
    for line, content in enumerate(iter(partial(file.readline, MAX_ROW_BYTES + 1), b""), start=1):
        if len(content) > MAX_ROW_BYTES:
            _skip_line(file, content)
            yield line, b""
        elif content.strip():
            yield line, content
        else:
            num_blank += 1
            check_blank_lines(num_blank, line - num_blank, printable(path))


def _skip_line(file: BinaryIO, content: bytes) -> None:
    """Read to the end of the line that begins with `content`."""
    while content and not content.endswith(b"\n"):
        content = file.readline(WINDOW_BYTES)


def _begins_json(path: Path, content: bytes) -> bool:
    """Return whether the first line of a file not named .json begins a list, or an object over several lines."""
    if (suffixes_of(path) or ("",))[0] == ".json":
        return False
    text = content.strip()
    if text.startswith(b"["):
        return text[1:].lstrip()[:1] in (b"", b"{")
    return text.startswith(b"{") and text[-1:] in (b"{", b"[", b",", b":") and content.endswith(b"\n")


def _decode_line(content: bytes, values: JsonValues) -> tuple[Any, str | None]:
    """Return the value on a line, and the problem with it."""
    if (null := content.find(b"\0")) >= 0:
        return None, f"NUL byte at {null + 1} of the line"
    try:
        text = content.rstrip(b"\r\n").decode("utf-8")
    except UnicodeDecodeError as error:
        return None, f"not UTF-8 text (byte {error.start + 1} of the line)"
    return values.decode_whole(text)


def _row(file_name: str, number: int, decoded: Decoded, advice: str = "") -> RawRow:
    line, value, problem, num_characters = decoded
    if problem is None and not isinstance(value, dict):
        problem = f"expected a JSON object, found {KINDS.get(type(value), 'null')}"
    elif problem is None and len(value) > MAX_COLUMNS:
        problem = f"{counted(len(value), 'key')}, more than {MAX_COLUMNS:,}"
    if problem is not None:
        value, problem = None, problem + advice
    return RawRow(file_name, number, line, value, problem, num_characters)


class _Layout(Enum):
    """The layout of the rows in a .json file."""

    LIST = auto()
    LINES = auto()
    WRAPPED = auto()  # {"data": [...]}
    OBJECT = auto()


def _layout_of(path: Path) -> _Layout:
    with open_text(path) as file:
        try:
            first = JsonText(file).peek()
        except BrokenJsonError:
            first = ""
    if first != "{":
        return _Layout.LIST
    if _holds_lines(path):
        return _Layout.LINES
    return _Layout.WRAPPED if _is_wrapped(path) else _Layout.OBJECT


def _holds_lines(path: Path) -> bool:
    """Return whether an object ends with the first line, and the next line begins another value.

    In JSON a line break is never inside a string, and only `,`, `]` and `}` continue a text that ends with `}`.
    """
    last, is_broken, num_blank = b"", False, 0
    with open_text(path) as file:
        while piece := file.readline(WINDOW_BYTES):
            content = piece.strip()
            num_blank += not content
            check_blank_lines(num_blank, 1, printable(path))
            if content and is_broken:
                return last == b"}" and content[:1] not in (b",", b"]", b"}")
            last = content[-1:] or last
            is_broken = is_broken or (bool(last) and piece.endswith(b"\n"))
    return False


def _is_wrapped(path: Path) -> bool:
    """Return whether the file is an object with a single key that holds a list of rows, not a conversation.

    Only the end of the list shows whether there is another key, so such a file is read twice.
    """
    with open_text(path) as file:
        text = JsonText(file)
        try:
            if not _enter_list(text):
                return False
        except BrokenJsonError:
            return False
        try:
            return all(True for _ in _elements(text)) and text.peek() == "}"
        except BrokenJsonError:  # reported when it is read
            return True


def _enter_list(text: JsonText) -> bool:
    """Enter the list in `{"key": [{`; return whether `text` begins like that."""
    text.expect("{")
    if text.peek() != '"':
        return False
    key = text.decode().value
    return key not in CONVERSATION_KEYS and text.take(":") and text.take("[") and text.peek() == "{"


def _rows(path: Path, layout: _Layout, required: Required | None = None) -> Iterator[RawRow]:
    """Yield the rows of a list or of a single object; a syntax error is the last row."""
    file_name, number = printable(path), 0
    with open_text(path) as file:
        text = JsonText(file, required)
        try:
            for number, decoded in enumerate(_values(text, layout), start=1):
                yield _row(file_name, number, decoded)
        except BrokenJsonError as error:
            inside = _first_list(path) if layout == _Layout.OBJECT and TOO_LONG in str(error) else None
            advice = "" if inside is None else f"; write the list under {inside!r} in it as a file of its own"
            problem = f"{error}; what follows it in the file can't be read{advice}"
            yield RawRow(file_name, number + 1, error.line, None, problem, len(problem))


def _first_list(path: Path) -> str | None:
    """Return the first key of an object that has a list of objects; None if there is none."""
    with open_text(path) as file:
        text = JsonText(file)
        try:
            text.expect("{")
            while text.peek() == '"':
                key = str(text.decode().value)
                text.expect(":")
                if text.take("["):
                    return key if text.peek() == "{" else None
                text.decode()
                text.expect(",")
        except BrokenJsonError:  # the row has it as its problem
            pass
    return None


def _values(text: JsonText, layout: _Layout) -> Iterator[Decoded]:
    if layout == _Layout.WRAPPED:
        _enter_list(text)
        yield from _elements(text)
        text.expect("}")
    elif text.take("["):
        yield from _elements(text)
    elif text.peek():
        yield text.decode()
    text.expect_end()


def _elements(text: JsonText) -> Iterator[Decoded]:
    """Yield the elements of a list that was entered, up to its end."""
    if text.take("]"):
        return
    while True:
        yield text.decode()
        if text.take("]"):
            return
        text.expect(",")
