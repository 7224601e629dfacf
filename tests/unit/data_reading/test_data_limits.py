"""A damaged or hostile file can't crash the process, leak its memory, or take unbounded time."""

import bz2
import gzip
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from qlora_cli.data import limits
from qlora_cli.data.finding.sources import find_dataset
from qlora_cli.data.reading import arrow_messages, json_files, parquet_groups, raw, tables
from qlora_cli.data.reading.parquet_groups import BATCH_ROWS, decodable_rows
from qlora_cli.data.reading.raw import RawRow, Selection
from qlora_cli.data.reading.readers import read_rows
from qlora_cli.data.rows.column_formats import columns_in_use
from qlora_cli.data.rows.examples import RowError
from qlora_cli.errors import DataError
from qlora_cli.settings.models import DataSettings
from qlora_cli.units import MIB
from tests.support.data.reading import problems_of, read, values_of, write

DEEP = "nested too deeply to be read (more than 100 lists and objects in each other)"


# Arrow and Parquet


def text_column(offsets: list[int], text: bytes = b"hello, friends") -> Any:
    """Return a column of text whose offsets are as given, unchecked."""
    places = pyarrow.array(offsets, pyarrow.int32()).buffers()[1]
    return pyarrow.StringArray.from_buffers(len(offsets) - 1, places, pyarrow.py_buffer(text))


def write_column(path: Path, column: Any, *, as_stream: bool) -> Path:
    batch = pyarrow.record_batch([column], names=["text"])
    make = pyarrow.ipc.new_stream if as_stream else pyarrow.ipc.new_file
    with make(path, batch.schema) as writer:
        writer.write_batch(batch)
    return path


def damaged(path: Path, before: list[int], after: list[int], wrap: Callable[[Any], Any], *, as_stream: bool) -> Path:
    """Write a column of text, and change the offsets in its file."""
    write_column(path, wrap(text_column(before)), as_stream=as_stream)
    old, new = (
        b"".join(number.to_bytes(4, "little", signed=True) for number in numbers) for numbers in (before, after)
    )
    content = path.read_bytes()
    assert content.count(old) == 1
    return write(path, content.replace(old, new))


WRAPS: dict[str, Callable[[Any], Any]] = {
    "text": lambda column: column,
    "list": lambda column: pyarrow.ListArray.from_arrays(pyarrow.array([0, 1, 2], pyarrow.int32()), column),
    "object": lambda column: pyarrow.StructArray.from_arrays([column], ["content"]),
    "next to invalid UTF-8": lambda column: pyarrow.StructArray.from_arrays(
        [text_column([0, 1, 2], b"\xe9\xe9"), column], ["a", "content"]
    ),
}


@pytest.mark.parametrize("as_stream", [True, False])
@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("after", [[0, 400_000, 14], [0, 7, 3000], [0, -5, 14], [-1_929_379_840, 7, 14], [0, 9, 7]])
def test_offsets_outside_of_an_arrow_file_are_never_followed(
    tmp_path: Path, after: list[int], wrap: str, as_stream: bool
) -> None:
    path = damaged(tmp_path / "a.arrow", [0, 7, 14], after, WRAPS[wrap], as_stream=as_stream)
    with pytest.raises(DataError, match=r"a\.arrow can't be read as \.arrow: .*[Oo]ffset"):
        read(path)


