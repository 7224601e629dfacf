"""Held-out rows share no row and no group with trained ones; shared texts are counted."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora_cli.data.feeding.held_out import hold_out
from qlora_cli.data.feeding.prepare import PreparedData, TrainingData, prepare_data
from qlora_cli.data.rows.digests import digest_text
from qlora_cli.data.rows.groups import NO_GROUP, digest_group
from qlora_cli.data.showing.inspection import inspect_data
from qlora_cli.errors import DataError, SettingsError
from qlora_cli.settings.models import DataSettings, TrainingSettings, TrainSettings
from qlora_cli.settings.resolve import Sources, resolve
from tests.conftest import write_jsonl
from tests.support.models.chat_tokenizers import make_tokenizer

TEXT = make_tokenizer("chatml")
Row = dict[str, Any]


def prepare(*names: str | Path, seed: int = 0, **settings: Any) -> TrainingData:
    return prepare_data(DataSettings(dataset=tuple(map(str, names)), **settings), TEXT, seed=seed)


def texts(data: PreparedData | None) -> list[str]:
    assert data is not None
    return [str(TEXT.tokenizer.decode(row["input_ids"])) for row in data.dataset]


def users_of(data: PreparedData | None) -> set[str]:
    return {text.split(":")[0] for text in texts(data)}


def of_users(sizes: dict[str, int]) -> list[Row]:
    """Return rows whose text begins with their user, the users taking turns."""
    rows = [(number, user) for user, size in sizes.items() for number in range(size)]
    return [
        {"prompt": f"{user}: {number} ", "completion": f"it is {number}", "user": user}
        for number, user in sorted(rows)
    ]


def refused(*names: str | Path, **settings: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        prepare(*names, **settings)
    return caught.value


@pytest.mark.parametrize("seed", range(6))
def test_groups_are_not_divided_and_about_as_many_rows_as_requested_are_held_out(tmp_path: Path, seed: int) -> None:
    sizes = {f"user{number}": number for number in range(1, 21)}
    path = write_jsonl(tmp_path / "d.jsonl", of_users(sizes))
    prepared = prepare(path, eval_split="20%", eval_group="user", seed=seed)
    trained, held = users_of(prepared.train), users_of(prepared.evaluation)
    assert prepared.evaluation is not None
    assert trained | held == set(sizes)
    assert not trained & held
    assert (
        32 <= len(texts(prepared.evaluation)) <= 52
    )  # 42 of 210 rows are requested, and each group is at most half of the rest
    assert prepared.train.report.held_out_rows == prepared.evaluation.report.rows_trained
    assert (prepared.train.report.groups, prepared.evaluation.report.groups) == (len(trained), len(held))
    again = prepare(path, eval_split="20%", eval_group="user", seed=seed)
    assert users_of(again.evaluation) == held


def test_groups_are_drawn_by_the_seed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", of_users(dict.fromkeys("abcdefghij", 3)))
    drawn = {
        frozenset(users_of(prepare(path, eval_split="9", eval_group="user", seed=s).evaluation)) for s in range(6)
    }
    assert len(drawn) > 3
    without = prepare(path, eval_split="9")
    assert users_of(without.train) & users_of(without.evaluation)
    assert without.train.report.groups is None


def test_a_group_larger_than_requested_is_held_out_whole_with_a_note(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", of_users({"a": 20, "b": 30, "c": 40}))
    prepared = prepare(path, eval_split="2%", eval_group="user")
    assert users_of(prepared.evaluation) == {"a"}
    assert any(
        "20 rows held out, where 2% would be 2: rows of one 'user' are kept together" in note
        for note in prepared.train.notes
    )


def test_rows_are_held_out_even_if_each_is_repeated_many_times(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", of_users({"a": 3}) * 10)
    prepared = prepare(path, eval_split="2")
    assert (len(texts(prepared.evaluation)), len(texts(prepared.train))) == (10, 20)
    assert "10 rows held out, where 2 would be 2: rows that are equal are kept together" in prepared.train.notes


def test_a_single_group_cannot_be_held_out(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", of_users({"a": 20}))
    assert "they are all of one 'user'" in str(refused(path, eval_split="2", eval_group="user"))


def test_rows_without_a_group_are_held_out_individually(tmp_path: Path) -> None:
    rows = [{**row, "user": value} for row, value in zip(of_users({"a": 40}), [None, ""] * 20, strict=True)]
    del rows[0]["user"]
    path = write_jsonl(tmp_path / "d.jsonl", [*rows, *of_users({"b": 1})])
    prepared = prepare(path, eval_split="10", eval_group="user")
    assert len(texts(prepared.evaluation)) == 10
    assert (
        "40 rows without a value of 'user', each of which is held out or trained on separately" in prepared.train.notes
    )


def test_equal_rows_of_different_groups_are_never_on_both_sides(tmp_path: Path) -> None:
    common = {"prompt": "hello ", "completion": "how can I help?"}
    users = dict.fromkeys("abcdef", 5)
    path = write_jsonl(tmp_path / "d.jsonl", [*of_users(users), *({**common, "user": user} for user in users)])
    prepared = prepare(path, eval_split="6", eval_group="user")
    assert not set(texts(prepared.train)) & set(texts(prepared.evaluation))
    assert len(texts(prepared.evaluation)) == 6
    assert len(texts(prepared.train)) == 25
    assert any(
        "5 rows neither trained on nor held out: equal to one that is held out with another 'user'" in n
        for n in prepared.train.notes
    )


def test_groups_of_a_separate_held_out_set_are_not_trained(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", of_users({"a": 5, "b": 6, "c": 7}))
    held = write_jsonl(tmp_path / "held.jsonl", [{"prompt": "b: new ", "completion": "row", "user": "b"}])
    prepared = prepare(path, eval_dataset=(str(held),), eval_group="user")
    assert users_of(prepared.train) == {"a", "c"}
    assert prepared.train.report.held_out_rows == 6
    assert users_of(prepare(path, eval_dataset=(str(held),)).train) == {"a", "b", "c"}


def test_a_group_spans_data_sets_and_files(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "d.jsonl", [{**row, "user": row["user"]} for row in of_users(dict.fromkeys("1234", 3))]
    )
    rows = of_users(dict.fromkeys(("1", "2", "3", "4"), 3))
    table = pa.table({"user": [float(row["user"]) for row in rows], "text": [f"{row['user']}: text" for row in rows]})
    pq.write_table(table, tmp_path / "d.parquet")
    prepared = prepare(path, tmp_path / "d.parquet", eval_split="50%", eval_group="user")
    assert not users_of(prepared.train) & users_of(prepared.evaluation)
    assert len(users_of(prepared.train)) == 2


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_column_that_no_format_uses_is_read_for_its_groups(tmp_path: Path, kind: str) -> None:
    rows = of_users(dict.fromkeys("abcd", 4))
    path = tmp_path / f"d.{kind}"
    if kind == "csv":
        path.write_text("prompt,completion,user\n" + "".join(f"{','.join(row.values())}\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    prepared = prepare(path, eval_split="4", eval_group="user")
    assert len(users_of(prepared.evaluation)) == 1
    assert not users_of(prepared.train) & users_of(prepared.evaluation)
    assert "not used" not in prepared.train.report.recognised
    assert "not used: user" in prepare(path).train.report.recognised


def test_conversations_are_grouped_by_another_column(tmp_path: Path) -> None:
    rows = [
        {
            "messages": [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": "yes"}],
            "id": number % 3,
        }
        for number in range(30)
    ]
    prepared = prepare(write_jsonl(tmp_path / "d.jsonl", rows), eval_split="10", eval_group="id")
    numbers = {int(text.split("user\n")[1].split("?")[0]) % 3 for text in texts(prepared.evaluation)}
    assert len(numbers) == 1
    assert len(texts(prepared.evaluation)) == 10


def test_rows_can_be_grouped_by_a_trained_column(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i % 10}: why? ", "completion": f"because {i}"} for i in range(40)]
    prepared = prepare(write_jsonl(tmp_path / "d.jsonl", rows), eval_split="25%", eval_group="prompt")
    assert len(users_of(prepared.evaluation)) == 2
    assert not users_of(prepared.train) & users_of(prepared.evaluation)


def test_a_missing_group_column_is_an_error_that_names_the_nearest(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", of_users({"a": 3, "b": 3}))
    other = write_jsonl(tmp_path / "other.jsonl", [{"prompt": "p", "completion": "c"}])
    error = refused(path, eval_split="2", eval_group="users")
    assert "d.jsonl has no column 'users'" in str(error)
    assert (error.hint, error.setting) == ("Did you mean user?", "data.eval_group")
    # Every data set needs one: rows of an unknown group could be on both sides.
    assert "other.jsonl has no column 'user'" in str(refused(path, other, eval_split="2", eval_group="user"))
    held = refused(path, eval_dataset=(str(other),), eval_group="user")
    assert "other.jsonl has no column 'user'" in str(held)
    assert held.hint == "Its columns are prompt, completion."


def test_a_group_that_is_not_a_single_value_is_a_bad_row(tmp_path: Path) -> None:
    rows = [*of_users({"a": 3, "b": 3}), {"prompt": "p", "completion": "c", "user": ["a", "b"]}]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    error = refused(path, eval_split="2", eval_group="user")
    assert "row 7 (line 7): 'user' must be a single value to hold out rows by, found a list" in str(error)
    assert prepare(path, eval_split="2", eval_group="user", on_bad_row="skip").train.report.bad_rows == 1
    assert prepare(path, eval_split="2").train.report.bad_rows == 0


def test_a_group_does_not_depend_on_how_its_value_is_written() -> None:
    same = [digest_group({"user": value}, "user") for value in (7, 7.0, "7")]
    assert len(set(same)) == 1
    different = [digest_group({"user": value}, "user") for value in (7, 8, 7.5, "seven", True, False)]
    assert len(set(different)) == len(different)
    for none in ({}, {"user": None}, {"user": ""}, {"user": float("nan")}):
        assert digest_group(none, "user") == NO_GROUP
    assert digest_group({"user": 7}, None) == NO_GROUP


def test_groups_without_held_out_rows_are_an_error() -> None:
    flags = {"model.name": "m", "data.dataset": "d.jsonl", "output.directory": "o", "data.eval_group": "user"}
    with pytest.raises(SettingsError, match="no effect without held-out data"):
        resolve(Sources(flags={path: (path, value) for path, value in flags.items()}), TrainSettings)


@pytest.mark.parametrize("seed", range(12))
def test_held_out_and_trained_rows_share_no_row_and_no_group(tmp_path: Path, seed: int) -> None:
    chance = np.random.default_rng(seed)
    rows = [
        {
            "prompt": f"{chance.integers(15)} ",
            "completion": f"{chance.integers(3)} " + "word " * int(chance.integers(12)),
            "user": None if chance.random() < 0.1 else int(chance.integers(9)),
        }
        for _ in range(90)
    ]
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", rows[start::2]) for name, start in (("a", 0), ("b", 1))]
    settings: dict[str, Any] = {
        "eval_split": str(chance.choice(["10%", "0.4", "7"])),
        "drop_duplicates": bool(chance.integers(2)),
        "on_long": str(chance.choice(["drop", "truncate"])),
        "mixing": str(chance.choice(["weights", "first_exhausted", "all_exhausted"])),
    }
    prepared = prepare(
        f"{paths[0]}*0.4", f"{paths[1]}*1.3", eval_group="user", max_length=16, accept_lost=True, seed=seed, **settings
    )
    assert prepared.evaluation is not None
    sides = [
        (set(data.table.truncated_digest[data.selected]), set(data.table.group[data.selected]) - {NO_GROUP})
        for data in (prepared.train, prepared.evaluation)
    ]
    assert all(rows_of_side for rows_of_side, _ in sides)
    assert not sides[0][0] & sides[1][0]
    assert not sides[0][1] & sides[1][1]
    assert not set(texts(prepared.train)) & set(texts(prepared.evaluation))


@pytest.mark.parametrize("seed", range(20))
def test_units_are_held_out_whole_and_one_is_always_left(seed: int) -> None:
    chance = np.random.default_rng(seed)
    unit = chance.integers(0, chance.integers(1, 12), chance.integers(1, 60))
    for wanted in (1, len(unit) // 3, len(unit) - 1, len(unit)):
        held = hold_out(unit, wanted, seed)
        assert not set(unit[held]) & set(unit[~held])
        assert (~held).any()
        assert held.any() == (len(set(unit)) > 1)


def test_rows_that_differ_only_in_spelling_details_are_counted_and_named(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "d.jsonl", [{"prompt": f"What is {i}? ", "completion": f"It is {i}."} for i in range(30)]
    )
    near = [
        {"prompt": "what is  3 ?\n", "completion": "it is 3"},
        {"prompt": "WHAT IS 4?", "completion": " “It is 4”!"},
        {"prompt": "What is 5? ", "completion": "It is six."},
    ]
    held = write_jsonl(tmp_path / "held.jsonl", near)
    prepared = prepare(path, eval_dataset=(str(held),))
    assert prepared.evaluation is not None
    assert (prepared.evaluation.report.near_duplicate_rows, prepared.train.report.near_duplicate_rows) == (2, None)
    settings = DataSettings(dataset=(str(path),), eval_dataset=(str(held),))
    inspection = inspect_data(settings, TrainingSettings(), TEXT, num_previews=1)
    (trouble,) = [trouble for trouble in inspection.troubles if "held out" in trouble.kind]
    assert (trouble.rows, trouble.where) == (2, (f"{held}, row 1", f"{held}, row 2"))
    assert json.loads(json.dumps(inspection.as_json(), default=str))["evaluation"]["near_duplicate_rows"] == 2


def test_rows_that_are_not_fed_are_not_near_duplicates(tmp_path: Path) -> None:
    long = {"prompt": "What is it? ", "completion": "word " * 100}
    path = write_jsonl(tmp_path / "d.jsonl", [long, {"prompt": "a", "completion": "b"}])
    held = write_jsonl(tmp_path / "held.jsonl", [{**long, "completion": "Word " * 100}])
    settings: dict[str, Any] = {"eval_dataset": (str(held),), "accept_lost": True}
    for on_long, count in (("truncate", 1), ("drop", 0)):
        if on_long == "drop":
            write_jsonl(held, [{"prompt": "c", "completion": "d"}])
        prepared = prepare(path, max_length=32, on_long=on_long, **settings)
        assert prepared.evaluation is not None
        assert prepared.evaluation.report.near_duplicate_rows == count


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("Größe \u2013 “a”, b.", "GRÖSSE a b"),
        ("全角\uff0c\uff21\uff11。", "全角 a1"),
        ("e\u0301t\u00e9", "\u00c9T\u00c9"),
        ("two\n\n  lines\t", "Two lines"),
        ("नमस्ते।", "नमस्ते"),
        ("", "...!"),
    ],
)
def test_texts_that_differ_only_in_case_punctuation_and_spaces_have_one_digest(text: str, other: str) -> None:
    assert digest_text(text) == digest_text(other)


@pytest.mark.parametrize(
    ("text", "other"),
    [("1.5", "15"), ("की", "कि"), ("a b", "ab"), ("no", "not"), ("x²", "x"), ("ไม่", "ไม"), ("\ud800", "\ud801")],
)
def test_different_texts_have_different_digests(text: str, other: str) -> None:
    assert digest_text(text) != digest_text(other)


@pytest.mark.parametrize("eval_split", ["1", "10%"])
def test_if_no_row_can_be_used_the_error_is_about_the_rows(tmp_path: Path, eval_split: str) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"question": "q", "answer": 5}, {"question": "q2", "answer": 6}])
    for on_bad_row in ("error", "skip"):
        error = refused(path, eval_split=eval_split, on_bad_row=on_bad_row)
        assert "'answer' must be text, found a number" in str(error)
        assert "Hold out fewer" not in str(error.hint)
