"""Reading files: tables, samples, archives, and files that can't be read."""

import bz2
import gzip
import json
import lzma
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from qlora_cli.data.finding.sources import find_dataset
from qlora_cli.data.reading import hub_rows
from qlora_cli.data.reading.raw import estimate_bytes
from qlora_cli.data.reading.readers import read_rows
from qlora_cli.errors import DataError, MissingDependencyError
from tests.support.data.reading import problems_of, read, values_of, write

MIB = 1024**2


# CSV and TSV


def test_fields_are_text_with_or_without_quotes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", '\ufeffa,b\r\n1,\r\n\r\n"x, ""y""\nz",é\u2028\r\n')
    assert [(row.number, row.line, row.value) for row in read(path)] == [
        (1, 2, {"a": "1", "b": ""}),
        (2, 4, {"a": 'x, "y"\nz', "b": "é\u2028"}),
    ]
    path = write(tmp_path / "a.tsv", 'a\tb\n1,5\t"x\ty"\n')
    assert values_of(path) == [{"a": "1,5", "b": "x\ty"}]


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (b"1,2,3", "3 fields, the header has 2"),
        (b"1", "1 field, the header has 2"),
        (b"1,x\0y", "NUL byte at 2 of 'b'"),
        (b"1,caf\xe9", "not UTF-8 text (character 4 of 'b')"),
        (b'"1"2,3', "broken CSV: ',' expected after '\"'"),
    ],
)
def test_a_bad_record_is_a_row_with_a_problem_and_reading_continues(
    tmp_path: Path, record: bytes, problem: str
) -> None:
    path = write(tmp_path / "a.csv", b'a,b\n"1\n",2\n' + record + b"\n3,4\n")
    (first, _, _), (number, line, reported), (last, last_line, _) = problems_of(path)
    assert (first, number, line, last, last_line) == (1, 2, 4, 3, 5)
    assert str(reported).startswith(problem)


def test_an_unclosed_quote_does_not_silently_swallow_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'a,b\n1,2\n3,"4\n5,6\n')
    assert problems_of(path) == [
        (1, 2, None),
        (2, 3, "broken CSV: a quote that opens a field is not closed by the end of the file"),
    ]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"a,b,a\n1,2,3\n", "its header has the column 'a' more than once"),
        (b"caf\xe9,b\n1,2\n", "its first line is not a header: not UTF-8 text"),
        (b"\n\n", "its first line is not a header: there is none"),
        (b'"a,b\n', "its first line is not a header: broken CSV"),
    ],
)
def test_an_invalid_header_is_an_error(tmp_path: Path, content: bytes, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        read(write(tmp_path / "a.csv", content))


def test_fields_may_be_long(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "a,b\n" + "x" * MIB + ",2\n")
    assert len(values_of(path)[0]["a"]) == MIB


# Parquet and Arrow

TABLE = [
    {"a": number, "b": None if number % 2 else [{"c": number}, {"d": [None, {"e": None}]}]} for number in range(2500)
]
# What is read of it: keys of nested objects whose value is null are absent.
PLAIN = [{"a": row["a"], "b": row["b"] and [{"c": row["a"]}, {"d": [None, {}]}]} for row in TABLE]


def write_parquet(path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(TABLE), path, row_group_size=700)


def write_stream(path: Path) -> None:
    table = pyarrow.Table.from_pylist(TABLE)
    with pyarrow.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=1700)


def write_arrow_file(path: Path) -> None:
    table = pyarrow.Table.from_pylist(TABLE)
    with pyarrow.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=900)


