"""Convert Arrow arrays to rows of JSON values, so that a table reads the same as its rows written as JSON lines.

Each type has one converter: bytes become text, JSON is parsed, dates and times become text, maps become objects. A
value that can't be converted is replaced by a marker, and makes only its row a bad one. Converters work on whole
columns, and recursively on their child arrays.
"""

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from decimal import Decimal
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, NamedTuple
from uuid import UUID

import numpy as np
import pyarrow
from pyarrow import types

from qlora_cli.data.reading.arrow_sizes import array_bytes
from qlora_cli.data.reading.arrow_times import iso_date, iso_duration, iso_interval, iso_time, iso_timestamp
from qlora_cli.data.reading.json_values import JsonValues
from qlora_cli.data.rows.examples import Unreadable

BATCH_BYTES = 4_000_000  # converted at once, unless a single row has more
HEAD_BYTES = 8  # shown in messages
MILLISECONDS_PER_DAY = 24 * 60 * 60 * 1000
BINARY_TYPES = {
    pyarrow.string(): pyarrow.binary(),
    pyarrow.large_string(): pyarrow.large_binary(),
    pyarrow.string_view(): pyarrow.binary_view(),
}


class RowValue(NamedTuple):
    """A row, or the problem with it: one of `value` and `problem` is set; and its approximate size."""

    value: dict[str, Any] | None
    problem: str | None
    num_bytes: int


def rows_in_batch(batch: Any, required: Collection[str]) -> Iterator[RowValue]:
    """Yield the rows of a validated record batch; a value of `required` columns that can't be read is a problem.

    Nulls in objects are dropped, because in columns each object has the keys of all others. Nulls of whole columns, in
    maps and in JSON stay.
    """
    yield from _rows_in_columns(batch.schema.names, batch.columns, batch.num_rows, required)


