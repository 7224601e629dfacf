"""Rows that are read during training."""

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.data.feeding import prepare as prepare_module
from qlora_cli.data.feeding import stream as stream_module
from qlora_cli.data.feeding.prepare import prepare_data
from qlora_cli.data.feeding.stream import TokenStream
from qlora_cli.data.opening import first_rows as first_rows_module
from qlora_cli.data.opening.name_checks import data_problems
from qlora_cli.errors import DataError, TrainingError
from qlora_cli.events import Noted
from qlora_cli.runs.directory import RunDirectory
from qlora_cli.settings.models import DataSettings, TrainSettings
from qlora_cli.settings.resolve import Sources, resolve
from qlora_cli.training.callbacks.stop import StopSignal
from qlora_cli.training.run_plan import prepare_run
from qlora_cli.training.session import Session
from qlora_cli.training.train_run import run
from tests.conftest import Recorder, train_settings, write_jsonl
from tests.support.models.chat_tokenizers import make_tokenizer

TEXT = make_tokenizer("chatml")


def stream(*names: str | Path, **settings: Any) -> TokenStream:
    data = DataSettings(dataset=tuple(map(str, names)), streaming=True, **settings)
    prepared = prepare_data(data, TEXT, seed=0).train
    assert prepared.stream is not None
    return prepared.stream


def rows_of(path: Path, count: int, word: str = "row") -> Path:
    return write_jsonl(path, [{"prompt": f"{word} {i}: ", "completion": f"it is {i}"} for i in range(count)])


def decoded(rows: list[dict[str, list[int]]]) -> list[str]:
    return [str(TEXT.tokenizer.decode(row["input_ids"])) for row in rows]


def take(token_stream: TokenStream, count: int) -> list[dict[str, list[int]]]:
    return list(itertools.islice(token_stream, count))


def test_a_stream_has_the_rows_of_prepared_data_and_restarts(tmp_path: Path) -> None:
    path = rows_of(tmp_path / "d.jsonl", 50)
    whole = prepare_data(DataSettings(dataset=(str(path),)), TEXT, seed=0).train.dataset
    streamed = Counter(decoded(take(stream(path), 2000)))
    assert streamed.keys() == set(decoded(list(whole)))
    assert set(streamed.values()) == {40}
    first, again = take(stream(path), 60), take(stream(path), 60)
    assert first == again
    assert decoded(first) != sorted(decoded(first))


def test_streams_are_mixed_by_weight(tmp_path: Path) -> None:
    a, b = rows_of(tmp_path / "a.jsonl", 20, "apple"), rows_of(tmp_path / "b.jsonl", 20, "pear")
    rows = decoded(take(stream(a, f"{b}*3"), 2000))
    assert sum("pear" in row for row in rows) / len(rows) == pytest.approx(0.75, abs=0.04)


def test_weights_of_streams_are_probabilities_whatever_their_sizes(tmp_path: Path) -> None:
    a, b = rows_of(tmp_path / "a.jsonl", 4, "apple"), rows_of(tmp_path / "b.jsonl", 200, "pear")
    data = DataSettings(dataset=(f"{a}*0.3", f"{b}*0.7"), streaming=True)
    train = prepare_data(data, TEXT, seed=0).train
    assert f"each row of the stream is drawn at random: 30.0% {a}*0.3, 70.0% {b}*0.7" in train.notes
    assert not any("--mixing" in note for note in train.notes)
    assert train.report.rows_trained == 204  # of the rows that were checked
    assert train.stream is not None
    rows = decoded(take(train.stream, 2000))
    assert sum("apple" in row for row in rows) / len(rows) == pytest.approx(0.3, abs=0.04)


def test_a_weight_on_a_single_stream_is_an_error(base_model: Path, tmp_path: Path) -> None:
    path = rows_of(tmp_path / "d.jsonl", 4)
    values = {
        "model.name": str(base_model),
        "data.dataset": f"{path}*0.5",
        "data.streaming": True,
        "training.max_steps": 1,
        "output.directory": str(tmp_path / "run"),
    }
    resolved = resolve(Sources(flags={key: (key, value) for key, value in values.items()}), TrainSettings)
    (problem,) = data_problems(resolved, resolved.settings.data)
    assert "has a weight, but a stream of a single data set is not mixed" in problem.message
    assert "#500" in (problem.hint or "")


