"""Decode a JSON value, and detect problems in it that Python's decoder accepts, but other decoders do not.

These are NaN, half of a surrogate pair, a key with two values, and unbounded nesting. In a column that is not used
they are harmless: its value becomes `Unreadable`. A column whose value is NaN is null, as pandas writes it.
"""

import json
import sys
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any, NamedTuple

from qlora_cli.data.limits import TOO_DEEP, nests_too_deeply, text_nests_too_deeply
from qlora_cli.data.rows.examples import Unreadable
from qlora_cli.data.rows.json_objects import RepeatedKey, build_object, describe_repeated_key


class _Constant(NamedTuple):
    """Stands for NaN or an infinity until it is reported."""

    name: str


Required = Callable[[Collection[str]], Collection[str]]  # of the columns, those that must be readable
MISSING = _Constant("NaN")


def name_long_number() -> str:
    """Return the problem with an integer that Python refuses to convert, the only plain `ValueError` of `json`."""
    return f"a number of more than {sys.get_int_max_str_digits():,} digits"


class JsonValues:
    """Decodes values. `required` returns which columns of a row must be readable; None if all must."""

    def __init__(self, required: Required | None = None) -> None:
        self._required = required
        self._constants: list[_Constant] = []
        self._repeated: list[RepeatedKey] = []
        self._decoder = json.JSONDecoder(
            parse_constant=self._constant, object_pairs_hook=partial(build_object, repeated=self._repeated)
        )

    def decode_whole(self, text: str) -> tuple[Any, str | None]:
        """Return the value of the whole `text`, and the problem with it."""
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
        return value, self._check(value, text, 0, len(text))

    def decode_at(self, text: str, start: int) -> tuple[Any, int, str | None]:
        """Return the value at `start`, its end, and the problem with it.

        Raises:
            ValueError: it is not JSON; JSONDecodeError says where.
            RecursionError: it is nested too deeply.
        """
        self._constants.clear()
        self._repeated.clear()
        value, end = self._decoder.raw_decode(text, start)
        return value, end, self._check(value, text, start, end)

    def _constant(self, name: str) -> _Constant:
        self._constants.append(_Constant(name))
        return self._constants[-1]

    def _check(self, value: Any, text: str, start: int, end: int) -> str | None:
        """Return the problem with a value; a column that is not required becomes `Unreadable` instead."""
        if not self._has_problem(value, text, start, end):
            return None
        if isinstance(value, dict) and self._required is not None:
            value |= {name: None for name, part in value.items() if part == MISSING}
            unused = value.keys() - set(self._required(value.keys()))
            self._repeated[:] = [each for each in self._repeated if each.object is not value or each.key not in unused]
            for name in unused:
                if problem := self._problem_in({name: value[name]}):
                    value[name] = Unreadable(problem)
        return self._problem_in(value)

    def _has_problem(self, value: Any, text: str, start: int, end: int) -> bool:
        # Searching the text is cheap; only a row with an escaped surrogate is encoded to detect a lone one.
        if self._constants or self._repeated:
            return True
        if text_nests_too_deeply(value, text.count("[", start, end) + text.count("{", start, end)):
            return True
        if text.find("\\ud", start, end) < 0 and text.find("\\uD", start, end) < 0:
            return False
        return _lone_surrogate(value) is not None

    def _problem_in(self, value: Any) -> str | None:
        if nests_too_deeply(value):
            return TOO_DEEP
        repeated = {id(each.object): each.key for each in self._repeated}
        for part in _parts(value):
            if isinstance(part, _Constant):
                return f"broken JSON: {part.name} is not a JSON value"
            if id(part) in repeated:
                return describe_repeated_key(repeated[id(part)])
        half = _lone_surrogate(value)
        return None if half is None else f"not UTF-8 text (\\u{half:04x} is half of a character)"


def _lone_surrogate(value: Any) -> int | None:
    """Return the first half of a surrogate pair in a value that lacks its other half; None if there is none."""
    try:
        json.dumps(value, ensure_ascii=False, default=repr).encode("utf-8")
    except UnicodeEncodeError as error:
        return ord(error.object[error.start])
    return None


def _parts(value: Any) -> Iterator[Any]:
    """Yield a value and all values nested in it."""
    parts = [value]
    while parts:
        part = parts.pop()
        yield part
        if isinstance(part, dict):
            parts += part.values()
        elif isinstance(part, list):
            parts += part
