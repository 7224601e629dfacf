"""Values of Parquet and Arrow files: those of each type equal JSON lines, or their row is a bad one."""

import json
from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from qlora_cli.data.finding.sources import find_dataset
from qlora_cli.data.opening.layouts import open_rows
from qlora_cli.data.reading import hub_rows
from qlora_cli.data.reading.raw import RawRow, Selection
from qlora_cli.data.reading.readers import read_rows
from qlora_cli.data.rows.column_formats import columns_in_use
from qlora_cli.errors import DataError
from qlora_cli.settings.models import DataSettings
from qlora_cli.settings.objectives import DataFormat
from tests.support.data.reading import read, values_of, write

Array = Any
FAR_FUTURE = 2**62
NOT_TEXT = b"caf\xe9"


def of(kind: Any, *numbers: int) -> Array:
    """Return an array that stores `numbers` unchanged, whatever its type makes of them."""
    stored = pyarrow.int32() if kind.bit_width == 32 else pyarrow.int64()
    return pyarrow.array(numbers, stored).view(kind)


def stored(kind: Any, values: Sequence[Any]) -> Array:
    return pyarrow.ExtensionArray.from_storage(kind, pyarrow.array(values, kind.storage_type))


def as_json(*texts: str | None) -> Array:
    return stored(pyarrow.json_(), texts)


def runs(ends: list[int], values: list[Any]) -> Array:
    return pyarrow.RunEndEncodedArray.from_arrays(pyarrow.array(ends, pyarrow.int32()), pyarrow.array(values))


def list_views(offsets: list[int], sizes: list[int], values: list[Any]) -> Array:
    places = (pyarrow.array(numbers, pyarrow.int32()) for numbers in (offsets, sizes))
    return pyarrow.ListViewArray.from_arrays(*places, pyarrow.array(values))


def union(codes: list[int], *children: list[Any], offsets: list[int] | None = None) -> Array:
    arrays, kinds = [pyarrow.array(child) for child in children], pyarrow.array(codes, pyarrow.int8())
    if offsets is None:
        return pyarrow.UnionArray.from_sparse(kinds, arrays)
    return pyarrow.UnionArray.from_dense(kinds, pyarrow.array(offsets, pyarrow.int32()), arrays)


def maps(*values: list[tuple[str, int | None]] | None) -> Array:
    return pyarrow.array(values, pyarrow.map_(pyarrow.string(), pyarrow.int64()))


