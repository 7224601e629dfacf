"""Columns for the chat template next to the text: template variables, history, system prompts."""

import inspect
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from qlora_cli.data.rows.row_reader import RESERVED_VARIABLES
from tests.support.data.preparing import CHATML, make_tokenizer, prepare, refusal, trained, whole

ASK, ANSWER = {"role": "user", "content": "6 times 7?"}, {"role": "assistant", "content": "42"}
TWO = {"role": "assistant", "content": "2"}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return make_tokenizer()


def test_keys_of_messages_that_are_ignored_are_reported_with_the_number_of_rows(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = CHATML.replace("{{ m.content }}", "{{ m.mood }}{{ m.content }}")
    message = {**ASK, "mood": "glad", "lang": "en", "id": 7}
    rows: list[dict[str, Any]] = [{"messages": [message, ANSWER]}] * 2 + [
        {"messages": [{**ASK, "lang": "fr"}, ANSWER]}
    ]
    data = prepare(tmp_path, tokenizer, rows)
    expected = "keys of messages that are ignored, because the chat template does not write them: lang (3 rows)"
    assert [note for note in data.notes if "keys of messages" in note] == [expected]
    assert "glad6 times 7?" in whole(data, tokenizer)


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
def test_template_variables_of_a_row_are_rendered(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], given: object
) -> None:
    plain = {"messages": [ASK, ANSWER]}
    data = prepare(tmp_path, tokenizer, [{**row, "chat_template_kwargs": given}])
    assert whole(data, tokenizer).endswith("<|im_start|>assistant\n<think></think>42<|im_end|>\n")
    assert trained(data, tokenizer) == "42<|im_end|>"
    (tmp_path / "plain").mkdir()
    assert "<think>" not in whole(prepare(tmp_path / "plain", tokenizer, [plain]), tokenizer)


def test_each_row_is_rendered_with_its_own_template_variables(
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
        ("{", "'chat_template_kwargs' is text, but not JSON"),
    ],
)
def test_template_variables_that_a_row_cannot_set_are_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, kwargs: object, expected: str
) -> None:
    error = refusal(tmp_path, tokenizer, [{"messages": [ASK, ANSWER], "chat_template_kwargs": kwargs}])
    assert expected in str(error)


def test_parameters_of_apply_chat_template_are_reserved() -> None:
    assert set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) <= RESERVED_VARIABLES


@pytest.mark.parametrize(
    ("extra_columns", "expected"),
    [
        ({"chat_template_kwargs": {"enable_thinking": False}}, "<think></think>42"),
        ({"enable_thinking": False}, "<think></think>42"),
        ({"tools": [{"name": "f"}]}, '{"name": "f"}'),
        ({"history": [["1 plus 1?", "2"]]}, "1 plus 1?<|im_end|>"),
    ],
)
def test_template_inputs_are_refused_in_plain_text_with_flags_that_use_a_template(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, extra_columns: dict[str, Any], expected: str
) -> None:
    rows = [{"prompt": "6 times 7?", "response": "42", **extra_columns}]
    error = refusal(tmp_path, tokenizer, rows)
    assert f"{next(iter(extra_columns))!r} is for a chat template, but this row is plain text" in str(error)
    assert "--format question_answer --columns question=prompt,answer=response," in str(error.hint)
    data = prepare(tmp_path, tokenizer, rows, format="question_answer", columns="question=prompt,answer=response")
    assert expected in whole(data, tokenizer)
    tokenizer.chat_template = None
    assert "--chat-template chatml" in str(refusal(tmp_path, tokenizer, rows).hint)


@pytest.mark.parametrize("is_thinking", [True, False])
def test_the_column_enable_thinking_reaches_the_template(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, is_thinking: bool
) -> None:
    rows = [{"messages": [ASK, ANSWER], "enable_thinking": is_thinking}]
    assert ("<think>" in whole(prepare(tmp_path, tokenizer, rows), tokenizer)) is not is_thinking


