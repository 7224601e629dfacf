"""Files of one object that nests the rows: the error, and the command that extracts them."""

import bz2
import gzip
import json
import lzma
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_cli.data.opening.layouts import open_rows
from qlora_cli.data.reading.json_text import WINDOW_BYTES
from qlora_cli.errors import DataError
from qlora_cli.settings.models import DataSettings
from tests.support.data.reading import problems_of, read, values_of, write

ROWS = [{"question": "q", "answer": "a"}, {"question": "q2", "answer": "a2"}]
COLUMNS = {"question": ["q", "q2"], "answer": ["a", "a2"]}


def opened(path: Path, **settings: object) -> None:
    open_rows(path.name, iter(read(path)), DataSettings.model_validate({"dataset": "x", **settings}))


def refusal(path: Path) -> DataError:
    with pytest.raises(DataError) as caught:
        opened(path)
    return caught.value


def type_hint(error: DataError, folder: Path) -> Path:
    """Type the command of a hint, and return the file that it says to give."""
    says, command = str(error.hint).split(": ", 1)
    python, *arguments = shlex.split(command)
    assert python == "python"
    subprocess.run([sys.executable, *arguments], cwd=folder, check=True)
    return folder / says.removeprefix("Write them as a list, and give ")


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ({"version": "1.0", "data": ROWS}, "data (2 objects with question, answer)"),
        ({"data": ROWS, "meta": {"tags": ["x"], "sources": []}}, "data (2 objects"),
        ({"set": {"name": "n", "it's": ROWS}, "ok": True}, "set.it's (2 objects"),
        ({"test": ROWS[:1], "train": ROWS}, "test (1 object with question, answer), train (2 objects"),
        ({"info": [{"by": "me"}], "rows": {"train": ROWS}}, "info (1 object with by), rows.train (2 objects"),
        (COLUMNS, "each of question, answer holds the values of all rows"),
        (
            {key: dict(zip("01", values, strict=True)) for key, values in COLUMNS.items()},
            "each of question, answer holds",
        ),
        (dict(zip("01", ROWS, strict=True)), "one under each of 0, 1"),
    ],
)
def test_nested_rows_are_located_and_the_command_extracts_them(
    tmp_path: Path, content: dict[str, object], where: str
) -> None:
    path = write(tmp_path / "a b'.json", json.dumps(content))
    error = refusal(path)
    assert f"is one object that holds the rows: {where}" in str(error)
    assert values_of(type_hint(error, tmp_path)) == ROWS


@pytest.mark.parametrize(
    ("suffix", "compress"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)]
)
def test_the_command_reads_archives_and_byte_order_marks(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    content = b"\xef\xbb\xbf" + json.dumps({"version": 1, "data": ROWS}).encode()
    for path in (tmp_path / "a.json", tmp_path / f"b.json{suffix}", tmp_path / "c.jsonl"):
        write(path, compress(content) if path.suffix == suffix else content)
        assert values_of(type_hint(refusal(path), tmp_path)) == ROWS


@pytest.mark.parametrize(
    "content",
    [
        {"messages": [{"role": "user", "content": "a"}], "tools": [{"name": "f"}, {"name": "g"}]},
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
        {"input_ids": [1, 2], "labels": [1, 2]},
        {"question": "q", "answer": "a", "more": [{"x": 1}]},
    ],
)
def test_a_single_row_of_a_known_format_is_a_row(tmp_path: Path, content: dict[str, object]) -> None:
    opened(write(tmp_path / "a.json", json.dumps(content)))


def test_a_single_row_whose_columns_are_named_is_a_row(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write(tmp_path / "a.json", json.dumps({"id": 1, "turns": turns}))
    opened(path, columns={"messages": "turns"})
    assert "fit no known format: id, turns" in str(refusal(path))


TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "ndjson"])
@pytest.mark.parametrize(
    "content",
    [
        {"prompt": "Which?", "answers": [{"text": "a", "score": 1}]},
        {"contents": [{"role": "user", "parts": [{"text": "a"}]}, {"role": "model", "parts": [{"text": "b"}]}]},
        {"conversation_a": TURNS, "conversation_b": TURNS, "winner": "model_a"},
        {"id": 1, "turns": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"data": {"turns": TURNS}},
    ],
)
def test_the_turns_and_answers_of_one_row_are_not_rows(
    tmp_path: Path, content: dict[str, object], suffix: str
) -> None:
    assert "fit no known format" in str(refusal(write(tmp_path / f"a.{suffix}", json.dumps(content))))


@pytest.mark.parametrize("content", [{"conversations": ["hi", "yo"]}, {"messages": ["hi"]}])
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_texts_in_place_of_messages_are_not_rows(tmp_path: Path, content: dict[str, object], suffix: str) -> None:
    opened(write(tmp_path / f"a.{suffix}", json.dumps(content)))  # the usual error of the row says what is wrong


def test_a_line_with_lists_under_its_columns_is_a_row(tmp_path: Path) -> None:
    opened(write(tmp_path / "a.jsonl", json.dumps(COLUMNS)))
    named = write(tmp_path / "b.jsonl", json.dumps({"by": "me", "data": ROWS}))
    assert "holds the rows" not in str(refusal(named))
    by_number = {key: dict(zip("01", values, strict=True)) for key, values in COLUMNS.items()}
    assert "holds the rows" in str(refusal(write(tmp_path / "c.jsonl", json.dumps(by_number))))


@pytest.mark.parametrize("content", [{"a": "b"}, {"a": []}, {"a": [1]}, {"a": {"b": {}}}, {}])
def test_an_object_without_nested_rows_gets_the_usual_error(tmp_path: Path, content: dict[str, object]) -> None:
    error = refusal(write(tmp_path / "a.json", json.dumps(content)))
    assert "holds the rows" not in str(error)


@pytest.mark.parametrize("before", ['"v": 1, "tags": {"a": [1]}, ', ""])
def test_the_list_in_an_object_too_long_for_a_row_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    monkeypatch.setattr("qlora_cli.data.reading.json_text.MAX_ROW_BYTES", WINDOW_BYTES)
    rows = ", ".join(['{"text": "' + "x" * 1000 + '"}'] * 4000)
    path = write(tmp_path / "a.json", f'{{{before}"data": [{rows}], "end": 1}}')
    ((_, _, problem),) = problems_of(path)
    assert str(problem).endswith("write the list under 'data' in it as a file of its own")