def write_parquet(path: Path, columns: dict[str, Array]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def write_arrow(path: Path, columns: dict[str, Array], *, as_stream: bool = False) -> Path:
    batch = pyarrow.record_batch(list(columns.values()), names=list(columns))
    make = pyarrow.ipc.new_stream if as_stream else pyarrow.ipc.new_file
    with make(path, batch.schema) as writer:
        writer.write_batch(batch)
    return path


def read_in_use(path: Path) -> list[RawRow]:
    """Return rows as training reads them: of the columns in use."""
    settings = DataSettings(dataset=str(path))
    selection = Selection(columns=partial(columns_in_use, settings=settings, name=path.name))
    return list(read_rows(find_dataset(str(path)), split="train", seed=0, selection=selection))


# What becomes of each type

VALUES: dict[str, tuple[Array, Sequence[Any]]] = {
    "bytes": (pyarrow.array([b"caf\xc3\xa9", None]), ["café", None]),
    "bytes of one length": (pyarrow.array([b"ab"], pyarrow.binary(2)), ["ab"]),
    "large bytes": (pyarrow.array([b"ab"], pyarrow.large_binary()), ["ab"]),
    "a view of bytes": (pyarrow.array([b"ab"], pyarrow.binary_view()), ["ab"]),
    "a view of text": (pyarrow.array(["é", None], pyarrow.string_view()), ["é", None]),
    "a half": (pyarrow.array([1.5, None], pyarrow.float16()), [1.5, None]),
    "a whole decimal": (pyarrow.array([Decimal("7.00"), None]), [7, None]),
    "a decimal": (pyarrow.array([Decimal("1.50")]), [1.5]),
    "a long decimal": (pyarrow.array([Decimal("1.00000000000000000001")]), ["1.00000000000000000001"]),
    "a date": (of(pyarrow.date32(), 0, -719162, 2932896), ["1970-01-01", "0001-01-01", "9999-12-31"]),
    "a date in milliseconds": (of(pyarrow.date64(), 86_400_000), ["1970-01-02"]),
    "a moment": (of(pyarrow.timestamp("ms"), 1, -1), ["1970-01-01T00:00:00.001000", "1969-12-31T23:59:59.999000"]),
    "a nanosecond": (of(pyarrow.timestamp("ns"), 1, 0), ["1970-01-01T00:00:00.000000001", "1970-01-01T00:00:00"]),
    "a moment in UTC": (of(pyarrow.timestamp("s", "UTC"), 0), ["1970-01-01T00:00:00+00:00"]),
    "a moment in a zone by offset": (of(pyarrow.timestamp("s", "-05:30"), 0), ["1969-12-31T18:30:00-05:30"]),
    "a moment in a zone by name": (of(pyarrow.timestamp("s", "Asia/Tokyo"), 0), ["1970-01-01T09:00:00+09:00"]),
    "a time": (of(pyarrow.time32("s"), 86399), ["23:59:59"]),
    "a time in nanoseconds": (of(pyarrow.time64("ns"), 1), ["00:00:00.000000001"]),
    "a duration": (of(pyarrow.duration("ms"), 90_500, -1000), ["PT90.500000S", "-PT1S"]),
    "a long duration": (of(pyarrow.duration("s"), FAR_FUTURE), [f"PT{FAR_FUTURE}S"]),
    "an interval": (pyarrow.array([pyarrow.MonthDayNano([1, -2, 500_000_000])]), ["P1M-2DT0.500000S"]),
    "a dictionary": (pyarrow.array(["a", "b", None, "a"]).dictionary_encode(), ["a", "b", None, "a"]),
    "runs": (runs([2, 3], ["a", None]), ["a", "a", None]),
    "a fixed list": (pyarrow.array([[1, 2], None], pyarrow.list_(pyarrow.int8(), 2)), [[1, 2], None]),
    "a view of lists": (list_views([1, 0], [1, 2], ["a", "b"]), [["b"], ["a", "b"]]),
    "a map": (maps([("a", 1), ("b", None)], None), [{"a": 1, "b": None}, None]),
    "a map by number": (pyarrow.array([[(1, "x")]], pyarrow.map_(pyarrow.int64(), pyarrow.string())), [{"1": "x"}]),
    "an object of nothing": (pyarrow.array([{}, None], pyarrow.struct([])), [{}, None]),
    "JSON": (as_json('{"a": [1, null, "x"]}', "1.5", '"1.5"', None), [{"a": [1, None, "x"]}, 1.5, "1.5", None]),
    "a union": (union([0, 1, 0], ["a", "b", "c"], [1, None, 3]), ["a", None, "c"]),
    "a dense union": (union([0, 1, 0], ["a", "b"], [1], offsets=[0, 0, 1]), ["a", 1, "b"]),
    "a UUID": (stored(pyarrow.uuid(), [bytes(16), None]), [str(UUID(int=0)), None]),
    "a byte of true or false": (stored(pyarrow.bool8(), [2, 0, None]), [True, False, None]),
}


@pytest.mark.parametrize("kind", VALUES)
def test_values_of_each_type_equal_their_json(tmp_path: Path, kind: str) -> None:
    array, expected = VALUES[kind]
    values = [row["a"] for row in values_of(write_arrow(tmp_path / "a.arrow", {"a": array}))]
    assert values == list(expected)
    assert list(map(type, values)) == list(map(type, expected))
    json.dumps(values)


BAD: dict[str, tuple[Array, str]] = {
    "bytes": (pyarrow.array([NOT_TEXT, b"a"]), r"a: not UTF-8 text: byte 4 of 4 is 0xe9; it begins with b'caf\xe9'"),
    "text": (pyarrow.array([NOT_TEXT, b"a"]).view(pyarrow.string()), "a: not UTF-8 text"),
    "a year": (of(pyarrow.timestamp("s"), FAR_FUTURE, 0), "a: a date and time outside of the years 1 to 9999"),
    "a year in a zone": (of(pyarrow.timestamp("ms", "Asia/Tokyo"), 253402300799000, 0), "outside of the years 1 to"),
    "a date": (of(pyarrow.date32(), 2**31 - 1, 0), "a: a date outside of the years 1 to 9999"),
    "a date before": (of(pyarrow.date64(), -FAR_FUTURE // 86_400_000 * 86_400_000, 0), "a: a date outside of"),
    "a zone": (
        of(pyarrow.timestamp("s", "Mars/Olympus"), 0),
        "a: a time in the zone 'Mars/Olympus', which is unknown",
    ),
    "a zone that is a path": (of(pyarrow.timestamp("s", "../../etc/passwd"), 0), "which is unknown here"),
    "a zone that is a folder": (of(pyarrow.timestamp("s", "Europe"), 0), "which is unknown here"),
    "a time of day": (of(pyarrow.time64("us"), -1, 0), "a: a time of day that is not within a day"),
    "JSON": (as_json("{", "1"), "a: broken JSON: Expecting property name"),
    "JSON of no value": (as_json("[NaN]", "1"), "a: broken JSON: NaN is not a JSON value"),
    "JSON of half a character": (as_json(r'"\ud83d"', "1"), r"a: not UTF-8 text (\ud83d is half of a character)"),
    "JSON that nests": (as_json("[" * 5000 + "]" * 5000, "1"), "a: nested too deeply"),
    "JSON of a long number": (as_json("1" * 5000, "1"), "a: a number of more than 4,300 digits"),
    "a map": (maps([("x", 1), ("x", 2)], []), "a: a map that has the key 'x' more than once"),
    "a part": (pyarrow.array([[{"b": b"a"}, {"b": NOT_TEXT}], []]), "a[1].b: not UTF-8 text"),
    "fields of one name": (
        pyarrow.StructArray.from_arrays([pyarrow.array([1])] * 2, ["x", "x"]),
        "a: a value of the type struct<x: int64, x: int64>, which is not supported",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_an_unreadable_value_makes_its_row_bad_and_is_located(tmp_path: Path, kind: str) -> None:
    array, problem = BAD[kind]
    texts = pyarrow.array([f"t{place}" for place in range(len(array))])
    for as_stream in (True, False):
        path = write_arrow(tmp_path / "a.arrow", {"text": texts, "a": array}, as_stream=as_stream)
        first, *rest = read(path)
        assert first.value is None
        assert problem in str(first.problem)
        assert [row.problem for row in rest] == [None] * len(rest)
        assert [row.value for row in read_in_use(path)] == [{"text": text, "a": None} for text in texts.to_pylist()]


# Columns that nobody uses


def far_date() -> Array:
    return of(pyarrow.date32(), 2**31 - 1)


UNUSED: dict[str, Callable[[], Array]] = {
    "a date": far_date,
    "a moment": lambda: of(pyarrow.timestamp("ms", "Mars/Olympus"), FAR_FUTURE),
    "bytes": lambda: pyarrow.array([NOT_TEXT]),
    "text that is none": lambda: pyarrow.array([NOT_TEXT]).view(pyarrow.string()),
    "JSON that is none": lambda: as_json("{"),
}


@pytest.mark.parametrize("kind", UNUSED)
@pytest.mark.parametrize("put", [write_parquet, write_arrow])
@pytest.mark.parametrize("sample", ["", "#1"])
def test_an_unused_column_is_named_without_values(
    tmp_path: Path, kind: str, put: Callable[[Path, dict[str, Array]], Path], sample: str
) -> None:
    text = pyarrow.array(["t"])
    path = put(
        tmp_path / ("a.parquet" if put is write_parquet else "a.arrow"), {"text": text, "other": UNUSED[kind]()}
    )
    assert [row.value for row in read_in_use(Path(f"{path}{sample}"))] == [{"text": "t", "other": None}]


def test_an_unused_duplicate_column_of_a_table_is_not_an_error(tmp_path: Path) -> None:
    batch = pyarrow.record_batch([pyarrow.array(["t"]), *[far_date()] * 2], names=["text", "a", "a"])
    with pyarrow.ipc.new_file(tmp_path / "a.arrow", batch.schema) as writer:
        writer.write_batch(batch)
    assert [row.value for row in read_in_use(tmp_path / "a.arrow")] == [{"text": "t", "a": None}]


def write_months(path: Path) -> None:
    """Write a column of months, a type that pyarrow can't make: another type of interval, renamed in the file."""
    write_arrow(
        path, {"text": pyarrow.array(["t"]), "a": pyarrow.array([pyarrow.MonthDayNano([1, 2, 3])])}, as_stream=True
    )
    content = path.read_bytes()
    for place in (place for place, byte in enumerate(content) if byte == 2):
        path.write_bytes(content[:place] + b"\0" + content[place + 1 :])
        try:
            schema = pyarrow.ipc.open_stream(path).schema
        except (pyarrow.ArrowInvalid, OSError):
            continue
        if schema.names == ["text", "a"] and schema.types[1].id == pyarrow.lib.Type_INTERVAL_MONTHS:
            return
    raise AssertionError("the kind of intervals was not found")


def test_an_unsupported_type_is_an_error_only_in_a_column_in_use(
    tmp_path: Path,
) -> None:
    write_months(tmp_path / "a.arrow")
    assert [row.value for row in read_in_use(tmp_path / "a.arrow")] == [{"text": "t", "a": None}]
    with pytest.raises(
        DataError, match="the column 'a' has values of the type month_interval, which is not supported"
    ):
        read(tmp_path / "a.arrow")


def test_an_unused_column_of_a_csv_file_is_not_checked(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b"text,note,,\ngood,caf\xe9,,\ncaf\xe9,a\0b,,\n")
    first, second = read_in_use(path)
    assert first.value == {"text": "good", "note": None, "": None}
    assert second.problem == "not UTF-8 text (character 4 of 'text')"
    assert second.columns == ["text", "note", "", ""]


def test_columns_that_fit_no_format_are_named_although_no_row_can_be_read(tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "a.parquet", {"image": pyarrow.array([NOT_TEXT] * 150), "kind": pyarrow.array([1] * 150)}
    )
    with pytest.raises(DataError, match="fit no known format: image, kind"):
        open_rows("a", iter(read_in_use(path)), DataSettings(dataset=str(path)))


def test_the_format_is_recognised_although_the_first_rows_are_bad(tmp_path: Path) -> None:
    texts = pyarrow.array([NOT_TEXT] * 150 + [b"good"]).view(pyarrow.string())
    path = write_parquet(tmp_path / "a.parquet", {"text": texts})
    layout, rows = open_rows("a", iter(read_in_use(path)), DataSettings(dataset=str(path)))
    assert layout.columns == {"text": "text"}
    assert [row.value for row in rows][149:] == [None, {"text": "good"}]


# Samples of types from which pyarrow can't take single rows


@pytest.mark.parametrize("kind", ["a view of text", "runs", "a view of lists", "a union", "a dense union"])
def test_a_sample_of_any_type_is_drawn(tmp_path: Path, kind: str) -> None:
    small, expected = VALUES[kind]
    array = pyarrow.concat_arrays([small] * 50)
    path = write_arrow(tmp_path / "a.arrow", {"a": array})
    rows = read(f"{path}#20")
    assert len(rows) == 20
    assert [row.value for row in rows] == [{"a": (list(expected) * 50)[row.number - 1]} for row in rows]


# What `datasets` writes, and what it reads from the hub

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"properties": {"word": {"default": "iron"}}}}}
OTHER = {"type": "function", "function": {"name": "add", "parameters": {"properties": {"word": {"default": 1.5}}}}}
CALL = {"function": {"name": "look", "arguments": {"word": 7}}}
ROWS = [
    {"messages": [{"role": "user", "content": "é"}], "tools": [TOOL], "extra": {"deep": [None, "x"]}},
    {
        "messages": [{"role": "assistant", "content": "", "tool_calls": [CALL]}],
        "tools": [OTHER, {**TOOL, "strict": True}],
        "extra": [1, "x"],
    },
]
TEXT = datasets.Value("string")
WHOLE = datasets.Features(
    dict.fromkeys(("messages", "tools"), datasets.List(datasets.Json())) | {"extra": datasets.Json()}
)
WITHIN = datasets.Features(
    {
        "messages": [{"role": TEXT, "content": datasets.Value("large_string"), "tool_calls": datasets.Json()}],
        "tools": [
            {
                "type": TEXT,
                "function": {"name": TEXT, "parameters": datasets.Json()},
                "strict": datasets.Value("bool"),
            }
        ],
        "extra": datasets.Json(),
    }
)


@pytest.mark.parametrize("features", [WHOLE, WITHIN], ids=["whole", "within"])
def test_json_columns_of_datasets_equal_json_lines(
    tmp_path: Path, features: datasets.Features, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = datasets.Dataset.from_list(ROWS, features=features)
    rows.to_parquet(tmp_path / "a.parquet")
    rows.save_to_disk(tmp_path / "saved")
    write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS))
    assert values_of(tmp_path / "a.jsonl") == ROWS
    assert values_of(tmp_path / "a.parquet") == ROWS
    assert values_of(tmp_path / "saved") == ROWS
    for loaded in (rows, rows.to_iterable_dataset()):
        load_from_hub(monkeypatch, loaded)
        assert values_of("owner/name") == ROWS


def test_text_columns_of_datasets_stay_text(tmp_path: Path) -> None:
    metadata = {"huggingface": json.dumps({"info": {"features": WHOLE.to_dict()}})}
    table = pyarrow.table({"extra": pyarrow.array(["1.5"])}).replace_schema_metadata(metadata)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert datasets.Features.from_arrow_schema(table.schema) == {"extra": datasets.Value("string")}
    assert values_of(tmp_path / "a.parquet") == [{"extra": "1.5"}]


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("sample", ["", "#2"])
def test_hub_rows_equal_those_of_the_files_and_no_picture_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_stream: bool, sample: str
) -> None:
    media = {"picture": datasets.Image(), "sound": datasets.Audio()}
    columns = {
        "text": pyarrow.array([b"a", NOT_TEXT, None]).view(pyarrow.string()),
        "when": of(pyarrow.timestamp("ns", "Asia/Tokyo"), 0, 1, FAR_FUTURE),
        "far": of(pyarrow.date32(), *[2**31 - 1] * 3),
        **{name: pyarrow.array([{"bytes": NOT_TEXT, "path": None}] * 3, kind.pa_type) for name, kind in media.items()},
    }
    table = pyarrow.table(columns)
    features = datasets.Features({**datasets.Features.from_arrow_schema(table.schema), **media})
    rows = datasets.Dataset(
        datasets.table.InMemoryTable(table.replace_schema_metadata(features.arrow_schema.metadata))
    )
    load_from_hub(monkeypatch, rows.to_iterable_dataset() if is_stream else rows)
    write_parquet(tmp_path / "a.parquet", columns)
    for named in ({}, {"text": "when"}, {"text": "picture"}):
        settings = DataSettings(dataset="owner/name", columns=named, format=DataFormat.TEXT)
        selection = Selection(columns=partial(columns_in_use, settings=settings, name="a"))
        rows_of_hub, rows_of_file = (
            list(
                read_rows(
                    find_dataset(f"{name}{sample}"), split="train", seed=3, streaming=is_stream, selection=selection
                )
            )
            for name in ("owner/name", tmp_path / "a.parquet")
        )
        if is_stream and sample:  # a sample of a stream differs
            assert len(rows_of_hub) == len(rows_of_file)
        else:
            assert [row[1:5] for row in rows_of_hub] == [row[1:5] for row in rows_of_file]
        assert all(row.columns == list(columns) for row in rows_of_hub)


def load_from_hub(monkeypatch: pytest.MonkeyPatch, rows: datasets.Dataset | datasets.IterableDataset) -> None:
    """Make the hub return `rows`."""
    monkeypatch.setattr(hub_rows, "_load", lambda *_: rows)