@pytest.mark.parametrize(
    "history", [[["1 plus 1?", "2"]], '[["1 plus 1?", "2"]]', [{"role": "user", "content": "1 plus 1?"}, TWO]]
)
@pytest.mark.parametrize(
    "row", [{"instruction": "6 times 7?", "input": "", "output": "42"}, {"query": "6 times 7?", "response": "42"}]
)
def test_history_comes_first_and_its_answers_are_trained(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], history: object
) -> None:
    rows = [{**row, "history": history, "system": "Be brief."}]
    data = prepare(tmp_path, tokenizer, rows)
    turns = (("system", "Be brief."), ("user", "1 plus 1?"), ("assistant", "2"), ("user", "6 times 7?"))
    before = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)
    assert before in whole(data, tokenizer)
    assert trained(data, tokenizer) == "2<|im_end|>42<|im_end|>"
    assert trained(prepare(tmp_path, tokenizer, rows, loss_on="last"), tokenizer) == "42<|im_end|>"


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ("earlier", "'history' is text, but not JSON"),
        ({"a": "b"}, "'history' must be a list of earlier turns, found an object"),
        ([["q"]], "'history' must hold pairs of two texts"),
        ([["q", "a", "b"]], "'history' must hold pairs of two texts"),
        (["q", "a"], "'history' must hold pairs of two texts"),
        ([["q", None]], "'history' must hold pairs of two texts"),
    ],
)
def test_history_that_is_not_pairs_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, history: object, expected: str
) -> None:
    rows = [{"instruction": "6 times 7?", "output": "42", "history": history}]
    assert expected in str(refusal(tmp_path, tokenizer, rows))


@pytest.mark.parametrize("history", [None, [], ""])
def test_empty_history_adds_no_turns(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, history: object) -> None:
    data = prepare(tmp_path, tokenizer, [{"instruction": "6 times 7?", "output": "42", "history": history}])
    assert trained(data, tokenizer) == "42<|im_end|>"


@pytest.mark.parametrize("role", ["system", "developer"])
def test_two_different_system_prompts_are_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, role: str
) -> None:
    messages = [{"role": role, "content": "You are a chemist."}, ASK, ANSWER]
    error = refusal(tmp_path, tokenizer, [{"system": "Answer in French.", "messages": messages}])
    assert "there are two system prompts: the column 'system', and message 0" in str(error)
    alike = [{"system": text, "messages": messages} for text in (" You are a chemist.\n", "", None)]
    assert prepare(tmp_path, tokenizer, alike).report.rows == 3


@pytest.mark.parametrize("column", [{"system": "Be brief."}, {"history": [["q", "a"]]}])
def test_context_of_plain_text_is_included_or_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, column: dict[str, Any]
) -> None:
    rows = [{"prompt": "6 times 7?", "completion": "42", **column}]
    if "system" in column:
        assert whole(prepare(tmp_path, tokenizer, rows), tokenizer).startswith("<|bos|>Be brief.\n\n6 times 7?")
    else:
        assert "'history' is for a chat template" in str(refusal(tmp_path, tokenizer, rows))


LOOKUP = {"name": "lookup", "arguments": '{"word": "iron"}'}
BY_CALLS = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.tool_calls is defined and "
    "m.role == 'assistant' %}CALLS {{ m.tool_calls | tojson }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("row", "template", "expected"),
    [
        ({"messages": [{**ASK, "tool_calls": []}, {**ANSWER, "tool_calls": []}]}, BY_CALLS, ["42"]),
        (
            {
                "messages": [
                    {"role": "user", "content": "Look up iron."},
                    {"role": "assistant", "content": "I will.", "function_call": LOOKUP},
                    {"role": "function", "name": "lookup", "content": "a metal"},
                    {"role": "assistant", "content": "A metal."},
                ],
                "functions": [{"name": "lookup", "parameters": {"type": "object", "properties": {}}}],
            },
            CHATML,
            ['I will.<call>{"name": "lookup", "arguments": {"word": "iron"}}</call>', "A metal."],
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Look up iron and zinc."},
                    {
                        "from": "function_call",
                        "value": '[{"name": "f", "args": {"x": "iron"}}, {"name": "f", "args": {"x": "zinc"}}]',
                    },
                    {"from": "observation", "value": "metals"},
                    {"from": "gpt", "value": "Both are."},
                ]
            },
            CHATML,
            [
                '<call>{"name": "f", "arguments": {"x": "iron"}}</call>'
                '<call>{"name": "f", "arguments": {"x": "zinc"}}</call>',
                "Both are.",
            ],
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text", "value": "q"}]}, ANSWER]}, CHATML, ["42"]),
        ({"messages": [ASK, {**TWO, "loss": False}, ASK, {**ANSWER, "loss": True}]}, CHATML, ["42"]),
        ({"messages": [ASK, {**TWO, "loss_mask": 0}, ASK, {**ANSWER, "loss_mask": 1}]}, CHATML, ["42"]),
        ({"messages": [{**ASK, "loss_weight": 0.0}, {**ANSWER, "loss_weight": 1.0}]}, CHATML, ["42"]),
    ],
    ids=["no calls", "old calls", "several calls", "parts by value", "ms-swift", "verl", "llama-factory"],
)
def test_rows_of_other_tools_are_trained_as_intended(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], template: str, expected: list[str]
) -> None:
    tokenizer.chat_template = template
    data = prepare(tmp_path, tokenizer, [row])
    assert trained(data, tokenizer) == "".join(f"{answer}<|im_end|>" for answer in expected)
