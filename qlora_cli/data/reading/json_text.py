"""Decode JSON values one after another from a file of any size, in bounded memory.

Python's own decoder reads each value, so that a row in a list and the same row on a line are equal. Why it is not
ijson: docs/decisions/0020-large-json-files-by-our-own-decoder.md.
"""

import codecs
import json
import re
from typing import Any, BinaryIO, NamedTuple

from qlora_cli.data.limits import MAX_ROW_BYTES, TOO_LONG
from qlora_cli.data.reading.json_values import JsonValues, Required, name_long_number

WINDOW_BYTES = 1024**2
# `json` reports an error at most this far before the end of an incomplete text: `-Infinity`, `\\ud83d\\ude00`.
MAX_TOKEN_LENGTH = 16
WHITESPACE = re.compile(r"[ \t\r\n]*")


class BrokenJsonError(Exception):
    """The text is not JSON from `line` on, which counts from 1."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.line = line


class Decoded(NamedTuple):
    """A value in a file, or the problem with it; the line on which it begins, and its length in characters."""

    line: int
    value: Any
    problem: str | None
    num_characters: int


class JsonText:
    """A window on the text of a file that moves forward, and grows when a value does not fit.

    `required`: the columns of which a row must be readable, as for `JsonValues`.

    Raises:
        BrokenJsonError: by every method, if the text is not JSON or not what the method expects.
    """

    def __init__(self, file: BinaryIO, required: Required | None = None) -> None:
        self.line = 1
        self._file = file
        self._values = JsonValues(required)
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text, self._at = "", 0
        self._line_start = 0  # the index of `line` in the window; negative once the window has moved past it
        self._num_bytes = 0  # read so far
        self._is_whole = False
        self._problem: str | None = None  # why the text ends before the file does

    def peek(self) -> str:
        """Skip whitespace; return the next character, or an empty string at the end of the file."""
        while True:
            match = WHITESPACE.match(self._text, self._at)
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
        """Skip `character` if it is next; return whether it was."""
        if self.peek() != character:
            return False
        self._go_to(self._at + 1)
        return True

    def expect(self, character: str) -> None:
        """Skip `character`, which has to be next."""
        if not self.take(character):
            raise self._broken(f"Expecting {character!r}" if self._at < len(self._text) else "it ends here", self._at)

    def expect_end(self) -> None:
        """Check that the file ends here."""
        if self.peek():
            raise self._broken("Extra data", self._at)

    def decode(self) -> Decoded:
        """Skip the next value, and return it."""
        self.peek()
        while True:
            try:
                value, end, problem = self._values.decode_at(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._is_incomplete(error) and len(self._text) - self._at > MAX_ROW_BYTES:
                    raise self._broken(f"a value is {TOO_LONG}", self._at) from error
                if not self._is_incomplete(error) or not self._grow():
                    raise self._broken(self._reason(error), error.pos) from error
            except ValueError as error:  # a number of thousands of digits
                raise self._broken(name_long_number(), self._at) from error
            except RecursionError as error:
                raise self._broken("nested too deeply", self._at) from error
            else:
                # A number at the end of the window may have more digits after it.
                if end < len(self._text) or not self._grow():
                    decoded = Decoded(self.line, value, problem, end - self._at)
                    self._go_to(end)
                    return decoded

    def _is_incomplete(self, error: json.JSONDecodeError) -> bool:
        return error.pos + MAX_TOKEN_LENGTH >= len(self._text) or error.msg.startswith("Unterminated string")

    def _reason(self, error: json.JSONDecodeError) -> str:
        if self._problem and self._is_incomplete(error):
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
        """Drop the text before the position and read as much as is left, at least a window; False at the end.

        Doubling keeps the decoding of one long value linear in its length.
        """
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
