"""Streamed rows are treated like prepared ones, wherever in the stream they are."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.data.feeding import prepare as prepare_module
from qlora_cli.data.feeding import stream as stream_module
from qlora_cli.data.feeding.prepare import TrainingData, prepare_data
from qlora_cli.errors import DataError
from qlora_cli.events import Noted
from qlora_cli.settings.models import DataSettings
from qlora_cli.training.run_notes import note_stream
from tests.conftest import Recorder, write_jsonl
from tests.support.models.chat_tokenizers import make_tokenizer

TEXT = make_tokenizer("chatml")
HEAD = 20  # rows that are checked before a stream is read
Row = dict[str, Any]


@pytest.fixture(autouse=True)
def short_head_and_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "HEAD_ROWS", HEAD)
    monkeypatch.setattr(stream_module, "WINDOW_ROWS", 600)


def chat(number: int, answer: str, **switches: Any) -> Row:
    question = {"role": "user", "content": f"question {number}?"}
    return {"messages": [question, {"role": "assistant", "content": answer, **switches}], "user": number % 5}


def two_turns(number: int, *, first: bool) -> Row:
    row = chat(number, "first answer", train=first)
    return {**row, "messages": [*row["messages"], *chat(number, "second answer")["messages"]]}


PLAIN = [chat(number, f"answer {number}") for number in range(HEAD + 10)]
LATE: dict[str, list[Row]] = {
    "plain": [],
    "long": [chat(101, "word " * 80), chat(102, "short"), {"messages": [*chat(103, "")["messages"]]}],
    "switched off": [
        chat(104, "not trained", train=False),
        chat(105, "nor this", weight=0),
        two_turns(106, first=False),
    ],
    "bad": [chat(107, ""), {"messages": []}, {"messages": "no"}, {"messages": [{"role": "nobody", "content": "x"}]}],
    "repeated": [*PLAIN[:3], *PLAIN[HEAD:]],
    "two turns": [two_turns(108, first=True)],
    "tools": [{**chat(109, "yes"), "tools": [{"type": "function", "function": {"name": "look"}}]}],
}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"loss_on": "last"},
    {"loss_on": "all"},
    {"max_length": 40},
    {"max_length": 40, "on_long": "drop"},
    {"max_length": 40, "on_long": "drop", "loss_on": "all"},
]


def both(path: Path, **settings: Any) -> tuple[TrainingData, TrainingData]:
    """Return rows that are prepared, and a stream of the same file."""
    data = DataSettings(dataset=(str(path),), **settings)
    streamed = DataSettings(dataset=(str(path),), streaming=True, **settings)
    return prepare_data(data, TEXT, seed=0), prepare_data(streamed, TEXT, seed=0)


def streamed_rows(data: TrainingData) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return the rows of a window of a stream, which has gone through its file many times."""
    assert data.train.stream is not None
    rows = list(itertools.islice(data.train.stream, stream_module.WINDOW_ROWS))
    return {(tuple(row["input_ids"]), tuple(row["labels"])) for row in rows}


def prepared_rows(data: TrainingData) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
    return {(tuple(row["input_ids"]), tuple(row["labels"])) for row in data.train.dataset}


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("late", LATE)
def test_a_stream_feeds_the_same_rows_and_labels_as_prepared_data(
    tmp_path: Path, late: str, settings: dict[str, Any]
) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [*PLAIN, *LATE[late]])
    prepared, streamed = both(path, on_bad_row="skip", accept_lost=True, **settings)
    assert streamed_rows(streamed) == prepared_rows(prepared)
    assert streamed.train.stream is not None
    counts, report = streamed.train.stream.counts, prepared.train.report
    share = counts["read"] / (len(PLAIN) + len(LATE[late]))
    for name, expected in {
        "truncated": report.truncated_rows,
        "dropped": report.dropped_rows,
        "without_supervision": report.rows_without_supervision,
        "bad": report.bad_rows,
        "supervised_tokens_lost": report.supervised_tokens_lost,
    }.items():
        assert counts[name] == pytest.approx(share * expected, rel=0.1), name