@pytest.mark.parametrize("wrap", WRAPS)
def test_invalid_utf8_in_an_arrow_file_is_a_problem_of_its_row(tmp_path: Path, wrap: str) -> None:
    path = write_column(tmp_path / "a.arrow", WRAPS[wrap](text_column([0, 1, 2], b"a\xe9")), as_stream=False)
    assert "not UTF-8 text: byte 1 of 1 is 0xe9" in str(problems_of(path)[1][2])


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_unused_columns_are_named_but_not_decompressed(tmp_path: Path, suffix: str) -> None:
    plain = {"prompt": ["a", "b"], "completion": ["c", "d"], "junk": ["#" * 5000 + str(n) for n in range(2)]}
    table, path = pyarrow.table(plain), tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(table, path, compression="zstd", use_dictionary=False)
    else:
        options = pyarrow.ipc.IpcWriteOptions(compression="zstd")
        with pyarrow.ipc.new_file(path, table.schema, options=options) as writer:
            writer.write_table(table)
    # The frames of Zstandard; the last one is that of the last column.
    content = path.read_bytes()
    place = content.rindex(b"\x28\xb5\x2f\xfd")
    write(path, content[: place + 4] + b"\xff\xff\xff" + content[place + 7 :])
    with pytest.raises(DataError, match=r"a\.(parquet|arrow) is damaged"):
        read(path)
    settings = DataSettings(dataset=[str(path)])
    selection = Selection(columns=lambda columns: columns_in_use(columns, settings, "a"))
    values = [row.value for row in read_rows(find_dataset(str(path)), split="train", seed=0, selection=selection)]
    assert values == [{"prompt": p, "completion": c, "junk": None} for p, c in (("a", "c"), ("b", "d"))]
    sample = read_rows(find_dataset(f"{path}#1"), split="train", seed=0, selection=selection)
    assert [row.value for row in sample if row.value not in values] == []


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "csv"])
def test_too_many_columns_are_an_error_with_both_numbers(tmp_path: Path, suffix: str) -> None:
    names, path = [f"c{number}" for number in range(limits.MAX_COLUMNS + 1)], tmp_path / f"a.{suffix}"
    table = pyarrow.table({name: [1] for name in names})
    if suffix == "parquet":
        pyarrow.parquet.write_table(table, path)
    elif suffix == "arrow":
        with pyarrow.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    else:
        write(path, ",".join(names) + "\n" + ",".join(["1"] * len(names)) + "\n")
    with pytest.raises(DataError, match=r"a\.\w+ has 1,001 columns, more than 1,000"):
        read(path)


@pytest.mark.slow
def test_a_value_that_many_rows_share_is_not_decoded_for_all_of_them_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        limits, "ALWAYS_ALLOWED_BYTES", 4096 * MIB
    )  # so that all may be decoded, one part after another
    text, path = "x" * 2_000_000, tmp_path / "a.parquet"
    for chat in (False, True):
        texts = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 1000, pyarrow.int32()), pyarrow.array([text]))
        column = pyarrow.StructArray.from_arrays([texts], ["content"]) if chat else texts
        pyarrow.parquet.write_table(
            pyarrow.table({"text": column}),
            path,
            dictionary_pagesize_limit=2**30,
            store_schema=False,
            compression="zstd",
        )
        before, most, count = pyarrow.total_allocated_bytes(), 0, 0
        for row in read_rows(find_dataset(str(path)), split="train", seed=0):
            most, count = max(most, pyarrow.total_allocated_bytes() - before), count + 1
            assert row.value == {"text": {"content": text} if chat else text}
        assert count == 1000
        assert 100 * MIB < most < 800 * MIB


def test_an_ordinary_dictionary_is_read_hundreds_of_rows_at_a_time(tmp_path: Path) -> None:
    texts = [f"{number} " * 100 for number in range(3000)]
    table = pyarrow.table({"text": texts, "ids": [[number] * 900 for number in range(3000)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with (tmp_path / "a.parquet").open("rb") as file:
        group = pyarrow.parquet.ParquetFile(file).metadata.row_group(0)
        assert group.column(0).has_dictionary_page
        assert group.column(1).has_dictionary_page
        assert 100 <= decodable_rows(file, group, ["text", "ids"], "a") < BATCH_ROWS
        assert decodable_rows(file, group, ["ids"], "a") == BATCH_ROWS


def test_a_column_that_expands_too_much_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_groups, "ALWAYS_ALLOWED_BYTES", MIB)
    table, path = pyarrow.table({"text": ["x" * 3 * MIB], "n": [1]}), tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, path, compression="zstd", use_dictionary=False)
    with pytest.raises(DataError, match=r"a\.parquet: the column text expands to more than 200 times its size"):
        read(path)
    selection = Selection(columns=lambda _: ["n"])
    assert len(list(read_rows(find_dataset(str(path)), split="train", seed=0, selection=selection))) == 1


@pytest.mark.parametrize("as_stream", [True, False])
@pytest.mark.parametrize("is_dictionary", [True, False])
@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_a_compressed_arrow_file_that_expands_too_much_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_stream: bool, is_dictionary: bool, compression: str
) -> None:
    texts = pyarrow.array(["x" * 8 * MIB])
    batch = pyarrow.record_batch([texts.dictionary_encode() if is_dictionary else texts], names=["text"])
    path, options = tmp_path / "a.arrow", pyarrow.ipc.IpcWriteOptions(compression=compression)
    make = pyarrow.ipc.new_stream if as_stream else pyarrow.ipc.new_file
    with make(path, batch.schema, options=options) as writer:
        writer.write_batch(batch)
    assert len(values_of(path)) == 1
    monkeypatch.setattr(arrow_messages, "ALWAYS_ALLOWED_BYTES", MIB)
    with pytest.raises(DataError, match=r"a\.arrow expands to more than 200 times its size, to 8\.00 MiB at once"):
        read(path)
    # One that is as large but not compressed is read.
    with make(path, batch.schema) as writer:
        writer.write_batch(batch)
    assert len(values_of(path)) == 1


