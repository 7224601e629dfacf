"""Make invisible characters visible, on a terminal and on a page. Imports nothing heavy.

Data is untrusted: characters that reverse text, hide in it, or control a terminal are shown as their code points.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

LINE_BREAK, TAB, SPACE_AT_END = "⏎", "→", "·"

# Default_Ignorable_Code_Point of Unicode's DerivedCoreProperties: zero-width characters, bidi overrides, fillers and
# tags. Less FE0E and FE0F, which follow every other emoji and only choose how it is drawn.
_IGNORABLE = (
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0d\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
_CONTROLS = "\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ufff9-\ufffb"
_ODD_SPACES = "\u00a0\u1680\u2000-\u200a\u202f\u205f\u2800\u3000"
_NO_CHARACTERS = "\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff"  # a lone surrogate could not even be written as UTF-8
_NUMBERED = f"[{_CONTROLS}{_IGNORABLE}{_ODD_SPACES}{_NO_CHARACTERS}]"
# A run of spaces is matched only at its first, or a row of only spaces would take quadratic time.
_SPACES = r"(?<!\ )\ ++"
# Joiners and unusual spaces, which many languages use, and line breaks stay.
_CONTROLLING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_MARKUP = re.compile(r"[`|<>\[\]]")
_UNSEEN = re.compile(rf"\n|\t|{_SPACES}(?=[\r\n])|{_NUMBERED}")
_UNSEEN_AT_END = re.compile(rf"\n|\t|{_SPACES}(?=[\r\n]|\Z)|{_NUMBERED}")


@dataclass(frozen=True)
class TextPart:
    """Literal text, or a sign in place of invisible characters."""

    text: str
    is_sign: bool


class TextPiece(Protocol):
    """A piece of a row whose tokens are shown together."""

    @property
    def text(self) -> str:
        """The literal text."""

    @property
    def is_trained(self) -> bool:
        """Whether its tokens are trained."""

    @property
    def is_special(self) -> bool:
        """Whether it is a special token."""


def visible(text: str, *, is_end: bool = True) -> str:
    """Return `text` with signs in place of invisible characters.

    A line break is `⏎` and a real one, a tab `→`, each space at the end of a line `·`, every other such character
    its number in brackets: `[U+200B]`. `is_end` says that a line ends with the text.
    """
    return "".join(part.text for part in parts(text, is_end=is_end))


def public_name(name: str) -> str:
    """Return a name for publication: of a local path only its last part.

    It may be somebody else's, and must not break out of a line, cell or code span of a card.
    """
    return _MARKUP.sub("_", visible(Path(name).name if Path(name).is_absolute() else name))


def parts(text: str, *, is_end: bool = True) -> Iterator[TextPart]:
    """Yield the parts of `visible(text)`, which distinguish a sign from the same character in the data."""
    position = 0
    for match in (_UNSEEN_AT_END if is_end else _UNSEEN).finditer(text):
        if match.start() > position:
            yield TextPart(text[position : match.start()], is_sign=False)
        yield TextPart(_sign(match.group()), is_sign=True)
        position = match.end()
    if position < len(text):
        yield TextPart(text[position:], is_sign=False)


def escape_controls(text: str) -> str:
    """Return `text` with characters that control a terminal or reverse text as bracketed code points: `[U+001B]`."""
    return _CONTROLLING.sub(lambda match: _sign(match.group()), text)


def line_ends(pieces: Sequence[TextPiece]) -> list[bool]:
    """Return for each piece of a row whether a line, a turn or trained text ends after it, so that spaces are odd."""
    ends: list[bool] = []
    is_end, is_trained = True, None
    for piece in reversed(pieces):
        is_end = is_end or piece.is_trained != is_trained
        ends.append(is_end)
        if piece.is_special:
            is_end = True
        elif text := piece.text.lstrip(" "):
            is_end = text[0] in "\r\n"
        is_trained = piece.is_trained
    return ends[::-1]


def _sign(unseen: str) -> str:
    if unseen == "\n":
        return LINE_BREAK + "\n"
    if unseen == "\t":
        return TAB
    return SPACE_AT_END * len(unseen) if unseen[0] == " " else f"[U+{ord(unseen):04X}]"
