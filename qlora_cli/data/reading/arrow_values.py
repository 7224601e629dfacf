"""Make rows of Arrow arrays, of values that JSON knows, so that a table and the same rows as JSON lines are the same.

Each type has one way: bytes are the text that they hold, JSON is what it says, dates and times are text, maps are
objects. What can't be read so is marked where it stands, and makes its row alone a bad one. Every way goes over a
whole column at once, down to its parts, which are one array each however deep they lie.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, NamedTuple
from uuid import UUID

import numpy as np
import pyarrow
from pyarrow import types

from qlora_cli.data.reading.arrow_sizes import bytes_of
from qlora_cli.data.reading.arrow_times import write_date, write_duration, write_interval, write_moment, write_time
from qlora_cli.data.reading.json_text import JsonValues

BATCH_BYTES = 4_000_000  # of columns that are made into values at once; one row may be more
HEAD_BYTES = 8  # that are shown of bytes
MILLISECONDS_PER_DAY = 24 * 60 * 60 * 1000
BYTES_OF_TEXT = {
    pyarrow.string(): pyarrow.binary(),
    pyarrow.large_string(): pyarrow.large_binary(),
    pyarrow.string_view(): pyarrow.binary_view(),
}


class RowValue(NamedTuple):
    """A row of columns, or what is wrong with it: one of `value` and `problem` is set; and about how much it is."""

    value: dict[str, Any] | None
    problem: str | None
    num_bytes: int


@dataclass(frozen=True)
class Unreadable:
    """Stands where a value can't be read, and says why."""

    problem: str


def rows_of(batch: Any) -> Iterator[RowValue]:
    """Yield the rows of a record batch in which every place that it names was looked at.

    Objects are without their nulls, because in columns each has the keys of all others. That a column is null is
    kept, as is a null in a map or in JSON.
    """
    yield from _rows_of(batch.schema.names, batch.columns, batch.num_rows)


