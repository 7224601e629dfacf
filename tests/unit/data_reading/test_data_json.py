"""JSON lines and JSON are read exactly as written, with the problems of rows, in bounded memory."""

import json
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.data.finding.sources import find_dataset
from qlora_cli.data.limits import TOO_DEEP
from qlora_cli.data.reading import json_text
from qlora_cli.data.reading.readers import RawRow, read_rows, selection_for
from qlora_cli.data.rows.examples import Unreadable
from qlora_cli.errors import DataError
from qlora_cli.settings.models import DataSettings
from tests.support.data.reading import problems_of, read, values_of, write

MIB = 1024**2


@contextmanager
def peak_below(limit_bytes: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit_bytes
    finally:
        tracemalloc.stop()


# JSON lines


def test_lines_are_read_exactly_as_written(tmp_path: Path) -> None:
    objects = [
        {"tools": [{"name": "f", "parameters": {"a": None}}, {"name": "g"}]},
        {"tools": [{"parameters": {"b": {"c": [1, 2.5, True]}}}], "text": "two\u2028lines\u0085and \u2029😀"},
        {"text": None, "n": 10**30},
    ]
    lines = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in objects)
    read_again = values_of(write(tmp_path / "a.jsonl", lines))
    # As text, because equal objects may have their keys in another order.
    assert [json.dumps(value) for value in read_again] == [json.dumps(value) for value in objects]


def test_byte_order_marks_blank_lines_and_carriage_returns_are_not_rows_but_count_as_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.ndjson", b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": 2}\n\n{"a": 3}')
    assert [(row.number, row.line, row.value) for row in read(path)] == [
        (1, 1, {"a": 1}),
        (2, 4, {"a": 2}),
        (3, 6, {"a": 3}),
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"a": "caf\xe9"}', "not UTF-8 text (byte 11 of the line)"),
        (b'{"a": }', "broken JSON: Expecting value (column 7)"),
        (b'{"a": [{"b": 1, "c": 2, "b": 3}]}', "the key 'b' is repeated with different values"),
        (b'{"a": 1} {', "broken JSON: Extra data (column 10)"),
        (b'{"a": 1,}', "broken JSON: "),
        (b"[1]", "expected a JSON object, found array"),
        (b'"text"', "expected a JSON object, found string"),
        (b"1", "expected a JSON object, found number"),
        (b"1.5", "expected a JSON object, found number"),
        (b"true", "expected a JSON object, found boolean"),
        (b"null", "expected a JSON object, found null"),
        (b'{"a": [NaN]}', "broken JSON: NaN is not a JSON value"),
        (b'{"a": -Infinity}', "broken JSON: -Infinity is not a JSON value"),
        (b'{"a": "x\0y"}', "NUL byte at 9 of the line"),
        (b'{"a": ' + b"9" * 5000 + b"}", "a number of more than 4,300 digits"),
        (b'{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "nested too deeply to be read"),
        (b'{"a": "\\ud83d"}', "not UTF-8 text (\\ud83d is half of a character)"),
        (b'{"a": "x' + b"y" * 50, "broken JSON: Unterminated string starting at (column 7)"),
    ],
)
def test_a_bad_line_is_a_row_with_a_problem_and_reading_continues(tmp_path: Path, line: bytes, problem: str) -> None:
    path = write(tmp_path / "a.jsonl", b'{"a": "\\ud83d\\ude00"}\n\n' + line + b'\n{"a": 3, "a": 3}\n')
    first, bad, last = read(path)
    assert first.value == {"a": "😀"}
    assert (bad.number, bad.line, bad.value) == (2, 3, None)
    assert bad.problem is not None
    assert bad.problem.startswith(problem)
    assert (last.number, last.line, last.value) == (3, 4, {"a": 3})


@pytest.mark.parametrize(
    ("content", "is_json"),
    [
        ('[\n{"a": 1},\n{"a": 2}\n]\n', True),
        ('\n[{"a": 1},\n{"a": 2}]', True),
        ('[{"a": 1}, {"a": 2}]', True),
        ('{\n  "a": 1\n}\n', True),
        ('{"messages": [\n{"role": "user"}]}\n', True),
        ('{"a": 1,\n"b": 2}\n', True),
        ("[1, 2]\n[3, 4]\n", False),
        ('{"a": [', False),
        ('{"a": 1,}\n{"a": 2}\n', False),
        ('{"a": {"b": 1}\n{"a": {"b": 2}}\n', False),
    ],
)
def test_a_jsonl_file_that_is_one_json_value_gets_a_hint_to_rename_it(
    tmp_path: Path, content: str, is_json: bool
) -> None:
    problems = [problem for _, _, problem in problems_of(write(tmp_path / "a.jsonl", content)) if problem]
    advice = "; a file that holds one list or object over several lines must be named .json"
    assert [problem.endswith(advice) for problem in problems] == [is_json] * len(problems)
    assert problems


def test_a_json_file_gets_no_hint_to_rename_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", '{"a": {}\n{"a": {}}\n')
    assert problems_of(path) == [(1, 1, "broken JSON: Expecting ',' delimiter (column 9)"), (2, 2, None)]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv"])
