"""Columns that change what a row means: preferences, verdicts and pictures are refused, with flags that work."""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from transformers import PreTrainedTokenizerBase

from qlora_cli.errors import DataError
from qlora_cli.settings.objectives import DataFormat
from tests.support.data.preparing import make_tokenizer, prepare, prepare_file, refusal, trained

Row = dict[str, Any]
ASK, ANSWER = {"role": "user", "content": "6 times 7?"}, {"role": "assistant", "content": "42"}
HUMAN, GPT = {"from": "human", "value": "6 times 7?"}, {"from": "gpt", "value": "42"}
WRONG, END = {"role": "assistant", "content": "41"}, "<|im_end|>"
TWO = {"role": "assistant", "content": "2"}
EARLIER = [{"role": "user", "content": "1 plus 1?"}, TWO]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return make_tokenizer()


def typed(hint: str | None) -> dict[str, str]:
    """Return the flags that a hint proposes, as a shell reads them."""
    words = shlex.split((hint or "").partition(": ")[2])
    assert words[::2] == ["--format", "--columns"], hint
    return {"format": words[1], "columns": words[3]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "6 times 7?", "chosen": "42", "rejected": "41"}, "42"),
        ({"question": "6 times 7?", "chosen": "42", "rejected": "41", "system": "Be brief."}, "42"),
        ({"instruction": "6 times 7?", "input": "", "chosen": "42", "rejected": "41"}, "42"),
        ({"instruction": "6 times 7?", "input": "", "output": "40", "chosen": "42", "rejected": "41"}, "42"),
        ({"question": "6 times 7?", "response_j": "42", "response_k": "41"}, "42"),
        ({"chosen": "6 times 7? 42", "rejected": "6 times 7? 41"}, "6 times 7? 42"),
        ({"prompt": "6 times 7?", "chosen": [ASK, ANSWER], "rejected": [ASK, WRONG]}, "42"),
        ({"chosen": [ASK, ANSWER], "rejected": [ASK, WRONG], "score_chosen": 5.0}, "42"),
        ({"messages": [ASK, TWO], "chosen": [ASK, ANSWER], "rejected": [ASK, WRONG]}, "42"),
        ({"prompt": [ASK], "chosen": [ANSWER], "rejected": [WRONG]}, "42"),
        ({"prompt": [ASK], "chosen": ANSWER, "rejected": WRONG}, "42"),
        ({"messages": [*EARLIER, ASK], "chosen": ANSWER, "rejected": WRONG}, "42"),
        ({"conversations": [HUMAN], "chosen": GPT, "rejected": {**GPT, "value": "41"}}, "42"),
        ({"conversations": [HUMAN, GPT, HUMAN], "chosen": [GPT], "rejected": [GPT]}, "42"),
        ({"chosen_messages": [ASK, ANSWER], "rejected_messages": [ASK, WRONG]}, "42"),
        ({"messages": [ASK, ANSWER], "rejected_response": "41"}, "42"),
        ({"messages": [ASK, ANSWER], "rejected_messages": [ASK, WRONG]}, "42"),
        ({"query": "6 times 7?", "response": "42", "rejected_response": "41"}, "42"),
        ({"text": "6 times 7? 42", "chosen": "x", "rejected": "y"}, "x"),
        ({"question": "6 times 7?", "answer": "42", "rejected_answer": "41"}, "42"),
        ({"question": "6 times 7?", "answer": "42", "answer_rejected": "41"}, "42"),
        ({"question": "6 times 7?", "answer": "40", "chosenAnswer": "42", "rejectedAnswer": "41"}, "42"),
        ({"question": "6 times 7?", "answer": "42", "Non_Preferred_Output": "41"}, "42"),
        ({"prompt": "6 times 7?", "completion": "42", "responses": ["42", "41"], "scores": [1, 0]}, "42"),
    ],
)
def test_preferences_of_every_shape_are_refused_and_the_flags_of_the_hint_train_the_better_answer(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, row: Row, expected: str
) -> None:
    error = refusal(tmp_path, tokenizer, [row])
    assert "preference" in str(error)
    assert re.search("one answer (of which )?is to be avoided", str(error))
    data = prepare(tmp_path, tokenizer, [row], **typed(error.hint))
    assert trained(data, tokenizer) == f"{expected}{END}"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "6 times 7?", "chosen": [ANSWER], "rejected": [WRONG]},
        {"prompt": "6 times 7?", "responses": ["42", "41"], "scores": [1, 0]},
        {"prompt": "6 times 7?", "completions": ["42", "41"], "labels": [True, False]},
        {"input": {"messages": [ASK]}, "preferred_output": [ANSWER], "non_preferred_output": [WRONG]},
        {"my=prompt": "6 times 7?", "chosen": {"text": "42"}, "rejected": {"text": "41"}},
    ],
)
def test_no_flags_are_proposed_if_none_work(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, row: Row) -> None:
    error = refusal(tmp_path, tokenizer, [row])
    assert "preference" in str(error)
    assert error.hint == "Write the answers to train on as rows of their own, or as messages."