def columns_of_every_kind() -> dict[str, Any]:
    """Return columns of one row each, which have any number of parts in a message."""
    text = pyarrow.array(["a" * 20])
    return {
        "null": pyarrow.nulls(1),
        "number": pyarrow.array([1]),
        "view": text.cast(pyarrow.string_view()),
        "views": pyarrow.array([[{"x": "b" * 20, "y": None}]], pyarrow.list_(VIEWS)),
        "map": pyarrow.array([[("k", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int8())),
        "few": pyarrow.array([[1, 2]], pyarrow.list_(pyarrow.int8(), 2)),
        "union": pyarrow.UnionArray.from_dense(
            pyarrow.array([0], pyarrow.int8()), pyarrow.array([0], "int32"), [text]
        ),
        "runs": pyarrow.RunEndEncodedArray.from_arrays([1], text),
        "own": pyarrow.array([b"0" * 16], pyarrow.uuid()),
    }


VIEWS = pyarrow.struct([("x", pyarrow.string_view()), ("y", pyarrow.binary_view())])


@pytest.mark.parametrize("as_stream", [True, False])
def test_an_unused_column_may_expand_without_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_stream: bool
) -> None:
    monkeypatch.setattr(arrow_messages, "ALWAYS_ALLOWED_BYTES", MIB)
    large = pyarrow.array(["x" * 8 * MIB])
    each = {**columns_of_every_kind(), "large": large, "text": pyarrow.array(["t"])}
    for order in (list(each), list(each)[::-1]):
        batch = pyarrow.record_batch([each[name] for name in order], names=order)
        path, options = tmp_path / "a.arrow", pyarrow.ipc.IpcWriteOptions(compression="zstd")
        make = pyarrow.ipc.new_stream if as_stream else pyarrow.ipc.new_file
        with make(path, batch.schema, options=options) as writer:
            writer.write_batch(batch)
        for name in set(each) - {"large"}:
            (row,) = read_columns(path, name)
            assert row.value is not None
            assert row.value["large"] is None
        with pytest.raises(DataError, match="expands to more than 200 times its size"):
            read_columns(path, "large")


def read_columns(path: Path, *names: str) -> list[RawRow]:
    selection = Selection(columns=lambda _: names)
    return list(read_rows(find_dataset(str(path)), split="train", seed=0, selection=selection))


def test_a_file_truncated_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path, table = tmp_path / "a.arrow", pyarrow.table({"text": ["x" * 100] * 50_000})
    with pyarrow.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)
    rows = read_rows(find_dataset(str(path)), split="train", seed=0)
    next(rows)
    os.truncate(path, 10_000)
    with pytest.raises(DataError, match=r"a\.arrow .*truncated"):
        list(rows)


def test_a_duplicate_column_is_an_error(tmp_path: Path) -> None:
    batch = pyarrow.record_batch([pyarrow.array(["a"])] * 2, names=["text", "text"])
    with pyarrow.ipc.new_file(tmp_path / "a.arrow", batch.schema) as writer:
        writer.write_batch(batch)
    with pytest.raises(DataError, match="has the column 'text' more than once"):
        read(tmp_path / "a.arrow")


# Text


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json"])
def test_a_row_that_is_too_long_is_a_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for module in (json_files, tables):
        monkeypatch.setattr(module, "MAX_ROW_BYTES", 1000)
    monkeypatch.setattr("qlora_cli.data.reading.json_text.MAX_ROW_BYTES", 1000)
    monkeypatch.setattr("qlora_cli.data.reading.json_text.WINDOW_BYTES", 100)
    long, short = "x" * 5000, "y" * 900
    if name == "a.csv":
        content = f"text\n{short}\n{long}\n{short}\n"
    elif name == "a.jsonl":
        content = "".join(json.dumps({"text": text}) + "\n" for text in (short, long, short))
    else:
        content = json.dumps([{"text": text} for text in (short, long, short)])
    problems = [problem for _, _, problem in problems_of(write(tmp_path / name, content))]
    assert problems[0] is None
    assert "longer than 64.00 MiB" in str(problems[1])
    if name != "a.json":  # where the end of the long row is unknown
        assert problems[2] is None


