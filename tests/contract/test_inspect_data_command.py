"""`qlora inspect-data` as a user runs it: what it shows, its JSON, its exit codes, and what it must not need."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from qlora_cli.cli.app import app
from tests.conftest import ASSETS, RunQlora, write_jsonl

ROWS = [
    {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "first\nanswer"}]},
    {"messages": [{"role": "user", "content": "two"}, {"role": "assistant", "content": "second"}]},
    {"messages": [{"role": "user", "content": "two"}, {"role": "assistant", "content": "second"}]},
    {"messages": [{"role": "user", "content": "nobody answers"}]},
    {"messages": [{"role": "user", "content": "long"}, {"role": "assistant", "content": "word " * 100}]},
]
LEAST_KEYS = {
    *("format", "rows", "tokens", "supervised_tokens", "truncated_rows", "supervised_tokens_lost"),
    *("rows_without_supervision", "duplicate_rows"),
}


@pytest.fixture
def tokenizer_only(tmp_path: Path) -> Path:
    """A directory with a tokenizer and nothing else: no weights, no config."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(ASSETS / "base" / name, folder)
    return folder


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", ROWS)


def inspect(file: Path, model: Path, *flags: str) -> Result:
    return CliRunner().invoke(app, ["inspect-data", "--dataset", str(file), "--model", str(model), *flags])


def as_json(file: Path, model: Path, *flags: str) -> dict[str, Any]:
    done = inspect(file, model, "--json", *flags)
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert isinstance(report, dict)
    return report


def test_everything_is_shown_and_only_a_tokenizer_is_needed(file: Path, tokenizer_only: Path) -> None:
    done = inspect(file, tokenizer_only, "--max-length", "64", "--accept-lost", "--rows", "2")
    assert done.exit_code == 0, done.stderr
    shown = done.stdout
    assert "read as messages" in shown
    assert "5 read, 4 fed" in shown
    assert "1 row truncated at 64 tokens" in shown
    assert "max length 64" in shown
    assert "1 row: all prompt: no token to train\n      " + f"{file}, row 4" in shown
    assert f"1 row: equal to an earlier row\n      {file}, row 3" in shown
    # Trained tokens stand out without colour too; special ones are seen.
    assert "<|im_start|>assistant⏎\n«first⏎\nanswer<|im_end|>»⏎" in shown
    assert shown.count("«") == 2
    assert "padding" in shown
    assert "packing" in shown


def test_filled_micro_batches_are_counted(file: Path, tokenizer_only: Path) -> None:
    flags = (
        "--max-length",
        "64",
        "--accept-lost",
        "--micro-batch-tokens",
        "4096",
        "--gradient-accumulation-steps",
        "2",
    )
    shown = inspect(file, tokenizer_only, *flags).stdout
    assert "none in micro-batches of up to 4,096 tokens, 2 an epoch" in shown
    batches = as_json(file, tokenizer_only, *flags)["batches"]
    assert (batches["micro_batch_tokens"], batches["micro_batches"], batches["padding_share"]) == (4096, 2, 0)


def test_json_has_the_numbers(file: Path, tokenizer_only: Path) -> None:
    report = as_json(file, tokenizer_only, "--max-length", "64", "--accept-lost")
    assert report.keys() >= LEAST_KEYS
    assert report["format"] == "messages"
    assert (report["rows"], report["rows_trained"], report["rows_without_supervision"]) == (5, 4, 1)
    assert (report["truncated_rows"], report["duplicate_rows"]) == (1, 1)
    assert report["supervised_tokens_lost"] > 0
    whole = as_json(file, tokenizer_only)
    assert whole["supervised_tokens"] == report["supervised_tokens"] + report["supervised_tokens_lost"]
    assert whole["tokens"] == report["tokens"] + report["tokens_lost"]
    assert sum(bar["rows"] for bar in report["lengths"]) == 5
    assert [preview["where"] for preview in report["previews"]] == [f"{file}, row {number}" for number in (1, 2, 3)]
    trained = "".join(piece["text"] for piece in report["previews"][0]["pieces"] if piece["is_trained"])
    assert trained == "first\nanswer<|im_end|>"


def test_what_is_shown_is_what_train_feeds(file: Path, base_model: Path, tmp_path: Path) -> None:
    flags = ("--eval-split", "1", "--drop-duplicates", "--max-length", "200")
    report = as_json(file, base_model, *flags)
    arguments = ["train", "--dataset", file, "--model", base_model, "--output", tmp_path / "run", "--max-steps", "1"]
    done = CliRunner().invoke(app, [*map(str, arguments), *flags, "--device", "cpu"])
    assert done.exit_code == 0, done.stderr
    record = json.loads((tmp_path / "run" / "run.json").read_text())["data"]
    assert record["train"] == {key: report[key] for key in record["train"]}
    assert record["eval"] == report["evaluation"]