@pytest.mark.parametrize(("codec", "named"), [("utf-16", "UTF-16"), ("utf-32", "UTF-32")])
def test_another_encoding_is_named_with_the_command_that_converts_it(
    tmp_path: Path, suffix: str, codec: str, named: str
) -> None:
    path = write(tmp_path / f"a.{suffix}", '{"a": 1}\n'.encode(codec))
    with pytest.raises(DataError, match=f"a.{suffix} is {named} text") as caught:
        read(path)
    assert f"iconv -f {named} -t UTF-8 a.{suffix}" in str(caught.value.hint)


@pytest.mark.slow
def test_thirty_mib_of_lines_are_read_in_eight_mib_of_memory(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", (json.dumps({"text": "x" * 1000}) + "\n") * (30 * MIB // 1013))
    assert path.stat().st_size > 29 * MIB
    with peak_below(8 * MIB):
        assert sum(1 for _ in read_rows(find_dataset(f"{path}"), split="train", seed=0)) == 30 * MIB // 1013
        assert len(read(f"{path}#10")) == 10


def test_a_line_of_fifty_megabytes_is_a_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"text": "' + b"x" * 50_000_000 + b'"}\n{"text": "y"}\n')
    assert [len(value["text"]) for value in values_of(path)] == [50_000_000, 1]


# JSON

TRICKY = [
    {"a": 'q"uo\\te\n', "b": [1, -2.5e-3, 12345678901234567890, True, None]},
    {"😀é": "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"), "c": {"d": [[], {}]}},
    {},
    {"e": "]},{[" * 9},
]


@pytest.mark.parametrize("window_bytes", [1, 2, 3, 5, 8, 13, 40, 1000])
@pytest.mark.parametrize("as_ascii", [True, False])
@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_does_not_depend_on_the_window_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window_bytes: int, as_ascii: bool, indent: int | None
) -> None:
    monkeypatch.setattr(json_text, "WINDOW_BYTES", window_bytes)
    text = json.dumps(TRICKY, ensure_ascii=as_ascii, indent=indent)
    assert values_of(write(tmp_path / "list.json", "\ufeff " + text + " \n")) == TRICKY
    assert values_of(write(tmp_path / "wrapped.json", '\n{"data" : ' + text + " }")) == TRICKY
    # Wherever it is cut, the rows before are those of the whole, and one problem comes last.
    for end in range(1, len(text), 7):
        *rows, bad = read(write(tmp_path / "cut.json", text[:end]))
        assert [row.value for row in rows] == TRICKY[: len(rows)]
        assert str(bad.problem).endswith("what follows it in the file can't be read")


def test_a_number_is_not_split_at_the_end_of_the_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_text, "WINDOW_BYTES", 3)
    path = write(tmp_path / "a.json", "[123456,7890 , 1]")
    assert problems_of(path) == [(n, 1, "expected a JSON object, found number") for n in (1, 2, 3)]


def test_elements_are_numbered_by_their_first_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", '[\n {"a":\n 1},\n\n 3, "x"\n, {"a": NaN},\n{"a": 2}]')
    assert problems_of(path) == [
        (1, 2, None),
        (2, 5, "expected a JSON object, found number"),
        (3, 5, "expected a JSON object, found string"),
        (4, 6, "broken JSON: NaN is not a JSON value"),
        (5, 7, None),
    ]


@pytest.mark.parametrize(
    ("rest", "problem"),
    [
        (b'{"a": oops}]', "Expecting value (line 3, column 7)"),
        (b'{"a": 1}', "it ends here (line 3, column 9)"),
        (b'{"a": 1} {"a": 2}]', "Expecting ',' (line 3, column 10)"),
        (b'{"a": 1}] x', "Extra data (line 3, column 11)"),
        (b'{"a": "\xe9"}]', "not UTF-8 text (byte 20 of the file)"),
        (b'{"a": "\xf0\x9f', "not UTF-8 text (byte 20 of the file)"),
        (b'{"a": "x\0"}]', "NUL byte (line 3, column 9)"),
        (b'{"a": ' + b"[" * 10**5, "nested too deeply (line 3, column 1)"),
        (b"9" * 5000 + b"]", "a number of more than 4,300 digits (line 3, column 1)"),
    ],
)
def test_a_syntax_error_is_the_last_row_of_the_file(tmp_path: Path, rest: bytes, problem: str) -> None:
    path = write(tmp_path / "a.json", b'[\n{"a": 0},\n' + rest)
    *rows, bad = read(path)
    assert rows[0].value == {"a": 0}
    assert bad.line == 3
    assert bad.value is None
    assert f"broken JSON: {problem}" in str(bad.problem)