def write_json_lines(path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n\n" for row in PLAIN))


def write_json_list(path: Path) -> None:
    path.write_text(json.dumps(PLAIN))


WRITERS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "parquet": ("a.parquet", write_parquet),
    "stream": ("a.arrow", write_stream),
    "arrow file": ("a.arrow", write_arrow_file),
    "lines": ("a.jsonl", write_json_lines),
    "list": ("a.json", write_json_list),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_file_type_yields_the_same_rows_and_sample(tmp_path: Path, kind: str) -> None:
    name, fill = WRITERS[kind]
    fill(tmp_path / name)
    rows = read(tmp_path / name)
    assert [row.value for row in rows] == PLAIN
    assert [row.number for row in rows] == list(range(1, 2501))
    for size in (1, 100, 2499, 2500):
        chosen = np.sort(np.random.default_rng(7).choice(2500, size, replace=False, shuffle=False)) + 1
        sample = read(f"{tmp_path / name}#{size}", seed=7)
        assert [row.number for row in sample] == chosen.tolist()
        assert [row.value for row in sample] == [PLAIN[number - 1] for number in chosen]


def test_invalid_utf8_in_a_column_is_a_problem_of_its_row(tmp_path: Path) -> None:
    column = pyarrow.array([b"a", b"caf\xe9", b"c"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    first, bad, last = read(tmp_path / "a.parquet")
    assert (first.value, last.value) == ({"text": "a"}, {"text": "c"})
    assert (bad.number, bad.value) == (2, None)
    assert bad.problem == "text: not UTF-8 text: byte 4 of 4 is 0xe9; it begins with b'caf\\xe9'"


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
@pytest.mark.parametrize("sample", ["", "#1"])
def test_a_file_of_another_type_than_its_suffix_is_an_error(tmp_path: Path, name: str, sample: str) -> None:
    path = write(tmp_path / name, b'{"text": "ab"}\n')
    with pytest.raises(DataError, match=f"{name} can't be read as .*It begins with b'{{\"text\"") as caught:
        read(f"{path}{sample}")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kind", ["parquet", "arrow file", "stream"])
def test_a_damaged_table_is_an_error(tmp_path: Path, kind: str) -> None:
    path = tmp_path / WRITERS[kind][0]
    WRITERS[kind][1](path)
    write(path, path.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"can't be read as|is damaged"):
        read(path)


# How much a row is, and what is held at once

LONG = {"a": "x" * 100_000, "b": [{"role": "user", "content": "yes"}]}


def write_long(path: Path) -> None:
    rows, table = [LONG, {"a": "short", "b": []}], pyarrow.Table.from_pylist([LONG])
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    elif path.suffix == ".arrow":
        with pyarrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    elif path.suffix == ".json":
        path.write_text(json.dumps({"data": rows} if path.stem == "wrapped" else rows))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        delimiter = "\t" if path.suffix == ".tsv" else ","
        path.write_text(f"a{delimiter}b\n{LONG['a']}{delimiter}\n")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "wrapped.json", "a.csv", "a.tsv", "a.parquet", "a.arrow"])
def test_every_reader_estimates_the_bytes_of_a_row(tmp_path: Path, name: str) -> None:
    write_long(tmp_path / name)
    first, *rest = read(tmp_path / name)
    assert first.value is not None
    assert 100_000 <= first.num_bytes <= 100_200
    assert all(0 < row.num_bytes < 100 for row in rest)


def test_nested_texts_count_in_the_estimate() -> None:
    messages = [{"role": "user", "content": "x" * 60_000}, {"role": "assistant", "content": ["y" * 40_000, None]}]
    assert 100_000 <= estimate_bytes({"messages": messages, "id": 7, "raw": b"abc"}) <= 100_050


def test_hub_rows_have_an_estimate_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_rows, "_load", lambda *_: datasets.Dataset.from_list([LONG]))
    (row,) = read("owner/name")
    assert row.value == LONG
    assert 100_000 <= row.num_bytes <= 100_050


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("is_dictionary", [False, True])
def test_columns_are_converted_four_megabytes_at_a_time(tmp_path: Path, suffix: str, is_dictionary: bool) -> None:
    texts = pyarrow.array([chr(97 + number % 20) * 100_000 for number in range(300)])
    table = pyarrow.table({"a": texts.dictionary_encode() if is_dictionary else texts})
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    tracemalloc.start()
    try:
        rows = [
            (row.num_bytes, (row.value or {})["a"][0])
            for row in read_rows(find_dataset(str(path)), split="train", seed=0)
        ]
        assert tracemalloc.get_traced_memory()[1] < 8 * MIB
    finally:
        tracemalloc.stop()
    assert [letter for _, letter in rows] == [chr(97 + number % 20) for number in range(300)]
    assert all(100_000 <= num_bytes < 100_100 for num_bytes, _ in rows)


# Samples, archives and files that can't be opened


