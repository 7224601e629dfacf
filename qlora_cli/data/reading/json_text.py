"""Decode JSON values one after the other from a file of any size."""

import codecs
import json
import re
import sys
from functools import partial
from typing import Any, BinaryIO, NamedTuple

from qlora_cli.data.limits import MAX_ROW_BYTES, TOO_DEEP, TOO_LONG, text_nests_too_deeply
from qlora_cli.data.rows.json_objects import name_repeated_key, object_of

WINDOW_BYTES = 1024**2
# What `json` blames is at most this far from where it ran out of text: `-Infinity`, `\\ud83d\\ude00`.
LONGEST_TOKEN = 16
SPACE = re.compile(r"[ \t\r\n]*")


class BrokenJsonError(Exception):
    """The text is no JSON from here on; `line` says where, from 1."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.line = line


class Decoded(NamedTuple):
    """A value in a file, or what is wrong with it; the line on which it begins, and how much text it is."""

    line: int
    value: Any
    problem: str | None
    num_characters: int


def name_long_number() -> str:
    """Return what is wrong where Python refuses to make a number of its digits, the only such `ValueError`."""
    return f"a number of more than {sys.get_int_max_str_digits():,} digits"


class JsonValues:
    """Decodes values, and says what is wrong with one that `json` takes although it is none."""

    def __init__(self) -> None:
        self._constants: list[str] = []
        self._repeated: list[str] = []
        self._decoder = json.JSONDecoder(
            parse_constant=self._constants.append, object_pairs_hook=partial(object_of, repeated=self._repeated)
        )

    def decode_whole(self, text: str) -> tuple[Any, str | None]:
        """Return the value that `text` is, and what is wrong with it."""
        self._constants.clear()
        self._repeated.clear()
        try:
            value = self._decoder.decode(text)
        except json.JSONDecodeError as error:
            return None, f"broken JSON: {error.msg} (column {error.colno})"
        except ValueError:
            return None, name_long_number()
        except RecursionError:
            return None, TOO_DEEP
        return value, self._problem(value, text, 0, len(text))

    def decode_at(self, text: str, start: int) -> tuple[Any, int, str | None]:
        """Return the value at `start`, where it ends, and what is wrong with it.

        Raises:
            ValueError: it is no JSON; JSONDecodeError says where.
            RecursionError: it is nested too deeply.
        """
        self._constants.clear()
        self._repeated.clear()
        value, end = self._decoder.raw_decode(text, start)
        return value, end, self._problem(value, text, start, end)

    def _problem(self, value: Any, text: str, start: int, end: int) -> str | None:
        if text_nests_too_deeply(value, text.count("[", start, end) + text.count("{", start, end)):
            return TOO_DEEP
        if self._constants:
            return f"broken JSON: {self._constants[0]} is no JSON value"
        if self._repeated:
            return name_repeated_key(self._repeated[0])
        if text.find("\\ud", start, end) < 0 and text.find("\\uD", start, end) < 0:
            return None
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            half = ord(error.object[error.start])
            return f"not UTF-8 text (\\u{half:04x} is half of a character)"
        return None


class JsonText:
    """A window on the text of a file that moves forward, and grows when a value does not fit.

    Raises:
        BrokenJsonError: from every method, when the text is not what it has to be.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.line = 1
        self._file = file
        self._values = JsonValues()
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text, self._at = "", 0
        self._line_start = 0  # of `line`, in the window; negative once it has moved on
        self._num_bytes = 0  # read so far
        self._is_whole = False
        self._problem: str | None = None  # why the text ends where it does

    def peek(self) -> str:
        """Go to what follows, and return its first character; nothing at the end of the file."""
        while True:
            match = SPACE.match(self._text, self._at)
            assert match is not None
            self._go_to(match.end())
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._grow():
                break
        if self._problem:
            raise self._broken(self._problem, self._at)
        return ""

    def take(self, character: str) -> bool:
        """Go past `character` if it is what follows."""
        if self.peek() != character:
            return False
        self._go_to(self._at + 1)
        return True

    def expect(self, character: str) -> None:
        """Go past `character`, which has to follow."""
        if not self.take(character):
            raise self._broken(f"Expecting {character!r}" if self._at < len(self._text) else "it ends here", self._at)

    def expect_end(self) -> None:
        """Check that nothing follows."""
        if self.peek():
            raise self._broken("Extra data", self._at)

    def decode(self) -> Decoded:
        """Go past the value that follows, and return it."""
        self.peek()
        while True:
            try:
                value, end, problem = self._values.decode_at(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._may_be_cut(error) and len(self._text) - self._at > MAX_ROW_BYTES:
                    raise self._broken(f"a value is {TOO_LONG}", self._at) from error
                if not self._may_be_cut(error) or not self._grow():
                    raise self._broken(self._reason(error), error.pos) from error
            except ValueError as error:  # a number of thousands of digits
                raise self._broken(name_long_number(), self._at) from error
            except RecursionError as error:
                raise self._broken("nested too deeply", self._at) from error
            else:
                # A number may go on behind the window.
                if end < len(self._text) or not self._grow():
                    decoded = Decoded(self.line, value, problem, end - self._at)
                    self._go_to(end)
                    return decoded

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        return error.pos + LONGEST_TOKEN >= len(self._text) or error.msg.startswith("Unterminated string")

    def _reason(self, error: json.JSONDecodeError) -> str:
        if self._problem and self._may_be_cut(error):
            return self._problem
        return "NUL byte" if self._text[error.pos : error.pos + 1] == "\0" else error.msg

    def _go_to(self, position: int) -> None:
        if num_lines := self._text.count("\n", self._at, position):
            self.line += num_lines
            self._line_start = self._text.rfind("\n", self._at, position) + 1
        self._at = position

    def _broken(self, message: str, position: int) -> BrokenJsonError:
        line = self.line + self._text.count("\n", self._at, position)
        start = self._text.rfind("\n", self._at, position) + 1 if line > self.line else self._line_start
        return BrokenJsonError(f"broken JSON: {message} (line {line}, column {position - start + 1})", line)

    def _grow(self) -> bool:
        """Drop what is done with and read as much again as is left, a window at least; False at the end."""
        if self._is_whole:
            return False
        self._text, self._line_start, self._at = self._text[self._at :], self._line_start - self._at, 0
        read = self._file.read(max(WINDOW_BYTES, len(self._text)))
        self._is_whole = not read
        try:
            self._text += self._decoder.decode(read, final=not read)
        except UnicodeDecodeError as error:
            self._is_whole = True
            first = self._num_bytes + len(read) - len(error.object)
            self._problem = f"not UTF-8 text (byte {first + error.start + 1} of the file)"
            self._text += error.object[: error.start].decode("utf-8")
        self._num_bytes += len(read)
        return True