def test_an_early_error_in_a_long_list_does_not_read_to_its_end(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", '[{"a": 1}, {"a": oops}, ' + '{"b": "xxxxxxxxxxxxxxxxxxxx"}, ' * MIB + "{}]")
    with peak_below(6 * MIB):
        assert [row.number for row in read(path)] == [1, 2]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"a": 1}\n{"a": 2}\n', [{"a": 1}, {"a": 2}]),
        ('{"a": [{"b": 1}]}\n\n{"a": [{"b": 2}]}', [{"a": [{"b": 1}]}, {"a": [{"b": 2}]}]),
        ('{"data": [{"a": 1},\n{"a": 2}\n]\n}\n', [{"a": 1}, {"a": 2}]),
        ('{"data": [{"a": {}\n},{"a": 2}]}', [{"a": {}}, {"a": 2}]),
        ('{"messages": [{"role": "user"}]}', [{"messages": [{"role": "user"}]}]),
        ('{"data": [{"a": 1}], "version": [{"a": 2}]}', [{"data": [{"a": 1}], "version": [{"a": 2}]}]),
        ('{"data": [1]}', [{"data": [1]}]),
        ('{"data": []}', [{"data": []}]),
        ('{\n"a": 1\n}', [{"a": 1}]),
        ("{}", [{}]),
        ("[]", []),
        (" \n", []),
    ],
)
def test_a_json_file_holds_a_list_or_lines_or_one_object(tmp_path: Path, content: str, expected: list[Any]) -> None:
    assert values_of(write(tmp_path / "a.json", content)) == expected


def test_bad_lines_of_a_json_file_are_reported_like_those_of_jsonl(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", '{"a": 1}\nnonsense\n{"a": 2}')
    assert problems_of(path) == [(1, 1, None), (2, 2, "broken JSON: Expecting value (column 1)"), (3, 3, None)]


@pytest.mark.parametrize(("before", "after"), [("[", "]"), ('{"data": [', "]}")])
@pytest.mark.parametrize("between", [",", ",\n"])
def test_sixteen_mib_of_a_list_are_read_in_eight_mib_of_memory(
    tmp_path: Path, before: str, after: str, between: str
) -> None:
    num_rows = 16 * MIB // 1014
    rows = between.join([json.dumps({"text": "x" * 1000})] * num_rows)
    path = write(tmp_path / "a.json", before + rows + after)
    del rows
    with peak_below(8 * MIB):
        assert sum(1 for _ in read_rows(find_dataset(f"{path}"), split="train", seed=0)) == num_rows


def test_an_element_larger_than_the_window_is_a_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", '[{"a": "' + "x" * 5 * MIB + '"}, {"a": "y"}]')
    assert [len(value["a"]) for value in values_of(path)] == [5 * MIB, 1]


# Columns that nobody uses

DEEP = "[" * 600 + "]" * 600
HARMFUL = {
    "[NaN]": "broken JSON: NaN is not a JSON value",
    '{"b": -Infinity}': "broken JSON: -Infinity is not a JSON value",
    '{"b": 1, "b": 2}': "the key 'b' is repeated with different values",
    '["\\ud83d"]': "not UTF-8 text (\\ud83d is half of a character)",
    DEEP: TOO_DEEP,
}


def read_used(path: Path, **settings: Any) -> list[RawRow]:
    selection = selection_for(DataSettings(dataset=(str(path),), **settings), path.name)
    return list(read_rows(find_dataset(str(path)), split="train", seed=0, selection=selection))


@pytest.mark.parametrize(("value", "problem"), HARMFUL.items())
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_an_unreadable_value_in_an_unused_column_is_harmless(
    tmp_path: Path, name: str, value: str, problem: str
) -> None:
    rows = [f'{{"text": "one", "score": {value}}}', '{"text": "two", "score": 2}']
    path = write(tmp_path / name, "\n".join(rows) if name == "a.jsonl" else f"[{', '.join(rows)}]")
    unused, good = (row.value for row in read_used(path))
    assert good == {"text": "two", "score": 2}
    assert unused == {"text": "one", "score": Unreadable(problem)}


@pytest.mark.parametrize(("value", "problem"), HARMFUL.items())
@pytest.mark.parametrize("column", ["text", "user"])
def test_an_unreadable_value_in_a_used_column_makes_its_row_bad(
    tmp_path: Path, column: str, value: str, problem: str
) -> None:
    other_column = {name: "one" for name in ("text", "user") if name != column}
    path = write(tmp_path / "a.jsonl", f'{json.dumps(other_column)[:-1]}, "{column}": {value}}}')
    (row,) = read_used(path, eval_group="user")
    assert row.value is None
    assert row.problem is not None
    assert row.problem.startswith(problem)


def test_nan_as_pandas_writes_it_is_a_missing_value(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"instruction": "one", "input": NaN, "output": "two"}')
    assert [row.value for row in read_used(path)] == [{"instruction": "one", "input": None, "output": "two"}]


def test_an_unused_repeated_key_is_harmless(tmp_path: Path) -> None:
    twice = '{"text": "one", "score": 1, "score": 2, "text": "one"}'
    used, both = twice, twice.replace('"one"}', '"two"}')
    unused, bad = read_used(write(tmp_path / "a.jsonl", f"{used}\n{both}"))
    assert unused.value == {"text": "one", "score": 2}
    assert bad.problem == "the key 'text' is repeated with different values"
