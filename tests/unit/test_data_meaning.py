"""What a row says beside its text: settings of the template, tools, switches, preferences, pictures."""

import inspect
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from qlora_cli.data.encode import TextTokenizer
from qlora_cli.data.prepare import PreparedData, prepare_data
from qlora_cli.data.rows import OWN_VARIABLES
from qlora_cli.errors import DataError
from qlora_cli.loading.tokenizer import load_tokenizer
from qlora_cli.model_files.source import ModelSource
from qlora_cli.settings.models import DataSettings, ModelSettings
from tests.conftest import ASSETS, write_jsonl

CHATML = (
    "{{ bos_token }}{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)
ASK, ANSWER = {"role": "user", "content": "6 times 7?"}, {"role": "assistant", "content": "42"}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    base = ASSETS / "base"
    source = ModelSource(name="demo", path=base, base_name="demo", tokenizer_path=base)
    tokenizer = load_tokenizer(source, ModelSettings(name="demo")).tokenizer
    tokenizer.chat_template = CHATML
    return tokenizer


def prepare(
    directory: Path, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], **settings: Any
) -> PreparedData:
    assert tokenizer.eos_token_id is not None
    text = TextTokenizer(tokenizer=tokenizer, end_ids=frozenset({tokenizer.eos_token_id}))
    path = write_jsonl(directory / "rows.jsonl", rows)
    return prepare_data(DataSettings(dataset=str(path), **settings), text, seed=0).train


def whole(data: PreparedData, tokenizer: PreTrainedTokenizerBase, row: int = 0) -> str:
    return str(tokenizer.decode(data.dataset[row]["input_ids"]))


def trained(data: PreparedData, tokenizer: PreTrainedTokenizerBase, row: int = 0) -> str:
    return str(tokenizer.decode([label for label in data.dataset[row]["labels"] if label != -100]))


def refusal(
    directory: Path, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], **settings: Any
) -> DataError:
    with pytest.raises(DataError) as caught:
        prepare(directory, tokenizer, rows, **settings)
    return caught.value


@pytest.mark.parametrize("given", [{"enable_thinking": False}, '{"enable_thinking": false}'])
@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASK, ANSWER]},
        {"conversations": [{"from": "human", "value": "6 times 7?"}, {"from": "gpt", "value": "42"}]},
        {"prompt": [ASK], "completion": [ANSWER]},
        {"instruction": "6 times 7?", "output": "42"},
        {"question": "6 times 7?", "answer": "42"},
    ],
    ids=["messages", "sharegpt", "prompt_completion", "alpaca", "question_answer"],
)
def test_what_a_row_sets_for_the_template_is_rendered(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], given: object
) -> None:
    plain = {"messages": [ASK, ANSWER]}
    data = prepare(tmp_path, tokenizer, [{**row, "chat_template_kwargs": given}])
    assert whole(data, tokenizer).endswith("<|im_start|>assistant\n<think></think>42<|im_end|>\n")
    assert trained(data, tokenizer) == "42<|im_end|>"
    (tmp_path / "plain").mkdir()
    assert "<think>" not in whole(prepare(tmp_path / "plain", tokenizer, [plain]), tokenizer)


def test_rows_with_and_without_settings_of_the_template_are_rendered_each_by_its_own(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [
        {"messages": [ASK, ANSWER], "chat_template_kwargs": kwargs}
        for kwargs in (None, {"enable_thinking": False}, {"enable_thinking": None}, {"enable_thinking": True}, "")
    ]
    data = prepare(tmp_path, tokenizer, rows)
    assert ["<think>" in whole(data, tokenizer, row) for row in range(5)] == [False, True, False, False, False]


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"tokenize": True}, "chat_template_kwargs.tokenize can't be set by a row"),
        ({"tools": "x"}, "chat_template_kwargs.tools can't be set by a row"),
        ({"conversation": "x"}, "chat_template_kwargs.conversation can't be set by a row"),
        ({"messages": "x"}, "chat_template_kwargs.messages can't be set by a row"),
        ({"add_generation_prompt": True}, "chat_template_kwargs.add_generation_prompt can't be set by a row"),
        ({"style": ["x"]}, "chat_template_kwargs.style must be text, a number, true or false, found a list"),
        ([True], "'chat_template_kwargs' must be an object, found a list"),
        ("{", "'chat_template_kwargs' is text, but no JSON"),
    ],
)
def test_settings_of_the_template_that_a_row_can_not_make_are_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, kwargs: object, expected: str
) -> None:
    error = refusal(tmp_path, tokenizer, [{"messages": [ASK, ANSWER], "chat_template_kwargs": kwargs}])
    assert expected in str(error)


def test_no_row_can_set_how_its_template_is_applied() -> None:
    assert set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) <= OWN_VARIABLES


@pytest.mark.parametrize("beside", [{"chat_template_kwargs": {"enable_thinking": False}}, {"tools": [{"name": "f"}]}])
def test_what_is_for_a_template_is_not_passed_over_in_plain_text(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, beside: dict[str, Any]
) -> None:
    error = refusal(tmp_path, tokenizer, [{"prompt": "6 times 7?", "completion": "42", **beside}])
    assert f"{next(iter(beside))!r} is for a chat template, and this row is plain text" in str(error)