def test_long_last_lines_and_headers_are_limited_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (json_files, tables):
        monkeypatch.setattr(module, "MAX_ROW_BYTES", 1000)
    path = write(tmp_path / "a.jsonl", '{"a": "b"}\n' + "x" * 5000)
    assert [problem for _, _, problem in problems_of(path)] == [None, "the line is longer than 64.00 MiB"]
    assert len(read(f"{path}#2")) == 2
    with pytest.raises(DataError, match="is not a header: the line is longer than"):
        read(write(tmp_path / "a.csv", "x" * 5000))


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".bz2", bz2.compress)])
def test_an_archive_that_expands_too_much_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    monkeypatch.setattr(raw, "ALWAYS_ALLOWED_BYTES", 2**20)
    path = write(tmp_path / f"a.jsonl{suffix}", compress(b'{"text": "' + b"a" * 2**24))
    with pytest.raises(DataError, match=rf"a\.jsonl\{suffix} expands to more than 200 times its size"):
        read(path)
    # As much text as is usual is read, however much that is.
    chance = np.random.default_rng(0)
    lines = [json.dumps({"text": chance.bytes(500).hex()}) for _ in range(3000)]
    assert len(values_of(write(path, compress("\n".join(lines).encode())))) == 3000


@pytest.mark.parametrize(
    ("name", "begin"), [("a.jsonl", ""), ("a.jsonl", '{"text": "x"}'), ("a.json", '{"text": "x"}'), ("a.csv", "text")]
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_too_many_blank_lines_are_an_error_with_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, begin: str, end: str
) -> None:
    monkeypatch.setattr(limits, "MAX_BLANK_LINES", 1000)
    path = write(tmp_path / name, begin + end * 2000)
    for sample in ("", "#1"):
        with pytest.raises(
            DataError, match=rf"{name} has 1,0[01]1 blank lines and (0 rows|1 row) so far.* than 1,000, and 10"
        ):
            read(f"{path}{sample}")


@pytest.mark.parametrize(("name", "header", "row"), [("a.jsonl", "", '{"text": "x"}'), ("a.csv", "text", "x")])
def test_ten_blank_lines_per_row_are_always_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, header: str, row: str
) -> None:
    monkeypatch.setattr(limits, "MAX_BLANK_LINES", 100)
    path = write(tmp_path / name, f"{header}\n" + f"{row}\n\n\n\n\n\n\n\n\n\n\n" * 1000)
    assert values_of(path) == [{"text": "x"}] * 1000


@pytest.mark.parametrize(
    "value",
    [
        '{"a": ' + "[" * 100 + "]" * 100 + "}",
        '{"a": ' + '{"b":' * 900 + "1" + "}" * 900 + "}",
        '{"a": ' + "[" * 10**5 + "]" * 10**5 + "}",
    ],
)
def test_a_row_that_nests_too_deeply_is_a_bad_row(tmp_path: Path, value: str) -> None:
    path = write(tmp_path / "a.jsonl", f'{{"a": 1}}\n{value}\n{{"a": 2}}\n')
    assert [problem for _, _, problem in problems_of(path)] == [None, DEEP, None]


def test_the_deepest_allowed_row_and_many_flat_values_are_rows(tmp_path: Path) -> None:
    deep = '{"a": ' + "[" * 99 + "]" * 99 + "}"
    flat = json.dumps({"a": [[{}]] * 1000})
    assert len(values_of(write(tmp_path / "a.jsonl", f"{deep}\n{flat}\n"))) == 2


def test_a_row_with_too_many_keys_is_a_bad_row(tmp_path: Path) -> None:
    wide = json.dumps({f"k{number}": 1 for number in range(1001)})
    path = write(tmp_path / "a.jsonl", f'{{"a": 1}}\n{wide}\n')
    assert [problem for _, _, problem in problems_of(path)] == [None, "1,001 keys, more than 1,000"]


def test_a_header_of_a_million_names_is_an_error_immediately(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", ",".join(f"c{number}" for number in range(10**6)) + "\n")
    begin = time.monotonic()
    with pytest.raises(DataError, match="has 1,000,000 columns"):
        read(path)
    assert time.monotonic() - begin < 20


def test_messages_truncate_many_or_long_names() -> None:
    assert limits.join_names(["a", "b"]) == "a, b"
    assert limits.join_names([f"c{number}" for number in range(30)]).endswith("c19, and 10 more")
    assert len(limits.join_names(["x" * 10**6])) < 100


def test_messages_truncate_values_of_rows() -> None:
    assert str(RowError("short")) == "short"
    assert len(str(RowError("x" * 10**6))) < 600