def test_a_preference_in_a_later_row_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"messages": [ASK, ANSWER]}] * 150 + [{"messages": [ASK, ANSWER], "rejected_response": "41"}]
    assert "row 151" in str(refusal(tmp_path, tokenizer, rows))
    assert prepare(tmp_path, tokenizer, rows, on_bad_row="skip").report.bad_rows == 1


@pytest.mark.parametrize("empty", [None, "", []])
def test_empty_preference_columns_are_not_preferences(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, empty: object
) -> None:
    data = prepare(tmp_path, tokenizer, [{"messages": [ASK, ANSWER], "chosen": empty, "rejected": empty}])
    assert trained(data, tokenizer) == f"42{END}"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "6 times 7?", "completion": "42"},
        {"messages": [ASK, ANSWER]},
        {"conversations": [HUMAN, GPT]},
        {"instruction": "6 times 7?", "output": "42"},
        {"question": "6 times 7?", "answer": "42"},
    ],
)
@pytest.mark.parametrize(("column", "value"), [("label", True), ("label", False), ("label", "True"), ("kto_tag", 0)])
def test_verdicts_are_refused_and_the_flags_of_the_hint_train_all_rows(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, row: Row, column: str, value: object
) -> None:
    rows = [{**row, column: value}]
    error = refusal(tmp_path, tokenizer, rows)
    assert f"{column!r} says whether the answer is wanted (KTO)" in str(error)
    assert f"use --objective kto. Or leave out the rows whose {column!r} is false" in str(error.hint)
    assert trained(prepare(tmp_path, tokenizer, rows, **typed(error.hint)), tokenizer) == f"42{END}"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"system": "Be brief."}, {"system_prompt": "Be kind."}),
        ({"tools": [{"name": "f"}]}, {"functions": [{"name": "g"}]}),
        ({"tools": []}, {"functions": [{"name": "g"}]}),
    ],
)
def test_two_columns_for_one_part_are_refused_until_one_is_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, first: Row, second: Row
) -> None:
    (part,), (name,) = first, second
    rows = [{"messages": [ASK, ANSWER], **first, **second}]
    error = refusal(tmp_path, tokenizer, rows)
    assert f"{part!r} and {name!r} are both {part}, but only one is read" in str(error)
    data = prepare(tmp_path, tokenizer, rows, columns=str(error.hint).rpartition("--columns ")[2])
    assert trained(data, tokenizer) == f"42{END}"
    assert prepare(tmp_path, tokenizer, [{"messages": [ASK, ANSWER], **first, name: None}]).report.rows == 1


