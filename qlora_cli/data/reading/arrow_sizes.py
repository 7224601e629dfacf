"""The number of values and bytes that the rows of a column decode into, computed before any row is decoded.

Some types store a value once for many rows: dictionaries, runs, views and unions. Nulls and empty objects take no
space in a file at all. So a column of a few bytes may decode into a billion values.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow
from pyarrow import compute, types

from qlora_cli.data.limits import DecodingBudget

Sizes = npt.NDArray[np.float64]
INTS_PER_VIEW = 4  # int32 numbers in a view, the first of which is the length of its text


def charge_columns(budget: DecodingBudget, columns: Sequence[Any], num_rows: int) -> None:
    """Charge the budget of a file with the rows, values and bytes of `columns`, whose offsets have been validated.

    Raises:
        DataError: the budget does not suffice.
    """
    budget.check(num_rows=num_rows, num_values=sum(map(_count_values, columns)))  # bounds the arrays below
    shared = [column for column in columns if _may_share_values(column.type)]
    unshared = [column for column in columns if not _may_share_values(column.type)]
    budget.charge(
        num_rows=num_rows,
        num_values=sum(map(_count_values, unshared))
        + int(sum(_value_sizes(each, in_bytes=False).sum() for each in shared)),
        num_bytes=int(
            sum(map(array_bytes, unshared)) + sum(_value_sizes(each, in_bytes=True).sum() for each in shared)
        ),
    )


def array_bytes(array: Any) -> float:
    """Return the approximate bytes of the values of `array`, with a value that is stored once counted for each use."""
    kind = array.type
    if not len(array):  # pyarrow would read offsets that an empty array does not have, and crash
        return 0.0
    if isinstance(array, pyarrow.ExtensionArray):
        return array_bytes(array.storage)
    if types.is_dictionary(kind):
        return float(array.indices.nbytes) + len(array) * _bytes_per_value(array.dictionary)
    if types.is_run_end_encoded(kind):
        return len(array) * _bytes_per_value(array.values)
    if _is_list_view(kind):
        return float(sum(array.sizes.to_pylist())) * _bytes_per_value(array.values)
    if types.is_struct(kind):
        return sum((array_bytes(array.field(index)) for index in range(kind.num_fields)), 0.0)
    if types.is_list(kind) or types.is_large_list(kind):
        first, last = array.offsets[0].as_py(), array.offsets[-1].as_py()
        return float(array.offsets.nbytes) + array_bytes(array.values.slice(first, last - first))
    return float(array.nbytes)


def _bytes_per_value(array: Any) -> float:
    return array_bytes(array) / max(1, len(array))


def _may_share_values(kind: Any) -> bool:
    """Return whether a type, or a type nested in it, may store a value once for several rows."""
    if isinstance(kind, pyarrow.BaseExtensionType):
        return _may_share_values(kind.storage_type)
    return (
        types.is_dictionary(kind)
        or types.is_run_end_encoded(kind)
        or types.is_union(kind)
        or _is_list_view(kind)
        or _is_text_view(kind)
        or any(_may_share_values(kind.field(index).type) for index in range(kind.num_fields))
    )


def _is_list_view(kind: Any) -> bool:
    return bool(types.is_list_view(kind) or types.is_large_list_view(kind))


def _is_text_view(kind: Any) -> bool:
    return bool(types.is_string_view(kind) or types.is_binary_view(kind))


def _count_values(array: Any) -> int:
    """Return the number of values in `array` and its children, each counted once."""
    return len(array) + sum(map(_count_values, _children(array))) if len(array) else 0


def _children(array: Any) -> list[Any]:
    kind = array.type
    if isinstance(array, pyarrow.ExtensionArray):
        return _children(array.storage)
    if types.is_dictionary(kind):
        return [array.dictionary]
    if types.is_run_end_encoded(kind) or _is_list_view(kind):
        return [array.values]
    if types.is_fixed_size_list(kind):
        return [array.values.slice(kind.list_size * array.offset, kind.list_size * len(array))]
    if types.is_list(kind) or types.is_large_list(kind) or types.is_map(kind):
        first, last = array.offsets[0].as_py(), array.offsets[-1].as_py()
        children = [array.keys, array.items] if types.is_map(kind) else [array.values]
        return [child.slice(first, last - first) for child in children]
    return [array.field(index) for index in range(kind.num_fields)]


def _value_sizes(array: Any, *, in_bytes: bool) -> Sizes:
    """Return the size of each value of `array`: its decoded bytes, or one plus the number of values inside it."""
    kind = array.type
    if isinstance(array, pyarrow.ExtensionArray):
        return _value_sizes(array.storage, in_bytes=in_bytes)
    if not len(array):
        return np.zeros(0)
    if types.is_dictionary(kind):
        indices = array.indices.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        return _take(_value_sizes(array.dictionary, in_bytes=in_bytes), indices)
    if types.is_run_end_encoded(kind):
        indices = np.arange(array.offset, array.offset + len(array))
        runs = np.searchsorted(array.run_ends.to_numpy(), indices, side="right")
        return _take(_value_sizes(array.values, in_bytes=in_bytes), runs)
    own = _own_sizes(array) if in_bytes else np.ones(len(array))
    if types.is_struct(kind):
        return own + sum(_value_sizes(part, in_bytes=in_bytes) for part in _children(array))
    if types.is_union(kind):
        return own + max(
            (float(_value_sizes(part, in_bytes=in_bytes).max(initial=0)) for part in _children(array)), default=0.0
        )
    if kind.num_fields:
        return own + _list_sizes(array, in_bytes=in_bytes)
    return own


def _take(sizes: Sizes, indices: npt.NDArray[np.int64]) -> Sizes:
    return sizes[indices] if len(sizes) else np.zeros(len(indices))  # without values, all indices are null


def _own_sizes(array: Any) -> Sizes:
    """Return the bytes of each value without those of its children."""
    kind = array.type
    if _is_text_view(kind):
        lengths = np.frombuffer(array.buffers()[1], np.int32)[::INTS_PER_VIEW][
            array.offset : array.offset + len(array)
        ]
        return np.where(array.is_valid().to_numpy(zero_copy_only=False), lengths, 0).astype(np.float64)
    if types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind) or types.is_large_binary(kind):
        lengths = compute.binary_length(array).fill_null(0)
        return np.asarray(lengths.to_numpy(zero_copy_only=False), dtype=np.float64)
    return np.zeros(len(array)) if kind.num_fields else np.full(len(array), array.nbytes / len(array))


def _list_sizes(array: Any, *, in_bytes: bool) -> Sizes:
    """Return the size of the contents of each list or map."""
    kind = array.type
    children = [array.keys, array.items] if types.is_map(kind) else [array.values]
    if types.is_fixed_size_list(kind):
        starts = kind.list_size * np.arange(array.offset, array.offset + len(array))
        ends = starts + kind.list_size
    elif _is_list_view(kind):
        starts = array.offsets.to_numpy().astype(np.int64)
        ends = starts + array.sizes.to_numpy()
    else:
        starts, ends = array.offsets.to_numpy()[:-1], array.offsets.to_numpy()[1:]
    sizes = np.zeros(len(array))
    for child in children:
        totals = np.concatenate([[0.0], np.cumsum(_value_sizes(child, in_bytes=in_bytes))])
        sizes += totals[ends] - totals[starts]
    return sizes