@pytest.mark.parametrize("late", LATE)
def test_held_out_rows_and_groups_are_never_streamed(tmp_path: Path, late: str) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [*PLAIN, *LATE[late]])
    held = write_jsonl(tmp_path / "held.jsonl", [chat(3, "new"), {**PLAIN[-1], "user": None}, *PLAIN[5:6]])
    for group in (None, "user"):
        prepared, streamed = both(
            path, on_bad_row="skip", accept_lost=True, eval_dataset=(str(held),), eval_group=group
        )
        assert streamed_rows(streamed) == prepared_rows(prepared)
        assert prepared.evaluation is not None
        assert streamed.evaluation is not None
        assert streamed.evaluation.report.fingerprint == prepared.evaluation.report.fingerprint


@pytest.mark.parametrize("row", [*LATE["bad"], *LATE["tools"]], ids=str)
def test_a_refused_row_ends_a_stream_with_the_same_message(tmp_path: Path, row: Row) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [*PLAIN, row])
    with pytest.raises(DataError) as prepared:
        prepare_data(DataSettings(dataset=(str(path),)), TEXT, seed=0)
    streamed = prepare_data(DataSettings(dataset=(str(path),), streaming=True), TEXT, seed=0)
    with pytest.raises(DataError) as caught:
        streamed_rows(streamed)
    assert (str(caught.value), caught.value.hint) == (str(prepared.value), prepared.value.hint)


def test_skipped_rows_of_a_stream_are_listed_once_like_those_of_prepared_data(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [*PLAIN, *LATE["bad"]])
    prepared, streamed = both(path, on_bad_row="skip")
    assert streamed.train.stream is not None
    streamed.train.stream.skipped_file = tmp_path / "skipped.jsonl"
    streamed_rows(streamed)
    (listed,) = prepared.train.skipped
    assert (tmp_path / "skipped.jsonl").read_text() == listed.read_text()


def test_a_stream_has_the_same_notes_as_prepared_data(tmp_path: Path) -> None:
    late = [chat(110, "it ends with <|im_end|> twice"), {**chat(111, "x"), "user": None}]
    late.append(chat(112, "an answer", mood="good"))
    path = write_jsonl(tmp_path / "d.jsonl", [*PLAIN, *late])
    held = write_jsonl(tmp_path / "held.jsonl", [chat(200, "held out")])
    prepared, streamed = both(path, eval_dataset=(str(held),), eval_group="user")
    assert len(prepared.train.notes) == 3
    assert not set(prepared.train.notes) & set(streamed.train.notes)
    assert streamed.train.stream is not None
    streamed_rows(streamed)
    assert streamed.train.stream.notes == prepared.train.notes
    recorder = Recorder()
    note_stream(streamed.train, recorder)
    warnings = [each.message for each in recorder.events if isinstance(each, Noted) and each.level == "warning"]
    assert warnings == [f"of the stream: {note}" for note in prepared.train.notes]


def test_a_stream_without_rows_to_train_is_an_error_with_the_reasons(tmp_path: Path) -> None:
    a = write_jsonl(tmp_path / "a.jsonl", PLAIN)
    b = write_jsonl(tmp_path / "b.jsonl", [chat(113, "only row"), chat(114, "off", train=False)])
    held = write_jsonl(tmp_path / "held.jsonl", [chat(113, "only row")])
    data = DataSettings(dataset=(str(a), str(b)), eval_dataset=(str(held),), streaming=True)
    streamed = prepare_data(data, TEXT, seed=0)
    with pytest.raises(
        DataError, match=r"no row of .*b.jsonl is left to train on: of 2 rows, 1 without .*, 1 held out"
    ):
        streamed_rows(streamed)


def test_rows_are_in_the_same_order_for_the_same_seed(tmp_path: Path) -> None:
    a, b = (write_jsonl(tmp_path / f"{name}.jsonl", PLAIN[start:]) for name, start in (("a", 0), ("b", 9)))
    data = DataSettings(dataset=(f"{a}*0.3", f"{b}*0.7"), streaming=True)

    def first(seed: int) -> str:
        stream = prepare_data(data, TEXT, seed=seed).train.stream
        assert stream is not None
        return json.dumps(list(itertools.islice(stream, 300)))

    assert first(1) == first(1)
    assert first(1) != first(2)