@pytest.mark.fast
def test_a_packed_stream_keeps_rows_whole(tmp_path: Path) -> None:
    path = rows_of(tmp_path / "d.jsonl", 50)
    longest = 64
    for row in take(stream(path, packing=True, max_length=longest), 40):
        assert len(row["input_ids"]) == len(row["labels"]) == sum(row["seq_lengths"]) <= longest
        begin = 0
        for length in row["seq_lengths"]:
            assert decoded([{"input_ids": row["input_ids"][begin : begin + length]}])[0].startswith("row ")
            begin += length


def test_outcomes_of_streamed_rows_are_counted(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a ", "completion": "b"},
        {"prompt": "a ", "completion": "word " * 40},
        {"prompt": "word " * 40, "completion": "c"},
        {"prompt": "a ", "completion": ""},
    ]
    path = write_jsonl(tmp_path / "d.jsonl", rows * 25)  # to open it again takes longer than to read it
    for on_long, expected in (
        ("truncate", {"truncated": 1000, "without_supervision": 500}),
        ("drop", {"dropped": 1000}),
    ):
        token_stream = stream(path, max_length=24, on_long=on_long, on_bad_row="skip", accept_lost=True)
        take(token_stream, 500 if on_long == "drop" else 1000)
        read = token_stream.counts["read"]
        assert token_stream.counts["bad"] == pytest.approx(read / 4, rel=0.01)
        for name, count in expected.items():
            assert token_stream.counts[name] == pytest.approx(read * count / 2000, rel=0.01)
        assert token_stream.counts["supervised_tokens_lost"] > 0


def test_a_late_bad_row_ends_a_stream_and_is_named(tmp_path: Path) -> None:
    path = rows_of(tmp_path / "d.jsonl", 1500)
    with path.open("a", encoding="utf-8") as file:
        file.write('{"prompt": "p", "completion": null}\n')
    with pytest.raises(DataError, match=r"d.jsonl, row 1501 \(line 1501\): 'completion' must be text"):
        take(stream(path), 1)
    with pytest.raises(DataError, match=r"row 1: .* more than --max-length 8"):
        take(stream(path, max_length=8, on_long="error", accept_lost=False), 1)


def test_held_out_rows_are_not_streamed(tmp_path: Path) -> None:
    path = rows_of(tmp_path / "d.jsonl", 40)
    held_out = write_jsonl(tmp_path / "held.jsonl", [json.loads(line) for line in path.read_text().splitlines()[:5]])
    token_stream = stream(path, eval_dataset=(str(held_out),))
    rows = decoded(take(token_stream, 400))
    assert len(set(rows)) == 35
    assert not any(row.startswith(f"row {i}:") for i in range(5) for row in rows)
    assert token_stream.counts["held_out"] > 0


def test_held_out_groups_are_not_streamed(tmp_path: Path) -> None:
    rows = [{"prompt": f"row {i}: ", "completion": f"it is {i}", "user": i % 4} for i in range(40)]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    held_out = write_jsonl(tmp_path / "held.jsonl", [{"prompt": "a ", "completion": "b", "user": 3}])
    token_stream = stream(path, eval_dataset=(str(held_out),), eval_group="user")
    numbers = {int(row.split("row ")[1].split(":")[0]) for row in decoded(take(token_stream, 400))}
    assert numbers == {i for i in range(40) if i % 4 != 3}
    assert token_stream.counts["held_out"] == pytest.approx(token_stream.counts["read"] / 4, rel=0.02)
    rows_by_users = write_jsonl(tmp_path / "e.jsonl", [{**row, "users": 1} for row in rows])
    with pytest.raises(DataError, match=r"held.jsonl has no column 'users'"):
        stream(rows_by_users, eval_dataset=(str(held_out),), eval_group="users")


