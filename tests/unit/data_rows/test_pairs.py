"""Rows of two answers: the forms in which they are read, what is trained of them, cut and refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from qlora_cli.data.feeding.collate import sequences_of
from qlora_cli.data.feeding.prepare import PreparedData, prepare_data
from qlora_cli.data.showing.preview import preview_rows
from qlora_cli.data.tokenizing.encode import TextTokenizer
from qlora_cli.errors import DataError
from qlora_cli.events import SilentReporter
from qlora_cli.model_files.source import ModelSource
from qlora_cli.settings.models import DataSettings, ModelSettings
from qlora_cli.tokenizing.tokenizer import load_tokenizer
from tests.conftest import ASSETS, write_jsonl

USER, GOOD, BAD = (
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "first answer"},
    {"role": "assistant", "content": "no"},
)
SYSTEM = {"role": "system", "content": "Be brief."}
CHAT = [USER, {"role": "assistant", "content": "earlier"}, {"role": "user", "content": "two"}]
RENDERED = "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n"
TEXTS = {"prompt": "Why?\n", "chosen": "because", "rejected": "so"}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    base = ASSETS / "base"
    source = ModelSource(name="demo", path=base, base_name="demo", tokenizer_path=base)
    return load_tokenizer(source, ModelSettings(name="demo")).tokenizer


def prepare(path: Path, tokenizer: PreTrainedTokenizerBase, *rows: Any, **settings: Any) -> PreparedData:
    """Return the rows as pairs."""
    assert tokenizer.eos_token_id is not None
    text = TextTokenizer(tokenizer=tokenizer, end_ids=frozenset({tokenizer.eos_token_id}), reporter=SilentReporter())
    dataset = str(write_jsonl(path / "pairs.jsonl", list(rows)))
    return prepare_data(DataSettings(dataset=dataset, format="preference", **settings), text, seed=0).train


def texts(data: PreparedData, tokenizer: PreTrainedTokenizerBase, row: int = 0) -> list[tuple[str, str]]:
    """Return the untrained and the trained text of both sequences of a row."""
    sides = []
    for side in sequences_of(data.dataset[row]):
        trained = [token for token, label in zip(side["input_ids"], side["labels"], strict=True) if label != -100]
        context = [token for token, label in zip(side["input_ids"], side["labels"], strict=True) if label == -100]
        sides.append((str(tokenizer.decode(context)), str(tokenizer.decode(trained))))
    return sides


@pytest.mark.parametrize(
    ("row", "missing"),
    [({"prompt": "a", "chosen": "b"}, "rejected"), ({"question": "a", "answer": "b"}, "chosen, rejected")],
)
def test_what_a_pair_lacks_is_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, row: dict[str, str], missing: str
) -> None:
    with pytest.raises(DataError, match=f"has no column {missing}, which the format preference needs"):
        prepare(tmp_path, tokenizer, row)


@pytest.mark.parametrize(
    ("row", "context"),
    [
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, RENDERED),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, RENDERED),
        ({"prompt": [USER], "chosen": GOOD, "rejected": BAD}, RENDERED),
        ({"prompt": [USER], "chosen": "first answer", "rejected": "no"}, RENDERED),
        ({"prompt": "one", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, RENDERED),
        ({"prompt": "one", "chosen": [GOOD], "rejected": [BAD]}, RENDERED),
        ({"question": "one", "chosen": "first answer", "rejected": "no"}, RENDERED),
        (
            {"system": "Be brief.", "question": "one", "chosen": "first answer", "rejected": "no"},
            f"<|im_start|>system\nBe brief.<|im_end|>\n{RENDERED}",
        ),
        (
            {"chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]},
            f"<|im_start|>system\nBe brief.<|im_end|>\n{RENDERED}",
        ),
        ({"prompt": RENDERED, "chosen": "first answer", "rejected": "no"}, RENDERED),
    ],
)
def test_both_answers_follow_one_prompt_which_is_not_trained(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], context: str
) -> None:
    sides = texts(prepare(tmp_path, tokenizer, row), tokenizer)
    assert [trained for _, trained in sides] == ["first answer<|im_end|>", "no<|im_end|>"]
    assert [before.removeprefix("<|bos|>").rstrip() for before, _ in sides] == [context.rstrip()] * 2


def test_answers_that_both_conversations_begin_with_are_not_trained(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    sides = texts(prepare(tmp_path, tokenizer, {"chosen": [*CHAT, GOOD], "rejected": [*CHAT, BAD]}), tokenizer)
    assert [trained for _, trained in sides] == ["first answer<|im_end|>", "no<|im_end|>"]
    assert all("earlier<|im_end|>" in before for before, _ in sides)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**TEXTS, "rejected": "because"}, "'chosen' and 'rejected' are equal"),
        ({**TEXTS, "chosen": " "}, "'chosen' is empty"),
        ({**TEXTS, "rejected": [BAD]}, "'rejected' must be text, found a list"),
        ({"chosen": "a", "rejected": "b"}, "'chosen' and 'rejected' are texts, and there is no prompt"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "begin with no common message, and there is no prompt"),
        (
            {"prompt": "else", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            "'prompt' is not among the messages that both answers begin with",
        ),
        ({"chosen": [USER, GOOD], "rejected": []}, "'rejected' is empty"),
    ],
)
def test_a_row_that_is_no_pair_is_refused_by_its_number(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=r"row 1") as caught:
        prepare(tmp_path, tokenizer, row)
    assert message in str(caught.value)


def test_a_pair_is_cut_and_dropped_as_one(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    long = {"prompt": "Why?\n", "chosen": "because " * 20, "rejected": "so"}
    same_when_cut = {"prompt": "Why?\n", "chosen": "because " * 20 + "a", "rejected": "because " * 20 + "b"}
    rows = (TEXTS, long, same_when_cut)
    whole = prepare(tmp_path, tokenizer, *rows)
    cut = prepare(tmp_path, tokenizer, *rows, max_length=16, accept_lost=True)
    assert [len(side["input_ids"]) for row in cut.dataset for side in sequences_of(row)][2] == 16
    assert (cut.report.truncated_rows, cut.report.rows_trained, cut.report.rows_without_supervision) == (2, 2, 1)
    assert cut.report.supervised_tokens + cut.report.supervised_tokens_lost == whole.report.supervised_tokens
    dropped = prepare(tmp_path, tokenizer, *rows, max_length=16, on_long="drop", accept_lost=True)
    assert (dropped.report.dropped_rows, dropped.report.rows_trained) == (2, 1)
    with pytest.raises(DataError, match=r"row 2: \d+ tokens, more than --max-length 16"):
        prepare(tmp_path, tokenizer, *rows, max_length=16, on_long="error")


def test_a_pair_takes_its_tokens_joined_and_twice_its_longer_side_padded(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    data = prepare(tmp_path, tokenizer, TEXTS, {**TEXTS, "chosen": "because of all that"})
    sides = [[len(side["input_ids"]) for side in sequences_of(row)] for row in data.dataset]
    np.testing.assert_array_equal(data.lengths, [sum(of_row) for of_row in sides])
    np.testing.assert_array_equal(data.padded_lengths, [2 * max(of_row) for of_row in sides])
    assert data.longest_tokens == max(map(max, sides))


def test_a_preview_shows_both_sides(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    previews = preview_rows(prepare(tmp_path, tokenizer, TEXTS), tokenizer, 1)
    assert [preview.where.rpartition(", ")[2] for preview in previews] == ["chosen", "rejected"]
    assert ["because" in preview.one_line(200) for preview in previews] == [True, False]


def test_pairs_are_compared_only_if_they_are_asked_for(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(TEXTS) + "\n", encoding="utf-8")
    assert tokenizer.eos_token_id is not None
    text = TextTokenizer(tokenizer=tokenizer, end_ids=frozenset({tokenizer.eos_token_id}), reporter=SilentReporter())
    with pytest.raises(DataError, match="holds preferences") as caught:
        prepare_data(DataSettings(dataset=str(file)), text, seed=0)
    assert "use --objective dpo or orpo. To train on the better answers: --format prompt_completion" in str(
        caught.value.hint
    )