def test_bad_rows_are_shown_and_end_with_two_unless_they_are_skipped(tmp_path: Path, tokenizer_only: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "a ", "completion": "b"},
        {"prompt": "c ", "completion": ""},
        {"prompt": "d", "completion": 3},
    ]
    path = write_jsonl(tmp_path / "bad.jsonl", rows)
    done = inspect(path, tokenizer_only)
    assert done.exit_code == 2
    assert (
        f"2 rows: can't be used (1 for an empty answer)\n      {path}, row 2 (line 2): 'completion' is empty"
        in done.stdout
    )
    assert f"error: {path}, row 2 (line 2): 'completion' is empty" in done.stderr
    whole = inspect(path, tokenizer_only, "--json")
    assert whole.exit_code == 2
    assert json.loads(whole.stdout)["bad_rows"] == 2
    skipped = inspect(path, tokenizer_only, "--on-bad-row", "skip", "--json")
    assert skipped.exit_code == 0
    (listed,) = json.loads(skipped.stdout)["skipped_rows"]
    assert [json.loads(line)["row"] for line in Path(listed).read_text().splitlines()] == [2, 3]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--format", "alpaca"), "has no column instruction, output"),
        (("--format", "alpacca"), "Did you mean alpaca?"),
        (("--columns", "prompt=question"), "no column 'question'"),
        (("--eval-split", "5"), "can't be held out"),
        (("--eval-split", "validation"), "it has no splits"),
        (("--dataset", "nothing.jsonl"), "no data set at nothing.jsonl"),
        (("--rows", "-1"), "must be greater than or equal to 0"),
    ],
)
def test_what_is_wrong_is_one_message(file: Path, tokenizer_only: Path, flags: tuple[str, ...], expected: str) -> None:
    done = inspect(file, tokenizer_only, *flags)
    assert done.exit_code == 2
    assert expected in done.stderr.replace("\n", " ")
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--max-length", "16"), "of the tokens to train are lost"),
        (("--max-length", "16", "--on-long", "drop"), "of the tokens to train are lost"),
        (("--max-length", "16", "--on-long", "error"), "row 1: 22 tokens, more than --max-length 16"),
    ],
)
def test_what_train_would_refuse_is_shown_and_ends_with_two(
    file: Path, tokenizer_only: Path, base_model: Path, tmp_path: Path, flags: tuple[str, ...], expected: str
) -> None:
    done = inspect(file, tokenizer_only, *flags, "--json")
    assert done.exit_code == 2
    report = json.loads(done.stdout)
    assert expected in report["refusals"][0]
    assert f"error: {report['refusals'][0]}" in done.stderr
    assert any("longer than 16 tokens" in trouble["kind"] for trouble in report["troubles"])
    arguments = ["train", "--dataset", file, "--model", base_model, "--output", tmp_path / "run", "--device", "cpu"]
    refused = CliRunner().invoke(app, [*map(str, arguments), *flags])
    assert refused.exit_code == 2
    assert f"error: {report['refusals'][0]}" in refused.stderr
    assert not (tmp_path / "run").exists()


def test_bad_rows_that_are_held_out_end_with_two_as_well(file: Path, tokenizer_only: Path, tmp_path: Path) -> None:
    held_out = write_jsonl(tmp_path / "held.jsonl", [*ROWS[:1], {"messages": []}])
    done = inspect(file, tokenizer_only, "--eval-dataset", str(held_out))
    assert done.exit_code == 2
    assert f"error: {held_out}, row 2 (line 2): 'messages' must be a list" in done.stderr


def test_if_no_row_can_be_used_the_first_is_named_with_why(tmp_path: Path, tokenizer_only: Path) -> None:
    path = write_jsonl(tmp_path / "all_bad.jsonl", [{"messages": [{"role": "usr", "content": "x"}]}] * 3)
    done = inspect(path, tokenizer_only)
    assert done.exit_code == 2
    assert "can be used; the first of 3 rows: " in done.stderr
    assert "row 1 (line 1): messages[0].role is 'usr'" in done.stderr
    (tokenizer_only / "chat_template.jinja").unlink()
    done = inspect(write_jsonl(tmp_path / "rows.jsonl", ROWS), tokenizer_only)
    assert "the tokenizer has no chat template" in done.stderr
    assert "--chat-template" in done.stderr


