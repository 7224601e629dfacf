"""A columnar file is not decoded into far more rows, values or bytes than it has bytes, whatever its types allow."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from qlora_cli.data import limits
from qlora_cli.data.reading.columnar import count_arrow, count_parquet, read_arrow, read_parquet
from qlora_cli.errors import DataError

ROWS = "has more than 10 rows for each of its bytes, and 100,000"
VALUES = "has more than 200 values for each of its bytes, and 16,777,216"
BYTES = r"expands to more than 200 times its size, and 256\.00 MiB"
TEXT = "x" * 2_000_000
NO_OBJECTS = pyarrow.struct([])


def write_arrow(path: Path, column: Any, *, as_stream: bool = False) -> Path:
    batch = pyarrow.RecordBatch.from_arrays([column], names=["text"])
    with (pyarrow.ipc.new_stream if as_stream else pyarrow.ipc.new_file)(path, batch.schema) as writer:
        writer.write_batch(batch)
    return path


def runs(num_rows: int, value: Any) -> Any:
    return pyarrow.RunEndEncodedArray.from_arrays(pyarrow.array([num_rows], pyarrow.int32()), value)


def shared(value: Any, num_rows: int) -> Any:
    """Return the last of `value` for `num_rows` rows."""
    return pyarrow.DictionaryArray.from_arrays(np.full(num_rows, len(value) - 1, np.int32), value)


def fixed_lists(num_rows: int, size: int) -> Any:
    kind, values = pyarrow.list_(pyarrow.null(), size), pyarrow.nulls(num_rows * size)
    return pyarrow.Array.from_buffers(kind, num_rows, [None], children=[values])


def one_list(values: Any) -> Any:
    return pyarrow.ListArray.from_arrays(pyarrow.array([0, len(values)], pyarrow.int32()), values)


def one_map(values: Any) -> Any:
    return pyarrow.MapArray.from_arrays(pyarrow.array([0, len(values)], pyarrow.int32()), values, values)


def views(num_rows: int) -> Any:
    """Return rows of text that all lie at one place."""
    view = np.array([len(TEXT), int.from_bytes(TEXT[:4].encode(), "little"), 0, 0], np.int32)
    buffers = [None, pyarrow.py_buffer(np.tile(view, num_rows)), pyarrow.py_buffer(TEXT.encode())]
    return pyarrow.Array.from_buffers(pyarrow.string_view(), num_rows, buffers)


def list_views(num_rows: int, values: Any) -> Any:
    offsets, sizes = np.zeros(num_rows, np.int32), np.full(num_rows, len(values), np.int32)
    return pyarrow.ListViewArray.from_arrays(pyarrow.array(offsets), pyarrow.array(sizes), values)


BOMBS: dict[str, tuple[Callable[[], Any], str]] = {
    "nulls": (lambda: pyarrow.nulls(2**25), ROWS),
    "runs": (lambda: runs(2**30, pyarrow.array(["a"])), ROWS),
    "empty objects": (lambda: pyarrow.StructArray.from_buffers(NO_OBJECTS, 10**8, [None]), ROWS),
    "empty lists": (lambda: fixed_lists(10**9, 0), ROWS),
    "list of nulls": (lambda: one_list(pyarrow.nulls(2**31 - 1)), VALUES),
    "list of runs": (lambda: one_list(runs(2**30, pyarrow.array(["a"]))), VALUES),
    "fixed list of nulls": (lambda: fixed_lists(1, 2**30), VALUES),
    "list in a list": (lambda: one_list(fixed_lists(2**13, 2**13)), VALUES),
    "list of empty objects": (lambda: one_list(pyarrow.StructArray.from_buffers(NO_OBJECTS, 2**30, [None])), VALUES),
    "views of a list": (lambda: list_views(10_000, pyarrow.nulls(10_000)), VALUES),
    "dictionary of a list": (lambda: shared(one_list(pyarrow.nulls(2**20)), 1000), VALUES),
    "runs of a list": (lambda: runs(1000, one_list(pyarrow.nulls(2**20))), VALUES),
    "dictionary": (lambda: shared(pyarrow.array([TEXT]), 1000), BYTES),
    "dictionary of which one is long": (lambda: shared(pyarrow.array(["a"] * 100_000 + [TEXT]), 1000), BYTES),
    "dictionary of lists of text": (lambda: shared(one_list(pyarrow.array([TEXT])), 1000), BYTES),
    "dictionary of maps": (lambda: shared(one_map(pyarrow.array([TEXT])), 1000), BYTES),
    "dictionary of objects": (
        lambda: shared(pyarrow.StructArray.from_arrays([pyarrow.array([TEXT])], names=["a"]), 1000),
        BYTES,
    ),
    "dictionary in an object": (
        lambda: pyarrow.StructArray.from_arrays([shared(pyarrow.array([TEXT]), 1000)], names=["a"]),
        BYTES,
    ),
    "runs of text": (lambda: runs(1000, pyarrow.array([TEXT])), BYTES),
    "views of text": (lambda: views(1000), BYTES),
    "views of a list of text": (lambda: list_views(1000, pyarrow.array([TEXT])), BYTES),
}


@pytest.mark.parametrize("as_stream", [True, False])
@pytest.mark.parametrize("name", BOMBS)
def test_an_arrow_file_that_expands_too_much_is_refused_before_decoding(
    tmp_path: Path, name: str, as_stream: bool
) -> None:
    make, expected = BOMBS[name]
    path = write_arrow(tmp_path / "a.arrow", make(), as_stream=as_stream)
    with pytest.raises(DataError, match=expected) as caught:
        next(read_arrow(path))
    assert str(path) in str(caught.value)
    assert caught.value.hint


def test_the_budget_is_shared_by_all_batches(tmp_path: Path) -> None:
    batch = pyarrow.RecordBatch.from_arrays([pyarrow.nulls(60_000)], names=["text"])
    path = tmp_path / "a.arrow"
    with pyarrow.ipc.new_file(path, batch.schema) as writer:
        for _ in range(2):
            writer.write_batch(batch)
    with pytest.raises(DataError, match=ROWS):
        list(read_arrow(path))


def test_counting_rows_respects_the_budget(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=ROWS):
        count_arrow(write_arrow(tmp_path / "a.arrow", pyarrow.nulls(2**25)))
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.nulls(200_000)}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=ROWS):
        count_parquet(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (lambda: pyarrow.nulls(200_000, pyarrow.string()), ROWS),
        (lambda: pyarrow.array(["the same"] * 200_000), ROWS),
        (lambda: one_list(pyarrow.nulls(2**24 + 1, pyarrow.int8())), VALUES),
        (lambda: shared(pyarrow.array([TEXT]), 1000), BYTES),
    ],
)
def test_a_parquet_file_that_expands_too_much_is_refused(
    tmp_path: Path, column: Callable[[], Any], expected: str
) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": column()}), path)
    with pytest.raises(DataError, match=expected):
        for _ in read_parquet(path):
            pass


@pytest.mark.parametrize(
    "column",
    [
        lambda: shared(pyarrow.array(["You are a helpful assistant. " * 40]), 20_000),
        lambda: pyarrow.array([[1, 2, 3] + [0] * 2045] * 500, pyarrow.list_(pyarrow.int32())),
        lambda: pyarrow.array(
            [{"a": None, "b": [{"c": None}]}] * 5000,
            pyarrow.struct({"a": pyarrow.null(), "b": pyarrow.list_(pyarrow.struct({"c": pyarrow.string()}))}),
        ),
        lambda: runs(5000, pyarrow.array(["a text of some words"])),
        lambda: list_views(100, pyarrow.array(["a"] * 10)),
        lambda: pyarrow.array([], pyarrow.list_(pyarrow.list_(pyarrow.string()))),
        lambda: pyarrow.array([[]] * 3, pyarrow.list_(pyarrow.list_(pyarrow.string()))),
    ],
)
def test_columns_of_real_data_sets_are_read_in_full(tmp_path: Path, column: Callable[[], Any]) -> None:
    values = column()
    path = write_arrow(tmp_path / "a.arrow", values)
    assert len(list(read_arrow(path))) == count_arrow(path) == len(values)


def test_the_budget_grows_with_the_file() -> None:
    for num_bytes in (10**6, 10**9):
        allowance = limits.DecodingBudget("a", num_bytes)
        allowance.check(num_rows=10 * num_bytes, num_values=200 * num_bytes, num_bytes=200 * num_bytes)
        with pytest.raises(DataError, match=ROWS):
            allowance.check(num_rows=10 * num_bytes + 1)