@pytest.mark.parametrize("name", ["jsonl", "json", "csv", "jsonl.gz", "jsonl.zst", "parquet", "arrow"])
def test_a_file_name_that_is_not_utf8_is_read_and_printable(tmp_path: Path, name: str) -> None:
    plain = tmp_path / f"plain.{name}"
    if name in ("parquet", "arrow"):
        write_long(plain)
    else:
        content = b"a\n1\n" if name == "csv" else b'{"a": "1"}\n'
        write(plain, COMPRESSORS[name[6:]](content) if "." in name else content)
    plain.rename(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9." + name.encode()))
    (row,) = read(tmp_path)
    assert row.value is not None
    assert row.file == str(tmp_path / f"caf\ufffd.{name}")
    (sample,) = read(f"{tmp_path}#1")
    assert sample == row


def test_a_sample_is_drawn_from_all_files_and_depends_on_the_seed_only(tmp_path: Path) -> None:
    for name, count in (("a", 30), ("b", 50), ("c", 20)):
        write(tmp_path / f"{name}.jsonl", "".join(f'{{"n": "{name}{number}"}}\n' for number in range(count)))
    samples = [[row.value for row in read(f"{tmp_path}#40", seed)] for seed in (0, 0, 1)]
    everything = values_of(tmp_path)
    assert samples[0] == samples[1] != samples[2]
    assert [everything.index(value) for value in samples[0]] == sorted(everything.index(value) for value in samples[0])
    assert len({value["n"] for value in samples[0] if value}) == 40
    assert values_of(f"{tmp_path}#100") == everything


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv"])
def test_a_sample_larger_than_the_data_set_is_an_error_with_both_numbers(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a.{suffix}", 'a\n1\n"2\n3"\n' if suffix.endswith("sv") else '{"a": 1}\n[\n')
    assert len(read(f"{path}#2")) == 2
    with pytest.raises(DataError, match="asks for 3 rows, but has 2 rows"):
        read(f"{path}#3")


def test_a_file_that_shrinks_between_counting_and_reading_is_an_error(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.jsonl", '{"a": 1}\n'), write(tmp_path / "b.jsonl", '{"a": 2}\n' * 2)
    rows = read_rows(find_dataset(f"{tmp_path}#3"), split="train", seed=0)
    assert next(rows).file == str(first)
    write(second, '{"a": 2}\n')
    with pytest.raises(DataError, match="was changed while it was read"):
        list(rows)


def test_rows_appended_after_the_sample_was_drawn_are_not_in_it(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", '{"a": 1}\n')
    second = write(tmp_path / "b.jsonl", '{"a": 2}\n')
    rows = read_rows(find_dataset(f"{tmp_path}#2"), split="train", seed=0)
    next(rows)
    write(second, '{"a": 2}\n{"a": 3}\n')
    assert [row.value for row in rows] == [{"a": 2}]


def compress_zst(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as file:
        file.write(content)
    return bytes(sink.getvalue())


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": compress_zst,
}


@pytest.mark.parametrize("compression", COMPRESSORS)
@pytest.mark.parametrize(
    ("suffix", "content"),
    [("jsonl", '{"a": "1"}\n' * 5000), ("json", '[{"a": "1"}]'), ("csv", "a\n1\n"), ("tsv", "a\n1")],
)
def test_archives_are_read(tmp_path: Path, compression: str, suffix: str, content: str) -> None:
    archive = COMPRESSORS[compression](b"\xef\xbb\xbf" + content.encode())
    rows = values_of(write(tmp_path / f"a.{suffix}.{compression}", archive))
    assert rows == [{"a": "1"}] * (5000 if suffix == "jsonl" else 1)


@pytest.mark.parametrize("compression", COMPRESSORS)
def test_multi_part_archives_are_read_to_the_end(tmp_path: Path, compression: str) -> None:
    archive = b"".join(COMPRESSORS[compression](line) for line in (b'{"a": 1}\n', b'{"a": 2}\n'))
    assert values_of(write(tmp_path / f"a.jsonl.{compression}", archive)) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("compression", COMPRESSORS)
@pytest.mark.parametrize("damage", ["cut", "changed at 10", "changed at 50000"])
@pytest.mark.parametrize("sample", ["", "#1"])
def test_a_damaged_archive_is_an_error(tmp_path: Path, compression: str, damage: str, sample: str) -> None:
    archive = COMPRESSORS[compression](b'{"a": "' + np.random.default_rng(0).bytes(100_000).hex().encode() + b'"}\n')
    if damage == "cut":
        archive = archive[:-20]
    elif compression == "zst":
        pytest.skip("pyarrow writes Zstandard without a checksum")
    else:
        place = int(damage.removeprefix("changed at "))
        changed = bytes(byte ^ 255 for byte in archive[place : place + 9])
        archive = archive[:place] + changed + archive[place + 9 :]
    path = write(tmp_path / f"a.jsonl.{compression}", archive)
    with pytest.raises(DataError, match=f"a.jsonl.{compression} is damaged or truncated: "):
        read(f"{path}{sample}")


@pytest.mark.parametrize("compression", COMPRESSORS)
@pytest.mark.parametrize("sample", ["", "#1"])
def test_a_file_that_is_not_an_archive_is_distinguished_from_a_damaged_one(
    tmp_path: Path, compression: str, sample: str
) -> None:
    path = write(tmp_path / f"a.jsonl.{compression}", b'{"a": 1}\n' * 50)
    with pytest.raises(DataError) as caught:
        read(f"{path}{sample}")
    assert str(caught.value) == f"{path} is not a .{compression} archive: it starts with b'{{\"a\": 1}}'"
    assert f"take .{compression} off its name" in str(caught.value.hint)


def test_a_pyarrow_build_without_zstandard_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Codec:
        @staticmethod
        def is_available(_: str) -> bool:
            return False

    monkeypatch.setattr(pyarrow, "Codec", Codec)
    with pytest.raises(MissingDependencyError, match=r"a\.jsonl\.zst is compressed with Zstandard"):
        read(write(tmp_path / "a.jsonl.zst", b"x"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.arrow", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_deleted_file_is_an_error(tmp_path: Path, name: str) -> None:
    source = find_dataset(str(write(tmp_path / name, b"x")))
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=f"{name} can't be read: No such file"):
        list(read_rows(source, split="train", seed=0))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", b"x").chmod(0)
    with pytest.raises(DataError, match=r"a\.jsonl can't be read: Permission denied"):
        read(tmp_path / "a.jsonl")
