"""How many values the rows of a column are made into, and how many bytes, before any of them is made.

A type can hold a value once for many places: dictionaries, runs, views and unions do. Nulls, empty objects and what
stands in them take no room in a file at all. So a column of a few bytes may be of a billion values.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow
from pyarrow import compute, types

from qlora_cli.data.limits import Allowance

Sizes = npt.NDArray[np.float64]
VIEW_NUMBERS = 4  # of four bytes each in a view, the first of which is how long its text is


def take_from(allowance: Allowance, columns: Sequence[Any], num_rows: int) -> None:
    """Take what `columns` are made into from the allowance of their file; every place in them has been looked at.

    Raises:
        DataError: it is more than is left.
    """
    allowance.check(num_rows=num_rows, num_values=sum(map(_count, columns)))  # after which no array here is long
    shared = [column for column in columns if _shares(column.type)]
    others = [column for column in columns if not _shares(column.type)]
    allowance.take(
        num_rows=num_rows,
        num_values=sum(map(_count, others)) + int(sum(_sizes(each, in_bytes=False).sum() for each in shared)),
        num_bytes=int(sum(map(bytes_of, others)) + sum(_sizes(each, in_bytes=True).sum() for each in shared)),
    )


def bytes_of(array: Any) -> float:
    """Return about how much the values of `array` are; some types keep one for several places."""
    kind = array.type
    if not len(array):  # of which a file has no offsets; pyarrow would look for them all the same, and end the process
        return 0.0
    if isinstance(array, pyarrow.ExtensionArray):
        return bytes_of(array.storage)
    if types.is_dictionary(kind):
        return float(array.indices.nbytes) + len(array) * _bytes_per_value(array.dictionary)
    if types.is_run_end_encoded(kind):
        return len(array) * _bytes_per_value(array.values)
    if _is_list_view(kind):
        return float(sum(array.sizes.to_pylist())) * _bytes_per_value(array.values)
    if types.is_struct(kind):
        return sum((bytes_of(array.field(place)) for place in range(kind.num_fields)), 0.0)
    if types.is_list(kind) or types.is_large_list(kind):
        first, last = array.offsets[0].as_py(), array.offsets[-1].as_py()
        return float(array.offsets.nbytes) + bytes_of(array.values.slice(first, last - first))
    return float(array.nbytes)


def _bytes_per_value(array: Any) -> float:
    return bytes_of(array) / max(1, len(array))


def _shares(kind: Any) -> bool:
    """Whether values of a type, or of its parts, may be kept once for several places."""
    if isinstance(kind, pyarrow.BaseExtensionType):
        return _shares(kind.storage_type)
    return (
        types.is_dictionary(kind)
        or types.is_run_end_encoded(kind)
        or types.is_union(kind)
        or _is_list_view(kind)
        or _is_text_view(kind)
        or any(_shares(kind.field(place).type) for place in range(kind.num_fields))
    )


def _is_list_view(kind: Any) -> bool:
    return bool(types.is_list_view(kind) or types.is_large_list_view(kind))


def _is_text_view(kind: Any) -> bool:
    return bool(types.is_string_view(kind) or types.is_binary_view(kind))


def _count(array: Any) -> int:
    """Return how many values `array` and its parts have, each counted once."""
    return len(array) + sum(map(_count, _parts(array))) if len(array) else 0


def _parts(array: Any) -> list[Any]:
    kind = array.type
    if isinstance(array, pyarrow.ExtensionArray):
        return _parts(array.storage)
    if types.is_dictionary(kind):
        return [array.dictionary]
    if types.is_run_end_encoded(kind) or _is_list_view(kind):
        return [array.values]
    if types.is_fixed_size_list(kind):
        return [array.values.slice(kind.list_size * array.offset, kind.list_size * len(array))]
    if types.is_list(kind) or types.is_large_list(kind) or types.is_map(kind):
        first, last = array.offsets[0].as_py(), array.offsets[-1].as_py()
        wholes = [array.keys, array.items] if types.is_map(kind) else [array.values]
        return [whole.slice(first, last - first) for whole in wholes]
    return [array.field(place) for place in range(kind.num_fields)]


def _sizes(array: Any, *, in_bytes: bool) -> Sizes:
    """Return the size of each value of `array`: the bytes that it is made into, or the values in it and itself."""
    kind = array.type
    if isinstance(array, pyarrow.ExtensionArray):
        return _sizes(array.storage, in_bytes=in_bytes)
    if not len(array):
        return np.zeros(0)
    if types.is_dictionary(kind):
        places = array.indices.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        return _picked(_sizes(array.dictionary, in_bytes=in_bytes), places)
    if types.is_run_end_encoded(kind):
        places = np.arange(array.offset, array.offset + len(array))
        runs = np.searchsorted(array.run_ends.to_numpy(), places, side="right")
        return _picked(_sizes(array.values, in_bytes=in_bytes), runs)
    own = _own_sizes(array) if in_bytes else np.ones(len(array))
    if types.is_struct(kind):
        return own + sum(_sizes(part, in_bytes=in_bytes) for part in _parts(array))
    if types.is_union(kind):
        return own + max(
            (float(_sizes(part, in_bytes=in_bytes).max(initial=0)) for part in _parts(array)), default=0.0
        )
    if kind.num_fields:
        return own + _sizes_of_lists(array, in_bytes=in_bytes)
    return own


def _picked(sizes: Sizes, places: npt.NDArray[np.int64]) -> Sizes:
    return sizes[places] if len(sizes) else np.zeros(len(places))  # of no values, all places are null


def _own_sizes(array: Any) -> Sizes:
    """Return the bytes of each value without those of its parts."""
    kind = array.type
    if _is_text_view(kind):
        lengths = np.frombuffer(array.buffers()[1], np.int32)[::VIEW_NUMBERS][array.offset : array.offset + len(array)]
        return np.where(array.is_valid().to_numpy(zero_copy_only=False), lengths, 0).astype(np.float64)
    if types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind) or types.is_large_binary(kind):
        lengths = compute.binary_length(array).fill_null(0)
        return np.asarray(lengths.to_numpy(zero_copy_only=False), dtype=np.float64)
    return np.zeros(len(array)) if kind.num_fields else np.full(len(array), array.nbytes / len(array))


def _sizes_of_lists(array: Any, *, in_bytes: bool) -> Sizes:
    """Return the size of what is in each list or map."""
    kind = array.type
    wholes = [array.keys, array.items] if types.is_map(kind) else [array.values]
    if types.is_fixed_size_list(kind):
        begins = kind.list_size * np.arange(array.offset, array.offset + len(array))
        ends = begins + kind.list_size
    elif _is_list_view(kind):
        begins = array.offsets.to_numpy().astype(np.int64)
        ends = begins + array.sizes.to_numpy()
    else:
        begins, ends = array.offsets.to_numpy()[:-1], array.offsets.to_numpy()[1:]
    found = np.zeros(len(array))
    for whole in wholes:
        until = np.concatenate([[0.0], np.cumsum(_sizes(whole, in_bytes=in_bytes))])
        found += until[ends] - until[begins]
    return found