def test_near_duplicates_of_held_out_rows_are_counted_once(tmp_path: Path) -> None:
    path = rows_of(tmp_path / "d.jsonl", 1500)
    near = [{"prompt": f"ROW {i}: ", "completion": f"It is {i}."} for i in (3, 3, 1400)]
    held_out = write_jsonl(tmp_path / "held.jsonl", [*near, {"prompt": "other ", "completion": "row"}])
    data = DataSettings(dataset=(str(path),), eval_dataset=(str(held_out),), streaming=True)
    prepared = prepare_data(data, TEXT, seed=0)
    assert prepared.evaluation is not None
    assert prepared.evaluation.report.near_duplicate_rows == 2  # of the first 1,000 rows
    assert prepared.train.stream is not None
    for _ in range(2):
        take(prepared.train.stream, 4000)
        assert prepared.train.stream.counts["near_duplicate"] == 3


def test_a_group_that_is_not_a_single_value_ends_a_stream_or_is_skipped(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "d.jsonl",
        [{"prompt": f"row {i}: ", "completion": "x", "user": [i] if i == 1200 else i} for i in range(1300)],
    )
    held_out = write_jsonl(tmp_path / "held.jsonl", [{"prompt": "a ", "completion": "b", "user": 3}])
    groups: dict[str, Any] = {"eval_dataset": (str(held_out),), "eval_group": "user"}
    with pytest.raises(DataError, match=r"row 1201 .*: 'user' must be a single value"):
        take(stream(path, **groups), 1)
    token_stream = stream(path, **groups, on_bad_row="skip")
    take(token_stream, 1)
    assert token_stream.counts["bad"] >= 1


def test_losing_too_many_tokens_late_in_a_stream_ends_it(tmp_path: Path) -> None:
    path = rows_of(tmp_path / "d.jsonl", 1000)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({"prompt": "a ", "completion": "word " * 60}) + "\n" for _ in range(1000))
    with pytest.raises(
        DataError, match=r"% of the tokens to train are lost .* of the 2,\d{3} rows of the stream so far"
    ):
        take(stream(path, max_length=32), 3000)
    assert len(take(stream(path, max_length=32, accept_lost=True), 3000)) == 3000


def test_training_until_a_bad_row_is_saved(
    base_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "WINDOW_ROWS", 8)
    monkeypatch.setattr(prepare_module, "HEAD_ROWS", 8)
    monkeypatch.setattr(first_rows_module, "SAMPLED_ROWS", 8)
    path = tmp_path / "late.jsonl"
    path.write_text("\n".join([*rows.read_text().splitlines(), '{"messages": []}']) + "\n")
    settings = train_settings(base_model, path, tmp_path / "run", data__streaming=True, training__max_steps=40)
    with pytest.raises(TrainingError, match=r"row 13 \(line 13\): 'messages' must be a list") as caught:
        run(prepare_run(settings, Recorder()), Recorder())
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert (checkpoint / "adapter_model.safetensors").is_file()
    assert "The training until step" in (caught.value.hint or "")


def test_no_row_of_a_stream_is_read_before_the_first_step(base_model: Path, rows: Path, tmp_path: Path) -> None:
    """Reading one tokenizes a whole window of them."""
    prepared = prepare_run(train_settings(base_model, rows, tmp_path / "run", data__streaming=True), Recorder())
    stream = prepared.train_data.stream
    assert stream is not None
    trainer = Session(prepared, RunDirectory(tmp_path / "run"), Recorder(), StopSignal(Recorder())).trainer
    assert not stream.counts
    next(iter(trainer.train_dataset))
    assert stream.counts["read"] >= stream_module.WINDOW_ROWS


def test_training_on_a_stream_does_its_steps_and_reports_the_rows_read(
    base_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "WINDOW_ROWS", 8)
    held_out = write_jsonl(tmp_path / "held.jsonl", [json.loads(rows.read_text().splitlines()[0])])
    settings = train_settings(
        base_model,
        rows,
        tmp_path / "run",
        data__streaming=True,
        data__eval_dataset=str(held_out),
        training__max_steps=8,
    )
    recorder = Recorder()
    prepared = prepare_run(settings, recorder)
    assert prepared.plan.num_epochs is None
    result = run(prepared, recorder)
    assert (result.steps, result.interrupted_by) == (8, None)
    assert result.eval_loss is not None
    messages = [event.message for event in recorder.events if isinstance(event, Noted)]
    assert any("is streamed: its statistics are about the first" in message for message in messages)
    assert any("of the stream read, ahead of what was fed: " in message for message in messages)