@pytest.mark.parametrize(
    ("column", "value"),
    [
        *(("loss_mask", [0, 1]), ("train", False), ("trainable", True), ("weight", [0, 1.0]), ("weight", False)),
        *(
            ("train", 0),
            ("train", "false"),
            ("train", "0"),
            ("trainable", " False "),
            ("masked", "true"),
            ("masked", 1),
        ),
        *(("loss_mask", "[0, 0, 0, 1]"), ("weight", 0), ("loss_weight", "0"), ("loss_scale", 0.0), ("loss", 0)),
    ],
)
def test_switches_of_a_whole_row_are_refused_and_the_flags_of_the_hint_train_all(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, column: str, value: object
) -> None:
    rows = [{"messages": [*EARLIER, ASK, ANSWER], column: value}]
    error = refusal(tmp_path, tokenizer, rows)
    assert f"{column!r} says which part of the row is trained" in str(error)
    flags = typed(str(error.hint).partition("false. ")[2])
    assert trained(prepare(tmp_path, tokenizer, rows, **flags), tokenizer) == f"2{END}42{END}"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "6 times 7?", "completion": "42", "label": "arithmetic"},
        {"prompt": "6 times 7?", "completion": "42", "label": 3},
        {"prompt": "6 times 7?", "completion": "42", "label": None},
        {"text": "6 times 7? 42", "label": True},
        {"messages": [ASK, ANSWER], "score": 1.0, "source": "x"},
        {"messages": [ASK, ANSWER], "loss_mask": [], "loss": 1.5, "weight": 1},
        {"messages": [ASK, ANSWER], "loss_mask": "[]", "train": "", "training": "by hand", "loss_weight": "0.5"},
        {"messages": [ASK, ANSWER], "responses": 3, "scores": [1]},
        {"question": "6 times 7?", "answer": "42", "image_url": "x.png", "file": "x.txt"},
        {"messages": [ASK, ANSWER], "image": True, "videos": 0},
        {"messages": [ASK, ANSWER], "chosen": 1, "rejected": 0},
        {"messages": [ASK, ANSWER], "rejected_reason": "x", "preferred_language": "en"},
        {"messages": [ASK, ANSWER], "accepted": 1, "thumbs_up": 17, "is_correct": False},
        {"messages": [ASK, ANSWER], "history": "of Rome", "files": ["src/a.py"]},
        {"messages": [ASK, ANSWER], "history": [], "file": "paper.pdf"},
        {"text": "6 times 7? 42", "history": "of Rome", "tools": "a hammer"},
        {"text": "6 times 7? 42", "history": [1, 2], "tools": ["a hammer", "nails"]},
        {"messages": [ASK, ANSWER], "history": [1820, 1830]},
        {"text": "Be brief. 6 times 7? 42", "tools": "[]", "system": "Be brief."},
        {"input_ids": [1, 2], "system": "Be brief."},
    ],
)
def test_columns_that_only_describe_a_row_are_reported_as_unused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, row: Row
) -> None:
    data = prepare(tmp_path, tokenizer, [row])
    assert data.report.rows_trained == 1
    assert f"not used: {list(row)[-1]}" in data.report.recognised or f", {list(row)[-1]}" in data.report.recognised


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("images", ["x.png"]),
        ("image", "x.png"),
        ("image", {"path": "x.png", "bytes": None}),
        ("videos", [None, {"path": "x.mp4"}]),
        ("video", "x.mp4"),
        ("audios", ["x.wav"]),
        ("audio", {"array": [0.0], "path": None}),
        ("pixel_values", [[0.0]]),
        ("Image", {"bytes": "abc"}),
        ("IMAGES", ["x.png"]),
        ("image_1", "x.png"),
        ("files", ["a.pdf"]),
        ("files", [{"file_id": "x"}]),
        ("attachments", [{"file_id": "x", "name": None}]),
        ("file", {"bytes": "abc", "path": None}),
    ],
)
@pytest.mark.parametrize("row", [{"messages": [ASK, ANSWER]}, {"text": "6 times 7?"}, {"input_ids": [1, 2]}])
def test_rows_with_pictures_or_sounds_are_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, row: Row, column: str, value: object
) -> None:
    error = refusal(tmp_path, tokenizer, [{**row, column: value}])
    assert f"{column!r} holds something other than text, but only text can be trained on" in str(error)
    rows = [row, {**row, column: value}]
    assert prepare(tmp_path, tokenizer, rows, on_bad_row="skip").report.bad_rows == 1


@pytest.mark.parametrize("empty", [None, [], "", [None], {"bytes": None, "path": None}])
def test_rows_with_empty_picture_columns_are_trained(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, empty: object
) -> None:
    assert (
        trained(prepare(tmp_path, tokenizer, [{"messages": [ASK, ANSWER], "images": empty}]), tokenizer) == f"42{END}"
    )


@pytest.mark.parametrize("column", ["images", "image_path"])
def test_a_picture_placeholder_is_not_trained_as_text(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, column: str
) -> None:
    asked = [{**ASK, "content": "<image>What is it?"}, ANSWER]
    error = refusal(tmp_path, tokenizer, [{"messages": asked, column: []}])
    assert f"its text has <image>, which stands for something in {column}" in str(error)
    assert prepare(tmp_path, tokenizer, [{"messages": asked}]).report.rows == 1  # about HTML, perhaps


