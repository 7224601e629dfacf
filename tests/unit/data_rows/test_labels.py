"""Rows of an answer and a label: how labels are spelt, what is trained, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from qlora_cli.data.feeding.label_balance import balance_notes
from qlora_cli.data.feeding.prepare import PreparedData, prepare_data
from qlora_cli.data.rows.examples import IGNORE_INDEX
from qlora_cli.data.showing.preview import preview_rows
from qlora_cli.data.tokenizing.encode import TextTokenizer
from qlora_cli.errors import DataError
from qlora_cli.events import SilentReporter
from qlora_cli.model_files.source import ModelSource
from qlora_cli.settings.models import DataSettings, ModelSettings, TrainingSettings
from qlora_cli.settings.objectives import Objective
from qlora_cli.tokenizing.tokenizer import load_tokenizer
from qlora_cli.training.preferences.label_batches import LabelCollator
from tests.conftest import ASSETS, write_jsonl

WANTED, UNWANTED = (
    {"prompt": "Why?\n", "completion": "because", "label": True},
    {"prompt": "When?\n", "completion": "no", "label": False},
)
USER, ASSISTANT = {"role": "user", "content": "one"}, {"role": "assistant", "content": "first answer"}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    base = ASSETS / "base"
    source = ModelSource(name="demo", path=base, base_name="demo", tokenizer_path=base)
    return load_tokenizer(source, ModelSettings(name="demo")).tokenizer


def prepare_file(file: Path, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> PreparedData:
    """Return the rows of a file as answers with labels."""
    assert tokenizer.eos_token_id is not None
    text = TextTokenizer(tokenizer=tokenizer, end_ids=frozenset({tokenizer.eos_token_id}), reporter=SilentReporter())
    given = {"format": "unpaired_preference", "dataset": str(file), **settings}
    return prepare_data(DataSettings.model_validate(given), text, seed=0).train


def prepare(path: Path, tokenizer: PreTrainedTokenizerBase, *rows: Any, **settings: Any) -> PreparedData:
    """Return the rows as answers with labels."""
    return prepare_file(write_jsonl(path / "labels.jsonl", list(rows)), tokenizer, **settings)


def trained_text(data: PreparedData, tokenizer: PreTrainedTokenizerBase, row: int) -> str:
    """Return the text that is trained of a row."""
    one = data.dataset[row]
    return str(tokenizer.decode([token for token in one["labels"] if token != IGNORE_INDEX]))


@pytest.mark.parametrize("column", ["label", "kto_tag", "kto_label", "desirable"])
@pytest.mark.parametrize(("true", "false"), [(True, False), (1, 0), (1.0, 0.0), ("True", "false"), (" 1", "0")])
def test_labels_are_read_in_every_spelling(
    column: str, true: object, false: object, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [{"prompt": "Why?\n", "completion": text, column: label} for text, label in (("a", false), ("b", true))]
    data = prepare(tmp_path, tokenizer, *rows)
    assert [row["desirable"] for row in data.dataset] == [0, 1]
    assert (data.report.desirable_rows, data.report.undesirable_rows) == (1, 1)
    assert data.report.recognised.startswith("unpaired_preference of prompt_completion")


def test_labels_of_csv_are_text(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file = tmp_path / "labels.csv"
    file.write_text("question,answer,label\none,first,TRUE\ntwo,second,FALSE\n", encoding="utf-8")
    data = prepare_file(file, tokenizer)
    assert [row["desirable"] for row in data.dataset] == [1, 0]
    assert data.report.recognised.startswith("unpaired_preference of question_answer")


@pytest.mark.parametrize("label", ["yes", "", 2, -1, None, [True]])
def test_a_label_that_means_neither_is_refused_by_row_and_column(
    label: object, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(DataError, match=r"row 2 \(line 2\): 'label' must be true") as caught:
        prepare(tmp_path, tokenizer, WANTED, {**UNWANTED, "label": label})
    assert caught.value.hint is not None


def test_labels_of_one_kind_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    for row, kind in ((WANTED, "wanted"), (UNWANTED, "unwanted")):
        with pytest.raises(DataError, match=f"has {kind} answers alone by its labels \\(2 rows\\)"):
            prepare(tmp_path, tokenizer, row, {**row, "prompt": "Who?\n"})


def test_the_last_answer_of_a_conversation_is_judged(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [USER, {"role": "assistant", "content": "earlier"}, {"role": "user", "content": "two"}, ASSISTANT]
    data = prepare(
        tmp_path, tokenizer, {"messages": turns, "label": True}, {"messages": [USER, ASSISTANT], "label": 0}
    )
    assert [trained_text(data, tokenizer, row) for row in (0, 1)] == ["first answer<|im_end|>"] * 2
    assert [preview.where.rpartition(", ")[2] for preview in preview_rows(data, tokenizer, 2)] == [
        "wanted",
        "unwanted",
    ]


def test_one_answer_with_two_labels_is_no_duplicate(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    data = prepare(tmp_path, tokenizer, WANTED, {**WANTED, "label": False}, WANTED)
    assert data.report.duplicate_rows == 1


def test_columns_of_labels_are_named(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"prompt": "Why?\n", "completion": text, "good": text == "a", "label": 7} for text in ("a", "b")]
    data = prepare(tmp_path, tokenizer, *rows, columns={"label": "good"})
    assert [row["desirable"] for row in data.dataset] == [1, 0]
    with pytest.raises(DataError, match="has no column label, which the format unpaired_preference needs") as caught:
        prepare(tmp_path, tokenizer, {"prompt": "a", "chosen": "b", "rejected": "c"})
    assert "--objective dpo or orpo" in str(caught.value.hint)
    with pytest.raises(DataError, match=r"several columns of .* may say whether an answer is wanted"):
        prepare(tmp_path, tokenizer, {**WANTED, "kto_tag": True})
    with pytest.raises(DataError, match="fit no known format of answers with a label"):
        prepare(tmp_path, tokenizer, {"label": True, "words": "a"})


def test_a_mismatched_answer_is_that_of_the_row_before_and_no_longer_than_a_row(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    long = {"prompt": "a b c d e f g h\n", "completion": "x", "label": True}
    rows = list(prepare(tmp_path, tokenizer, long, {**UNWANTED, "completion": "p q r s t u v"}).dataset)
    longest = max(len(row["input_ids"]) for row in rows)
    made = LabelCollator(0, packing=False, longest_tokens=longest).mismatched(rows)
    prompts, answers = (
        [[token for token, label in zip(row["input_ids"], row["labels"], strict=True) if (label == -100) == is_prompt]
         for row in rows]
        for is_prompt in (True, False)
    )  # fmt: skip
    for place, row in enumerate(made):
        whole = [*prompts[place], *answers[place - 1]]
        assert list(row["input_ids"]) == whole[:longest]
        assert sum(label != -100 for label in row["labels"]) == min(len(whole), longest) - len(prompts[place]) > 0
    assert len(prompts[0]) + len(answers[1]) > longest, "or nothing is cut"


@pytest.mark.parametrize(
    ("num_wanted", "weights", "advice"),
    [
        (10, {}, "training.undesirable_weight 3.75 would balance them"),
        (1, {}, "training.desirable_weight 11 would balance them"),
        (10, {"undesirable_weight": 3.75}, None),
        (7, {}, None),
        (7, {"desirable_weight": 0.25}, "training.desirable_weight 0.714 would balance them"),
    ],
)
def test_unbalanced_labels_are_noted_with_the_weight_that_balances_them(
    num_wanted: int, weights: dict[str, float], advice: str | None, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [{**WANTED, "completion": str(number), "label": number < num_wanted} for number in range(12)]
    training = TrainingSettings(objective=Objective.KTO, **weights)
    notes = list(balance_notes(prepare(tmp_path, tokenizer, *rows).report, training))
    assert [advice is not None and advice in note for note in notes] == [True] * (advice is not None)
