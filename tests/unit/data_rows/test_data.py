"""From rows to tokens and labels: formats, masks, ends of turns, BOS, and invalid rows."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from qlora_cli.data.feeding.prepare import PreparedData, prepare_data
from qlora_cli.data.finding.sources import check_dataset_name
from qlora_cli.data.tokenizing.encode import TextTokenizer
from qlora_cli.errors import DataError
from qlora_cli.events import SilentReporter
from qlora_cli.model_files.source import ModelSource
from qlora_cli.settings.models import DataSettings, ModelSettings
from qlora_cli.tokenizing.tokenizer import load_tokenizer
from tests.conftest import ASSETS, write_jsonl


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    base = ASSETS / "base"
    source = ModelSource(name="demo", path=base, base_name="demo", tokenizer_path=base)
    return load_tokenizer(source, ModelSettings(name="demo")).tokenizer


def prepare(path: Path, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> PreparedData:
    assert tokenizer.eos_token_id is not None
    text = TextTokenizer(tokenizer=tokenizer, end_ids=frozenset({tokenizer.eos_token_id}), reporter=SilentReporter())
    return prepare_data(DataSettings(dataset=str(path), **settings), text, seed=0).train


def trained_text(data: PreparedData, tokenizer: PreTrainedTokenizerBase, row: int = 0) -> str:
    return tokenizer.decode([label for label in data.dataset[row]["labels"] if label != -100])  # type: ignore[return-value]


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "first answer"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "second answer"},
]


def test_every_assistant_turn_is_trained_to_its_end_and_nothing_else(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    data = prepare(write_jsonl(tmp_path / "d.jsonl", [{"messages": CHAT}]), tokenizer)
    assert trained_text(data, tokenizer) == "first answer<|im_end|>second answer<|im_end|>"


def test_tokens_equal_those_that_a_server_renders(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    data = prepare(write_jsonl(tmp_path / "d.jsonl", [{"messages": CHAT}]), tokenizer)
    served: Any = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=True)
    assert data.dataset[0]["input_ids"] == served["input_ids"]
    assert data.dataset[0]["input_ids"].count(tokenizer.bos_token_id) == 1


def test_plain_text_has_one_bos_and_one_end_and_is_trained_whole(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    data = prepare(write_jsonl(tmp_path / "d.jsonl", [{"text": "a line of text"}]), tokenizer)
    ids, labels = data.dataset[0]["input_ids"], data.dataset[0]["labels"]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    assert labels[1:] == ids[1:]


def test_prompts_are_masked_and_the_end_is_trained(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "Question: why?\nAnswer:", "completion": " because."}])
    assert trained_text(prepare(path, tokenizer), tokenizer) == " because.<|im_end|>"
    everything = prepare(path, tokenizer, loss_on="all")
    assert trained_text(everything, tokenizer).endswith("Question: why?\nAnswer: because.<|im_end|>")


def test_conversational_prompts_train_only_the_completion(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    row = {"prompt": CHAT[:4], "completion": CHAT[4:]}
    data = prepare(write_jsonl(tmp_path / "d.jsonl", [row]), tokenizer)
    assert trained_text(data, tokenizer) == "second answer<|im_end|>"


def test_alpaca_rows_go_through_the_chat_template_if_there_is_one(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = write_jsonl(
        tmp_path / "d.jsonl",
        [
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            {"instruction": "Greet.", "input": "", "output": "Hello"},
        ],
    )
    data = prepare(path, tokenizer)
    assert trained_text(data, tokenizer, 0) == "3<|im_end|>"
    assert "Add.\n\n1 2<|im_end|>" in tokenizer.decode(data.dataset[0]["input_ids"])
    assert "user\nGreet.<|im_end|>" in tokenizer.decode(data.dataset[1]["input_ids"])
    tokenizer.chat_template = None
    plain = prepare(path, tokenizer)
    assert trained_text(plain, tokenizer, 1) == "Hello<|im_end|>"
    assert "### Response:\nHello" in tokenizer.decode(plain.dataset[1]["input_ids"])


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_kind_of_file_gives_the_same_tokens(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, suffix: str
) -> None:
    import pandas as pd

    rows = [{"prompt": "two plus, two is ", "completion": "four"}, {"prompt": 'a "quoted"\nline ', "completion": "b"}]
    path, frame = tmp_path / f"d{suffix}", pd.DataFrame(rows)
    if suffix == ".jsonl":
        write_jsonl(path, rows)
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    elif suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path)
    fingerprint = prepare(path, tokenizer).report.fingerprint
    assert fingerprint == prepare(write_jsonl(tmp_path / "same.jsonl", rows), tokenizer).report.fingerprint
    folder = tmp_path / "folder"
    folder.mkdir()
    path.rename(folder / path.name)
    assert prepare(folder, tokenizer).report.fingerprint == fingerprint


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", '{"text": "ok"}\n{"text": \n', r"row 2 \(line 2\): broken JSON"),
        ("b.jsonl", '{"text": "ok"}\n\n[1]\n', r"row 2 \(line 3\): expected a JSON object"),
        ("c.json", '[{"text": "ok"}, 3]', r"row 2 \(line 1\): expected a JSON object, found number"),
        ("d.csv", "text,other\na,b\nc,d,e\n", r"row 2 \(line 3\): 3 fields, the header has 2"),
        ("e.jsonl", '{"ask": "a", "tell": "b"}\n', "fit no known format: ask, tell"),
        ("f.jsonl", '{"messages": [], "prompt": "b", "completion": "c"}\n', "fit several formats"),
        (
            "g.jsonl",
            '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": null}\n',
            r"row 2 \(line 2\): 'completion' must be text, found null",
        ),
        (
            "h.jsonl",
            '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": " "}\n',
            r"row 2 \(line 2\): 'completion' is empty",
        ),
        ("i.jsonl", '{"messages": [{"role": "she", "content": "x"}]}\n', r"row 1 .*: messages\[0\].role is 'she'"),
        ("j.jsonl", '{"messages": [{"role": "assistant", "content": "x"}]}\n', "nothing to answer"),
        ("k.jsonl", '{"messages": []}\n', "row 1 .*: 'messages' must be a list of at least one"),
        (
            "l.jsonl",
            '{"messages": [{"role": "user", "content": "x"}]}\n',
            "no row of .* is left to train on: of 1 row, 1 without an answer",
        ),
    ],
)
def test_an_invalid_row_is_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, name: str, content: str, expected: str
) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=expected) as caught:
        prepare(path, tokenizer)
    assert str(path) in str(caught.value)


def test_text_that_is_not_utf8_is_named_by_line(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"text": "ok"}\n{"text": "caf' + b'\xe9"}\n')
    with pytest.raises(DataError, match=r"row 2 \(line 2\): not UTF-8"):
        prepare(path, tokenizer)


def test_conversations_need_a_chat_template(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        prepare(write_jsonl(tmp_path / "d.jsonl", [{"messages": CHAT}]), tokenizer)


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content if loop.last or m.role == 'user' else 'gone' }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(DataError, match="renders message 1 differently"):
        prepare(write_jsonl(tmp_path / "d.jsonl", [{"messages": CHAT[1:]}]), tokenizer)
    # Cut after the turn, the row is fine.
    data = prepare(write_jsonl(tmp_path / "e.jsonl", [{"messages": CHAT[1:3]}]), tokenizer)
    assert trained_text(data, tokenizer) == "first answer<|im_end|>"


def test_impossible_names_are_rejected_immediately(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "notes.docx").write_text("x")
    (tmp_path / "folder").mkdir()
    for name, expected in (
        ("missing.jsonl", "no such file"),
        (str(tmp_path / "empty.jsonl"), "is empty"),
        (str(tmp_path / "notes.docx"), "file type that is not supported"),
        (str(tmp_path / "folder"), "holds no data"),
    ):
        problem = check_dataset_name(name)
        assert problem is not None
        assert expected in str(problem)
    assert check_dataset_name("owner/name") is None