def _rows_of(names: Sequence[str], columns: Sequence[Any], num_rows: int) -> Iterator[RowValue]:
    """Yield the rows of columns, which are cut in two until a part is small enough."""
    num_bytes = sum(map(bytes_of, columns))
    if num_rows > 1 and num_bytes > BATCH_BYTES:
        middle = num_rows // 2
        yield from _rows_of(names, [column.slice(0, middle) for column in columns], middle)
        yield from _rows_of(names, [column.slice(middle) for column in columns], num_rows - middle)
        return
    reader = _ArrowReader()
    values = [reader.read(column) for column in columns]
    for place in range(num_rows):
        row = {name: column[place] for name, column in zip(names, values, strict=True)}
        problem = next(_problems_in(row), None) if reader.has_unreadable else None
        yield RowValue(None if problem else row, problem, int(num_bytes // num_rows))


def _problems_in(row: dict[str, Any]) -> Iterator[str]:
    """Yield what can't be read of a row, and where it stands."""
    level: list[tuple[str, Any]] = list(row.items())
    while level:
        parts: list[tuple[str, Any]] = []
        for where, value in level:
            if isinstance(value, Unreadable):
                yield f"{where}: {value.problem}"
            elif isinstance(value, dict):
                parts += [(f"{where}.{key}", part) for key, part in value.items()]
            elif isinstance(value, list):
                parts += [(f"{where}[{place}]", part) for place, part in enumerate(value)]
        level = parts


class _ArrowReader:
    """Reads arrays into lists of values; `has_unreadable` tells whether an `Unreadable` is in any of them."""

    def __init__(self) -> None:
        self.has_unreadable = False
        self._json = JsonValues()

    def read(self, array: Any) -> list[Any]:
        """Return the values of `array`."""
        read = next((read for is_type, read in WAYS if is_type(array.type)), _ArrowReader.unknown)
        return read(self, array) if len(array) else []

    def unknown(self, array: Any) -> list[Any]:
        """Refuse the values of a type that nothing here reads."""
        return self._each(
            [is_there or None for is_there in array.is_valid().to_pylist()], partial(_refuse, array.type)
        )

    def plain(self, array: Any) -> list[Any]:
        """Return values that Python has too."""
        values: list[Any] = array.to_pylist()
        return values

    def texts(self, array: Any) -> list[Any]:
        """Return text, which may turn out to be none."""
        try:
            return self.plain(array)
        except UnicodeDecodeError:
            return self.contents(array.view(BYTES_OF_TEXT[array.type]))

    def contents(self, array: Any) -> list[Any]:
        """Return the text that bytes hold."""
        return self._each(array.to_pylist(), _text_of)

    def halves(self, array: Any) -> list[Any]:
        """Return numbers of two bytes, for which NumPy has a type of its own."""
        return self._each(array.to_pylist(), float)

    def decimals(self, array: Any) -> list[Any]:
        """Return decimal numbers as JSON would hold them."""
        return self._each(array.to_pylist(), _number_of)

    def times(self, array: Any) -> list[Any]:
        """Return dates, times of day, both, and durations as text."""
        numbers = array.view(pyarrow.int32() if array.type.bit_width == 32 else pyarrow.int64())
        return self._each(numbers.to_pylist(), _writer_of(array.type))

    def intervals(self, array: Any) -> list[Any]:
        """Return durations of months, days and nanoseconds as text."""
        return self._each(array.to_pylist(), write_interval)

    def extensions(self, array: Any) -> list[Any]:
        """Return values of a type that is kept as one of the others."""
        name = array.type.extension_name
        if name == "arrow.json":
            return self._each(self.read(array.storage), self._parse)
        if name == "arrow.uuid":
            return self._each(array.storage.to_pylist(), lambda content: str(UUID(bytes=content)))
        return self._each(array.storage.to_pylist(), bool) if name == "arrow.bool8" else self.read(array.storage)

    def dictionaries(self, array: Any) -> list[Any]:
        """Return values that are kept once and named by number; equal ones are one object."""
        return self._picked(array.dictionary, array.indices.to_pylist())

    def runs(self, array: Any) -> list[Any]:
        """Return values that are kept once for each run of them; those of one run are one object."""
        places = np.arange(array.offset, array.offset + len(array))
        return self._picked(array.values, np.searchsorted(array.run_ends.to_numpy(), places, side="right").tolist())

    def objects(self, array: Any) -> list[Any]:
        """Return objects without what is null in them."""
        names = [field.name for field in array.type]
        if len(set(names)) < len(names):
            return self.unknown(array)
        columns = [self.read(column) for column in array.flatten()]
        rows = zip(*columns, strict=True) if columns else ((),) * len(array)
        if any(None in column for column in columns):
            found = [{name: part for name, part in zip(names, row, strict=True) if part is not None} for row in rows]
        else:
            found = [dict(zip(names, row, strict=True)) for row in rows]
        return _nulled(array, found)

    def lists(self, array: Any) -> list[Any]:
        """Return lists whose values follow one another."""
        return self._cut(array, array.offsets.to_pylist())

    def fixed_lists(self, array: Any) -> list[Any]:
        """Return lists that are all of one length."""
        size = array.type.list_size
        return self._cut(array, [size * (array.offset + place) for place in range(len(array) + 1)])

    def list_views(self, array: Any) -> list[Any]:
        """Return lists whose values lie anywhere among the values of all."""
        sizes = array.sizes.to_pylist()
        values = self._parts(array.values, list(zip(array.offsets.to_pylist(), sizes, strict=True)))
        return _nulled(array, _slices(values, list(accumulate(sizes, initial=0))))

    def maps(self, array: Any) -> list[Any]:
        """Return maps as objects, nulls included."""
        offsets = array.offsets.to_pylist()
        keys, values = (self.read(_between(part, offsets)) for part in (array.keys, array.items))
        pairs = _slices(list(zip(keys, values, strict=True)), offsets)
        return self._each(_nulled(array, pairs), _object_of)

    def unions(self, array: Any) -> list[Any]:
        """Return values each of which is of one of several types."""
        begin, end = array.offset, array.offset + len(array)  # pyarrow's own places are of the whole
        codes = np.frombuffer(array.buffers()[1], np.int8)[begin:end].tolist()
        is_dense = array.type.mode == "dense"
        places = np.frombuffer(array.buffers()[2], np.int32)[begin:end].tolist() if is_dense else range(len(array))
        found: list[Any] = [None] * len(array)
        for number, code in enumerate(array.type.type_codes):
            own = [place if each == code else None for place, each in zip(places, codes, strict=True)]
            values = self._picked(array.field(number), own)
            found = [value if each == code else other for value, other, each in zip(values, found, codes, strict=True)]
        return found

    def _cut(self, array: Any, offsets: Sequence[int]) -> list[Any]:
        return _nulled(array, _slices(self.read(_between(array.values, offsets)), offsets))

    def _picked(self, array: Any, places: Sequence[int | None]) -> list[Any]:
        """Return the values at `places`, each of which is read once."""
        distinct = list(dict.fromkeys(place for place in places if place is not None))
        values = self._parts(array, [(place, 1) for place in distinct])
        found: dict[int | None, Any] = dict(zip(distinct, values, strict=True))
        return [found.get(place) for place in places]

    def _parts(self, array: Any, parts: Sequence[tuple[int, int]]) -> list[Any]:
        """Return the values of parts of an array, each by where it begins and its length."""
        slices = [array.slice(begin, length) for begin, length in parts if length]
        if not slices or array.type.num_fields or isinstance(array, pyarrow.ExtensionArray):  # not all can be joined
            return [value for each in slices for value in self.read(each)]
        return self.read(pyarrow.concat_arrays(slices))

    def _parse(self, text: str) -> Any:
        value, problem = self._json.decode_whole(text)
        if problem is not None:
            raise ValueError(problem)
        return value

    def _each(self, values: Sequence[Any], convert: Callable[[Any], Any]) -> list[Any]:
        return [None if value is None else self._converted(value, convert) for value in values]

    def _converted(self, value: Any, convert: Callable[[Any], Any]) -> Any:
        if isinstance(value, Unreadable):
            return value
        try:
            return convert(value)
        except ValueError as error:
            self.has_unreadable = True
            return Unreadable(str(error))


# Which types are read in which way; of a type that is none of them, no value is.
WAYS: Sequence[tuple[Callable[[Any], bool], Callable[[_ArrowReader, Any], list[Any]]]] = (
    (
        lambda kind: types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind),
        _ArrowReader.texts,
    ),
    (types.is_struct, _ArrowReader.objects),
    (lambda kind: types.is_list(kind) or types.is_large_list(kind), _ArrowReader.lists),
    (lambda kind: types.is_integer(kind) or types.is_boolean(kind) or types.is_null(kind), _ArrowReader.plain),
    (lambda kind: types.is_float32(kind) or types.is_float64(kind), _ArrowReader.plain),
    (types.is_float16, _ArrowReader.halves),
    (types.is_decimal, _ArrowReader.decimals),
    (types.is_interval, _ArrowReader.intervals),
    (types.is_temporal, _ArrowReader.times),
    (types.is_dictionary, _ArrowReader.dictionaries),
    (types.is_map, _ArrowReader.maps),
    (types.is_fixed_size_list, _ArrowReader.fixed_lists),
    (lambda kind: types.is_list_view(kind) or types.is_large_list_view(kind), _ArrowReader.list_views),
    (types.is_run_end_encoded, _ArrowReader.runs),
    (types.is_union, _ArrowReader.unions),
    (lambda kind: isinstance(kind, pyarrow.BaseExtensionType), _ArrowReader.extensions),
    (lambda kind: types.is_binary(kind) or types.is_large_binary(kind), _ArrowReader.contents),
    (lambda kind: types.is_binary_view(kind) or types.is_fixed_size_binary(kind), _ArrowReader.contents),
)


def _nulled(array: Any, values: list[Any]) -> list[Any]:
    """Return values with None where `array` has none."""
    if not array.null_count:
        return values
    return [value if is_there else None for value, is_there in zip(values, array.is_valid().to_pylist(), strict=True)]


def _between(array: Any, offsets: Sequence[int]) -> Any:
    return array.slice(offsets[0], offsets[-1] - offsets[0])


def _slices(values: Sequence[Any], offsets: Sequence[int]) -> list[Any]:
    """Return lists of values that follow one another, by where each begins and the last one ends."""
    return [values[begin - offsets[0] : end - offsets[0]] for begin, end in pairwise(offsets)]


def _refuse(kind: Any, _: object) -> Any:
    raise ValueError(f"a value of the type {kind}, which is not read")


def _text_of(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"byte {error.start + 1:,} of {len(content):,} is {content[error.start]:#04x}"
        raise ValueError(f"not UTF-8 text: {where}; it begins with {content[:HEAD_BYTES]!r}") from error


def _number_of(value: Decimal) -> int | float | str:
    """Return a decimal number; as text where a float has not all of its digits."""
    whole, number = int(value), float(value)
    if value == whole:
        return whole
    return number if Decimal(repr(number)) == value else format(value, "f")


def _writer_of(kind: Any) -> Callable[[int], str]:
    if types.is_date32(kind):
        return write_date
    if types.is_date64(kind):
        return lambda milliseconds: write_date(milliseconds // MILLISECONDS_PER_DAY)
    if types.is_timestamp(kind):
        return partial(write_moment, unit=kind.unit, zone_name=kind.tz)
    return partial(write_duration if types.is_duration(kind) else write_time, unit=kind.unit)


def _object_of(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    """Return a map as an object; JSON has numbers for names too, as text."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if not isinstance(key, str | int | float):
            raise ValueError("a map whose keys are neither text nor numbers")
        name = key if isinstance(key, str) else json.dumps(key)
        if name in found:
            raise ValueError(f"a map that has the key {name!r} more than once")
        found[name] = value
    return found