def test_each_split_of_a_directory_is_used_as_asked(file: Path, tokenizer_only: Path) -> None:
    folder = file.parent / "set"
    for name, rows in (("train", ROWS[:2]), ("dev", ROWS[3:]), ("test", ROWS[1:2])):
        (folder / name).mkdir(parents=True)
        write_jsonl(folder / name / "rows.jsonl", rows)
    report = as_json(folder, tokenizer_only, "--eval-split", "validation", "--accept-lost")
    assert (report["rows"], report["evaluation"]["rows"]) == (2, 2)
    assert report["notes"][0] == (
        f"{folder}: reading train (rows.jsonl) and validation (rows.jsonl); not read: test (rows.jsonl)"
    )
    report = as_json(folder, tokenizer_only, "--set", "data.split=test")
    assert (report["rows"], report["evaluation"]) == (1, None)
    whole = inspect(folder, tokenizer_only, "--eval-split", "train")
    assert whole.exit_code == 2
    assert "is the split that is trained on" in whole.stderr.replace("\n", " ")


def test_holding_out_every_row_that_would_be_trained_is_reported(file: Path, tokenizer_only: Path) -> None:
    copy = shutil.copy(file, file.with_name("copy.jsonl"))
    same, equal = (inspect(file, tokenizer_only, "--eval-dataset", str(path)) for path in (file, copy))
    assert (same.exit_code, equal.exit_code) == (2, 2)
    assert "names data that is trained on too: all rows of" in same.stderr.replace("\n", " ")
    assert "4 held out   hint: Hold other rows out" in equal.stderr.replace("\n", " ")


def test_a_page_never_takes_the_place_of_the_data(file: Path, tokenizer_only: Path) -> None:
    content = file.read_bytes()
    done = inspect(file, tokenizer_only, "--html", str(file))
    assert done.exit_code == 2
    assert "would overwrite a file that is not a page" in done.stderr
    assert file.read_bytes() == content


def test_the_first_rows_of_a_stream_are_inspected(tokenizer_only: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "many.jsonl", [{"text": f"row {number}"} for number in range(1500)])
    report = as_json(path, tokenizer_only, "--set", "data.streaming=true", "--set", "training.max_steps=1")
    assert report["rows"] == 1000
    assert "is streamed: its statistics are about the first 1,000 rows" in report["notes"][0]


def test_every_setting_of_the_data_changes_the_report(file: Path, tokenizer_only: Path) -> None:
    plain = as_json(file, tokenizer_only)
    for flags in (
        ("--max-length", "64", "--accept-lost"),
        ("--max-length", "64", "--on-long", "drop", "--accept-lost"),
        ("--loss-on", "all"),
        ("--drop-duplicates",),
        ("--eval-split", "20%"),
        ("--micro-batch-size", "2"),
        ("--micro-batch-size", "2", "--sampling", "group_by_length"),
        ("--micro-batch-size", "2", "--sampling", "sequential"),
        ("--micro-batch-size", "2", "--longest-first"),
        ("--chat-template", str(_other_template(file.parent))),
    ):
        assert as_json(file, tokenizer_only, *flags) != plain, flags


def _other_template(folder: Path) -> Path:
    path = folder / "other.jinja"
    template = (ASSETS / "base" / "chat_template.jinja").read_text(encoding="utf-8")
    path.write_text("A chat. " + template, encoding="utf-8")
    return path


def test_a_run_directory_and_an_adapter_are_models_too(file: Path, base_model: Path, tmp_path: Path) -> None:
    arguments = ["train", "--dataset", file, "--model", base_model, "--output", tmp_path / "run", "--max-steps", "1"]
    assert CliRunner().invoke(app, [*map(str, arguments), "--device", "cpu"]).exit_code == 0
    fingerprint = as_json(file, base_model)["fingerprint"]
    assert as_json(file, tmp_path / "run")["fingerprint"] == fingerprint
    assert as_json(file, tmp_path / "run" / "adapter")["fingerprint"] == fingerprint


def test_without_a_terminal_and_with_a_closed_pipe(run_qlora: RunQlora, file: Path, tokenizer_only: Path) -> None:
    command = ["inspect-data", "--dataset", str(file), "--model", str(tokenizer_only)]
    done = run_qlora(*command)
    assert done.code == 0
    assert "\x1b" not in done.stdout + done.stderr
    with subprocess.Popen(
        ["/bin/sh", "-c", "head -n 1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as head:
        assert head.stdin is not None
        assert head.stdout is not None
        piped = run_qlora(*command, descriptors={1: head.stdin.fileno()})
        head.stdin.close()
        assert head.stdout.read().count("\n") == 1
    assert "Traceback" not in piped.stderr


def test_the_page_is_written_where_it_was_asked_for(file: Path, tokenizer_only: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    done = inspect(file, tokenizer_only, "--html", str(page))
    assert done.exit_code == 0, done.stderr
    assert str(page) in done.stderr
    assert "<svg" in page.read_text(encoding="utf-8")
    missing = inspect(file, tokenizer_only, "--html", str(tmp_path / "no" / "report.html"))
    assert missing.exit_code == 2
    assert "there is no directory" in missing.stderr
