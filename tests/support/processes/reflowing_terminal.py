"""A terminal that breaks its lines anew when its window is resized, as far as a live display of rich needs one."""

import io
import re

CODES = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)")


class ReflowingTerminal(io.TextIOBase):
    """Rows of `width` columns, some of which go on in the next; a file for a console to write to."""

    def __init__(self, width: int) -> None:
        self.width = width
        self._rows, self._goes_on = [""], [False]
        self._row = self._column = 0

    def isatty(self) -> bool:
        """Return that it is a terminal."""
        return True

    def write(self, text: str) -> int:
        """Write text and the codes of a display."""
        for parameters, code, control, plain in CODES.findall(text):
            if plain:
                self._put(plain)
            elif control == "\r":
                self._column = 0
            elif control == "\n":
                self._next_row(goes_on=False)
            elif code == "K":
                assert parameters == "2"
                self._rows[self._row], self._goes_on[self._row] = "", False
            elif code == "A":
                self._row -= int(parameters)
            else:
                assert code in "mhl", (parameters, code)  # colours, and the cursor hidden or shown
        return len(text)

    def resize(self, width: int) -> None:
        """Break all lines anew; the cursor stays at the end of what was written last."""
        lines = [""]
        for row, goes_on in zip(self._rows[: self._row + 1], self._goes_on, strict=False):
            lines[-1] += row
            if not goes_on:
                lines.append("")
        self.width = width
        self._rows, self._goes_on, self._row, self._column = [""], [False], 0, 0
        for number, line in enumerate(lines[:-1]):
            if number:
                self._next_row(goes_on=False)
            self._put(line)

    def rows(self) -> list[str]:
        """Return the rows down to the last that is not empty."""
        return "\n".join(row.rstrip() for row in self._rows).rstrip("\n").split("\n")

    def _put(self, text: str) -> None:
        for character in text:
            if self._column == self.width:
                self._next_row(goes_on=True)
            row = self._rows[self._row]
            self._rows[self._row] = row[: self._column].ljust(self._column) + character + row[self._column + 1 :]
            self._column += 1

    def _next_row(self, *, goes_on: bool) -> None:
        self._goes_on[self._row] = goes_on
        self._row, self._column = self._row + 1, 0
        if self._row == len(self._rows):
            self._rows.append("")
            self._goes_on.append(False)