def _rows_in_columns(
    names: Sequence[str], columns: Sequence[Any], num_rows: int, required: Collection[str]
) -> Iterator[RowValue]:
    """Yield the rows of columns, halving them until a part is small enough."""
    num_bytes = sum(map(array_bytes, columns))
    if num_rows > 1 and num_bytes > BATCH_BYTES:
        middle = num_rows // 2
        yield from _rows_in_columns(names, [column.slice(0, middle) for column in columns], middle, required)
        yield from _rows_in_columns(names, [column.slice(middle) for column in columns], num_rows - middle, required)
        return
    reader = _ArrowReader()
    values = [reader.read(column) for column in columns]
    for index in range(num_rows):
        row = {name: column[index] for name, column in zip(names, values, strict=True)}
        problem = None
        if reader.has_unreadable:
            problem = next(_problems_in({name: row[name] for name in names if name in required}), None)
        yield RowValue(None if problem else row, problem, int(num_bytes // num_rows))


def _problems_in(row: dict[str, Any]) -> Iterator[str]:
    """Yield the unreadable values of a row, each with its path and the reason."""
    level: list[tuple[str, Any]] = list(row.items())
    while level:
        parts: list[tuple[str, Any]] = []
        for where, value in level:
            if isinstance(value, Unreadable):
                yield f"{where}: {value.problem}"
            elif isinstance(value, dict):
                parts += [(f"{where}.{key}", part) for key, part in value.items()]
            elif isinstance(value, list):
                parts += [(f"{where}[{index}]", part) for index, part in enumerate(value)]
        level = parts


class _ArrowReader:
    """Converts arrays to lists of values; `has_unreadable` is set once an `Unreadable` is in any of them."""

    def __init__(self) -> None:
        self.has_unreadable = False
        self._json = JsonValues()

    def read(self, array: Any) -> list[Any]:
        """Return the values of `array`."""
        read = next((read for is_type, read in CONVERTERS if is_type(array.type)), _ArrowReader.refuse)
        return read(self, array) if len(array) else []

    def refuse(self, array: Any) -> list[Any]:
        """Mark the values of an unsupported type as unreadable."""
        return self._convert_each(
            [is_valid or None for is_valid in array.is_valid().to_pylist()], partial(_refuse, array.type)
        )

    def plain(self, array: Any) -> list[Any]:
        """Return values whose type Python has too."""
        values: list[Any] = array.to_pylist()
        return values

    def texts(self, array: Any) -> list[Any]:
        """Return text, some of which may be invalid UTF-8."""
        try:
            return self.plain(array)
        except UnicodeDecodeError:
            return self.binaries(array.view(BINARY_TYPES[array.type]))

    def binaries(self, array: Any) -> list[Any]:
        """Return bytes decoded as UTF-8 text."""
        return self._convert_each(array.to_pylist(), _decode_utf8)

    def half_floats(self, array: Any) -> list[Any]:
        """Return half-precision numbers, which pyarrow returns as NumPy scalars."""
        return self._convert_each(array.to_pylist(), float)

    def decimals(self, array: Any) -> list[Any]:
        """Return decimal numbers as JSON numbers, or as text."""
        return self._convert_each(array.to_pylist(), _json_number)

    def times(self, array: Any) -> list[Any]:
        """Return dates, times of day, both, and durations as text."""
        numbers = array.view(pyarrow.int32() if array.type.bit_width == 32 else pyarrow.int64())
        return self._convert_each(numbers.to_pylist(), _temporal_formatter(array.type))

    def intervals(self, array: Any) -> list[Any]:
        """Return durations of months, days and nanoseconds as text."""
        return self._convert_each(array.to_pylist(), iso_interval)

    def extensions(self, array: Any) -> list[Any]:
        """Return values of an extension type, which is stored as another type."""
        name = array.type.extension_name
        if name == "arrow.json":
            return self._convert_each(self.read(array.storage), self._parse)
        if name == "arrow.uuid":
            return self._convert_each(array.storage.to_pylist(), lambda content: str(UUID(bytes=content)))
        return (
            self._convert_each(array.storage.to_pylist(), bool) if name == "arrow.bool8" else self.read(array.storage)
        )

    def dictionaries(self, array: Any) -> list[Any]:
        """Return dictionary-encoded values; equal ones are the same object."""
        return self._take(array.dictionary, array.indices.to_pylist())

    def runs(self, array: Any) -> list[Any]:
        """Return run-end encoded values; those of a run are the same object."""
        indices = np.arange(array.offset, array.offset + len(array))
        return self._take(array.values, np.searchsorted(array.run_ends.to_numpy(), indices, side="right").tolist())

    def objects(self, array: Any) -> list[Any]:
        """Return structs as objects without their nulls."""
        names = [field.name for field in array.type]
        if len(set(names)) < len(names):
            return self.refuse(array)
        columns = [self.read(column) for column in array.flatten()]
        rows = zip(*columns, strict=True) if columns else ((),) * len(array)
        if any(None in column for column in columns):
            objects = [{name: part for name, part in zip(names, row, strict=True) if part is not None} for row in rows]
        else:
            objects = [dict(zip(names, row, strict=True)) for row in rows]
        return _with_nulls(array, objects)

    def lists(self, array: Any) -> list[Any]:
        """Return lists of consecutive values."""
        return self._split_lists(array, array.offsets.to_pylist())

    def fixed_lists(self, array: Any) -> list[Any]:
        """Return lists of equal length."""
        size = array.type.list_size
        return self._split_lists(array, [size * (array.offset + index) for index in range(len(array) + 1)])

    def list_views(self, array: Any) -> list[Any]:
        """Return lists whose values may be anywhere in the child array."""
        sizes = array.sizes.to_pylist()
        values = self._read_ranges(array.values, list(zip(array.offsets.to_pylist(), sizes, strict=True)))
        return _with_nulls(array, _split_at(values, list(accumulate(sizes, initial=0))))

    def maps(self, array: Any) -> list[Any]:
        """Return maps as objects, nulls included."""
        offsets = array.offsets.to_pylist()
        keys, values = (self.read(_slice_between(part, offsets)) for part in (array.keys, array.items))
        pairs = _split_at(list(zip(keys, values, strict=True)), offsets)
        return self._convert_each(_with_nulls(array, pairs), _map_to_object)

    def unions(self, array: Any) -> list[Any]:
        """Return the values of a union of types."""
        start, end = array.offset, array.offset + len(array)  # pyarrow's buffers are those of the unsliced array
        codes = np.frombuffer(array.buffers()[1], np.int8)[start:end].tolist()
        is_dense = array.type.mode == "dense"
        indices = np.frombuffer(array.buffers()[2], np.int32)[start:end].tolist() if is_dense else range(len(array))
        result: list[Any] = [None] * len(array)
        for child_index, code in enumerate(array.type.type_codes):
            own_indices = [index if each == code else None for index, each in zip(indices, codes, strict=True)]
            values = self._take(array.field(child_index), own_indices)
            result = [
                value if each == code else other for value, other, each in zip(values, result, codes, strict=True)
            ]
        return result

    def _split_lists(self, array: Any, offsets: Sequence[int]) -> list[Any]:
        return _with_nulls(array, _split_at(self.read(_slice_between(array.values, offsets)), offsets))

    def _take(self, array: Any, indices: Sequence[int | None]) -> list[Any]:
        """Return the values at `indices`, each of them converted once."""
        distinct = list(dict.fromkeys(index for index in indices if index is not None))
        values = self._read_ranges(array, [(index, 1) for index in distinct])
        by_index: dict[int | None, Any] = dict(zip(distinct, values, strict=True))
        return [by_index.get(index) for index in indices]

    def _read_ranges(self, array: Any, ranges: Sequence[tuple[int, int]]) -> list[Any]:
        """Return the values in ranges of an array, each given by its start and length."""
        slices = [array.slice(start, length) for start, length in ranges if length]
        if (
            not slices or array.type.num_fields or isinstance(array, pyarrow.ExtensionArray)
        ):  # not all of these can be joined
            return [value for each in slices for value in self.read(each)]
        return self.read(pyarrow.concat_arrays(slices))

    def _parse(self, text: str) -> Any:
        value, problem = self._json.decode_whole(text)
        if problem is not None:
            raise ValueError(problem)
        return value

    def _convert_each(self, values: Sequence[Any], convert: Callable[[Any], Any]) -> list[Any]:
        return [None if value is None else self._convert(value, convert) for value in values]

    def _convert(self, value: Any, convert: Callable[[Any], Any]) -> Any:
        if isinstance(value, Unreadable):
            return value
        try:
            return convert(value)
        except ValueError as error:
            self.has_unreadable = True
            return Unreadable(str(error))


# The converter of each type; values of other types are unreadable.
CONVERTERS: Sequence[tuple[Callable[[Any], bool], Callable[[_ArrowReader, Any], list[Any]]]] = (
    (
        lambda kind: types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind),
        _ArrowReader.texts,
    ),
    (types.is_struct, _ArrowReader.objects),
    (lambda kind: types.is_list(kind) or types.is_large_list(kind), _ArrowReader.lists),
    (lambda kind: types.is_integer(kind) or types.is_boolean(kind) or types.is_null(kind), _ArrowReader.plain),
    (lambda kind: types.is_float32(kind) or types.is_float64(kind), _ArrowReader.plain),
    (types.is_float16, _ArrowReader.half_floats),
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
    (lambda kind: types.is_binary(kind) or types.is_large_binary(kind), _ArrowReader.binaries),
    (lambda kind: types.is_binary_view(kind) or types.is_fixed_size_binary(kind), _ArrowReader.binaries),
)


def _with_nulls(array: Any, values: list[Any]) -> list[Any]:
    """Return values with None where `array` is null."""
    if not array.null_count:
        return values
    return [value if is_valid else None for value, is_valid in zip(values, array.is_valid().to_pylist(), strict=True)]


def _slice_between(array: Any, offsets: Sequence[int]) -> Any:
    return array.slice(offsets[0], offsets[-1] - offsets[0])


def _split_at(values: Sequence[Any], offsets: Sequence[int]) -> list[Any]:
    """Return consecutive lists of values; `offsets` are the start of each list, and the end of the last one."""
    return [values[begin - offsets[0] : end - offsets[0]] for begin, end in pairwise(offsets)]


def _refuse(kind: Any, _: object) -> Any:
    raise ValueError(f"a value of the type {kind}, which is not supported")


def _decode_utf8(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"byte {error.start + 1:,} of {len(content):,} is {content[error.start]:#04x}"
        raise ValueError(f"not UTF-8 text: {where}; it begins with {content[:HEAD_BYTES]!r}") from error


def _json_number(value: Decimal) -> int | float | str:
    """Return a decimal as a number, or as text if a float can't represent it."""
    whole, number = int(value), float(value)
    if value == whole:
        return whole
    return number if Decimal(repr(number)) == value else format(value, "f")


def _temporal_formatter(kind: Any) -> Callable[[int], str]:
    if types.is_date32(kind):
        return iso_date
    if types.is_date64(kind):
        return lambda milliseconds: iso_date(milliseconds // MILLISECONDS_PER_DAY)
    if types.is_timestamp(kind):
        return partial(iso_timestamp, unit=kind.unit, zone_name=kind.tz)
    return partial(iso_duration if types.is_duration(kind) else iso_time, unit=kind.unit)


def _map_to_object(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    """Return a map as an object; numeric keys become text, as in JSON."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if not isinstance(key, str | int | float):
            raise ValueError("a map whose keys are neither text nor numbers")
        name = key if isinstance(key, str) else json.dumps(key)
        if name in result:
            raise ValueError(f"a map that has the key {name!r} more than once")
        result[name] = value
    return result