@pytest.mark.parametrize(
    "placeholder",
    [
        *("<image>", "<|image|>", "<|image_1|>", "<image_1>", "<image1>", "<video>", "<|audio|>", "<|image_pad|>"),
        *("<|vision_start|><|image_pad|><|vision_end|>", "Picture 1: <img>a.jpg</img>"),
    ],
)
@pytest.mark.parametrize("column", ["image_paths", "image_path", "Image_URL"])
def test_each_placeholder_next_to_a_column_of_media_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, placeholder: str, column: str
) -> None:
    asked = [{**ASK, "content": f"{placeholder}\nWhat is it?"}, ANSWER]
    error = refusal(tmp_path, tokenizer, [{"messages": asked, column: "a.png"}])
    assert f"which stands for something in {column}, but only text can be trained on" in str(error)


@pytest.mark.parametrize(
    "placeholder",
    ["<|vision_start|><|image_pad|><|vision_end|>", "<|video_pad|>", "Picture 1: <img>a.jpg</img>", "<|audio_pad|>"],
)
@pytest.mark.parametrize("by_hand", [{}, {"columns": "messages=messages"}])
def test_an_unmistakable_placeholder_is_refused_without_a_media_column(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, placeholder: str, by_hand: dict[str, str]
) -> None:
    asked = [{**ASK, "content": f"{placeholder}\nWhat is it?"}, ANSWER]
    error = refusal(tmp_path, tokenizer, [{"messages": asked}], **by_hand)
    assert "which stands for a picture, a sound or a video, but only text can be trained on" in str(error)


@pytest.mark.parametrize("text", ['<img src="x"></img>', "<img>", "<image>", "a <|pad|> of text", "<img></img>"])
def test_an_ambiguous_placeholder_is_text_without_a_media_column(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, text: str
) -> None:
    assert prepare(tmp_path, tokenizer, [{"messages": [{**ASK, "content": text}, ANSWER]}]).report.rows_trained == 1


@pytest.mark.parametrize("key", ["attachments", "files", "file", "file_ids"])
def test_a_message_with_a_file_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, key: str) -> None:
    error = refusal(tmp_path, tokenizer, [{"messages": [{**ASK, key: [{"file_id": "x"}]}, ANSWER]}])
    assert f"messages[0] holds {key}, but only text can be trained on" in str(error)
    assert prepare(tmp_path, tokenizer, [{"messages": [{**ASK, key: []}, ANSWER]}]).report.rows_trained == 1


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"messages": [ASK, ANSWER], "history": [["1 plus 1?", "2"]]}, "history"),
        ({"messages": [ASK, ANSWER], "history": '[["1 plus 1?", "2"]]'}, "history"),
        ({"conversations": [HUMAN, GPT], "history": EARLIER}, "history"),
        ({"text": "42", "system": "Be brief."}, "system"),
        ({"text": "42", "system_prompt": "Be brief."}, "system_prompt"),
        ({"text": "42", "tools": [{"name": "f"}]}, "tools"),
        ({"text": "42", "chat_template_kwargs": '{"enable_thinking": false}'}, "chat_template_kwargs"),
        ({"text": "42", "history": [["1 plus 1?", "2"]]}, "history"),
    ],
)
def test_context_without_a_part_is_refused_and_the_flags_of_the_hint_train_without_it(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, row: Row, column: str
) -> None:
    error = refusal(tmp_path, tokenizer, [row])
    assert f"{column!r} holds" in str(error)
    assert "would be ignored" in str(error)
    flags = typed(str(error.hint).partition(". ")[2])
    assert trained(prepare(tmp_path, tokenizer, [row], **flags), tokenizer).startswith("42")


@pytest.mark.parametrize(
    ("column", "value", "unwanted"),
    [
        *(("accepted", True, "false"), ("thumbs_up", False, "false"), ("thumbsUp", "true", "false")),
        *(("is_chosen", False, "false"), ("rejected", True, "true"), ("undesirable", "False", "true")),
        *(("response_accepted", False, "false"), ("thumbs_down", True, "true")),
    ],
)
def test_verdict_columns_are_recognised_by_their_words(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, column: str, value: object, unwanted: str
) -> None:
    error = refusal(tmp_path, tokenizer, [{"prompt": "6 times 7?", "completion": "42", column: value}])
    assert f"{column!r} says whether the answer is wanted (KTO)" in str(error)
    assert f"Leave out the rows whose {column!r} is {unwanted}" in str(error.hint)


UNREADABLE = ("NaN", '{"b": 1, "b": 2}', '"\\ud83d"', "[" * 600 + "]" * 600)


@pytest.mark.parametrize("value", UNREADABLE)
@pytest.mark.parametrize("column", ["weight", "kto_tag", "history", "other"])
def test_unreadable_json_is_an_error_only_where_it_may_be_context(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, column: str, value: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"text": "42", "{column}": {value}}}\n', encoding="utf-8")
    if column == "history" and value != "NaN":
        with pytest.raises(DataError, match="'history' holds earlier turns"):
            prepare_file(path, tokenizer)
    else:
        assert prepare_file(path, tokenizer).report.rows_trained == 1


NOT_TEXT = pyarrow.array([b"\xff\xfe"])


@pytest.mark.parametrize("column", ["labels", "image_url", "scores", "weight", "kto_tag", "other"])
def test_unreadable_values_in_unused_columns_are_not_errors(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, column: str
) -> None:
    columns = {"question": ["6 times 7?"], "answer": ["42"], column: NOT_TEXT}
    nested = {"question": ["6 times 7?"], "answer": ["42"], column: pyarrow.StructArray.from_arrays([NOT_TEXT], ["x"])}
    for each in (columns, nested):
        pyarrow.parquet.write_table(pyarrow.table(each), tmp_path / "rows.parquet")
        assert prepare_file(tmp_path / "rows.parquet", tokenizer).report.rows_trained == 1
    pyarrow.parquet.write_table(pyarrow.table({**columns, "answer": NOT_TEXT}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="answer: not UTF-8 text"):
        prepare_file(tmp_path / "rows.parquet", tokenizer)


@pytest.mark.parametrize("column", ["image", "Image", "images"])
@pytest.mark.parametrize("name", [None, "bytes"])
def test_pictures_as_bytes_are_refused_as_pictures(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, column: str, name: str | None
) -> None:
    picture = NOT_TEXT if name is None else pyarrow.StructArray.from_arrays([NOT_TEXT], [name])
    table = pyarrow.table({"question": ["6 times 7?"], "answer": ["42"], column: picture})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=f"'{column}' holds something other than text"):
        prepare_file(tmp_path / "rows.parquet", tokenizer)


@pytest.mark.parametrize("row", [{"label": True}, {"rejected": "41"}, {"images": ["x.png"]}])
def test_columnar_files_are_read_for_columns_that_change_the_meaning(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]
) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"prompt": "q", "completion": "a", **row}]), path)
    with pytest.raises(DataError, match=r"only text can be trained|KTO|preference"):
        prepare_file(path, tokenizer)


def test_axolotl_segments_get_a_hint_at_supported_formats(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows: list[Row] = [{"segments": [{"label": False, "text": "q"}, {"label": True, "text": "a"}]}] * 2
    error = refusal(tmp_path, tokenizer, rows)
    assert "holds segments of text" in str(error)
    assert "prompt and completion" in str(error.hint)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("chat_template", {"messages": [ASK, ANSWER]}),
        ("chatml", {"conversations": [ASK, ANSWER]}),
        ("conversational", {"conversations": [HUMAN, GPT]}),
        ("openai", {"messages": [ASK, ANSWER]}),
        ("ShareGPT", {"conversation": [HUMAN, GPT]}),
        ("prompt-completion", {"prompt": "6 times 7?", "completion": "42"}),
        ("alpaca_chat", {"instruction": "6 times 7?", "response": "42"}),
        ("alpaca_chat.load_qa", {"question": "6 times 7?", "answer": "42"}),
        ("completion", {"text": "42"}),
    ],
)
def test_formats_can_be_given_by_the_names_of_other_tools(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, name: str, row: Row
) -> None:
    assert trained(prepare(tmp_path, tokenizer, [row], format=name), tokenizer) == f"42{END}"


@pytest.mark.parametrize(
    ("name", "expected"), [("input_output", "prompt and completion"), ("DPO", "comparison"), ("kto.x", "comparison")]
)
def test_unsupported_formats_of_other_tools_get_a_hint(name: str, expected: str) -> None:
    assert expected in str(DataFormat.hint_for(name))
    assert DataFormat.hint_for("nonsense") is None
