"""Recognising the format of a data set by its columns, and reading its rows."""

from typing import Any

import pytest

from qlora_cli.data.rows.column_formats import RowLayout, recognise
from qlora_cli.data.rows.examples import Conversation, Example, PromptCompletion, RowError, Tokenized
from qlora_cli.data.rows.row_reader import RowReader
from qlora_cli.errors import DataError
from qlora_cli.settings.choices import LossOn
from qlora_cli.settings.models import DataSettings
from qlora_cli.settings.objectives import DataFormat

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def layout_of(*columns: str, **settings: Any) -> RowLayout:
    return recognise(columns, DataSettings(dataset=("rows.jsonl",), **settings), "rows.jsonl")


def read(
    row: dict[str, Any], *, use_chat: bool = True, loss_on: LossOn = LossOn.COMPLETIONS, **settings: Any
) -> Example:
    return RowReader(layout_of(*row, **settings), loss_on, use_chat=use_chat).read(row)


def problem(row: dict[str, Any], *columns: str) -> str:
    with pytest.raises(RowError) as caught:
        RowReader(layout_of(*(columns or row)), LossOn.COMPLETIONS, use_chat=True).read(row)
    return str(caught.value)


def conversation(row: dict[str, Any], **options: Any) -> Conversation:
    example = read(row, **options)
    assert isinstance(example, Conversation)
    return example


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (("messages",), "messages"),
        (("id", "conversation"), "messages (messages is conversation; not used: id)"),
        (("id", "conversations"), "sharegpt (not used: id)"),
        (("prompt", "completion"), "prompt_completion"),
        (("prompt", "response"), "prompt_completion (completion is response)"),
        (("instruction", "input", "output"), "alpaca"),
        (
            ("instruction", "context", "response", "category"),
            "alpaca (output is response; input is context; not used: category)",
        ),
        (("question", "answer"), "question_answer"),
        (("system_prompt", "question", "response"), "question_answer (answer is response; system is system_prompt)"),
        (("problem", "solution"), "question_answer (question is problem; answer is solution)"),
        (("text", "url"), "text (not used: url)"),
        (("instruction", "input", "output", "text"), "alpaca (not used: text)"),
        (("prompt", "output", "response"), "prompt_completion (completion is response; not used: output)"),
        (("content",), "text (text is content)"),
        (("input_ids", "labels", "attention_mask"), "tokens"),
        (("input_ids", "completion_mask"), "tokens (loss_mask is completion_mask)"),
        (("prompt", "prompt_id", "messages"), "messages (not used: prompt, prompt_id)"),
    ],
)
def test_formats_are_recognised_by_their_columns(columns: tuple[str, ...], expected: str) -> None:
    assert layout_of(*columns).describe() == expected


def test_named_columns_take_precedence() -> None:
    layout = layout_of("q", "text", "reply", columns={"prompt": "q", "completion": "reply"})
    assert layout.describe() == "prompt_completion (prompt is q; completion is reply; not used: text)"
    assert layout_of("text", "other", columns="text=other").columns == {"text": "other"}


@pytest.mark.parametrize(
    ("columns", "settings", "expected", "hint"),
    [
        (("ask", "tell"), {}, "fit no known format: ask, tell", "The nearest is"),
        (("messages", "prompt", "completion"), {}, "fit several formats", "--format messages"),
        (("prompt", "output"), {"columns": "prompt=output"}, "fit no known format", "The nearest is"),
        (("promt", "completon"), {}, "fit no known format", "The nearest is prompt_completion"),
        (("a", "b"), {"columns": "prompt=a,completion=a"}, "'a' is named twice, as prompt and as completion", "once"),
        (("text",), {"format": "alpaca"}, "has no column instruction, output", "--columns instruction=NAME"),
        (("text",), {"columns": {"txt": "text"}}, "no format has a part 'txt'", "The parts are"),
        (("text",), {"columns": {"text": "texts"}}, "has no column 'texts'", "Did you mean text?"),
        (
            ("text",),
            {"format": "text", "columns": {"answer": "text"}},
            "text has no part 'answer'",
            "The parts are text",
        ),
    ],
)
def test_unrecognised_columns_are_an_error_with_a_hint(
    columns: tuple[str, ...], settings: dict[str, Any], expected: str, hint: str
) -> None:
    with pytest.raises(DataError, match=expected) as caught:
        layout_of(*columns, **settings)
    assert hint in (caught.value.hint or "")


def test_sharegpt_roles_are_human_and_gpt() -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    example = conversation({"conversations": turns, "system": "Be brief."})
    assert example.messages == [{"role": "system", "content": "Be brief."}, USER, ANSWER]
    assert example.trained == (2,)


def test_a_sharegpt_function_call_becomes_a_tool_call() -> None:
    turns = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "a"},
    ]
    example = conversation({"conversations": turns, "tools": '[{"name": "f"}]'})
    assert example.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert example.messages[2] == {"role": "tool", "content": "2"}
    assert example.trained == (1, 3)
    assert example.tools == [{"type": "function", "function": {"name": "f"}}]


def test_openai_arguments_are_parsed_so_that_templates_do_not_quote_them_twice() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    example = conversation({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]})
    assert example.messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert example.messages[1]["content"] == ""


def test_messages_can_be_excluded_from_training() -> None:
    messages = [USER, {**ANSWER, "train": False}, USER, {**ANSWER, "weight": 1}, USER, {**ANSWER, "weight": 0}]
    example = conversation({"messages": messages})
    assert example.trained == (3,)
    assert all(message.keys() == {"role", "content"} for message in example.messages)


def test_loss_on_last_trains_only_the_last_answer() -> None:
    row = {"messages": [USER, ANSWER, USER, ANSWER, USER]}
    assert conversation(row).trained == (1, 3)
    assert conversation(row, loss_on=LossOn.LAST).trained == (3,)


def test_answers_in_a_conversational_prompt_are_not_trained() -> None:
    example = conversation({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]})
    assert example.trained == (3,)
    assert len(example.messages) == 4


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert conversation({"messages": [USER, {"role": "assistant", "content": parts}]}).messages[1]["content"] == "ab"


def test_rows_without_a_template_are_text() -> None:
    example = read({"instruction": "i", "input": "x", "output": "o"}, use_chat=False)
    assert isinstance(example, PromptCompletion)
    assert example.prompt.endswith("### Instruction:\ni\n\n### Input:\nx\n\n### Response:\n")
    assert read({"question": "q", "answer": "a"}, use_chat=False) == PromptCompletion(prompt="q\n", completion="a")
    assert read({"text": "t"}) == PromptCompletion(prompt="", completion="t")


def test_a_system_prompt_in_a_column_of_its_own_is_the_first_message() -> None:
    example = conversation({"system_prompt": "Be brief.", "question": "q", "response": "a"})
    assert example.messages[0] == {"role": "system", "content": "Be brief."}
    assert conversation({"system_prompt": "", "question": "q", "response": "a"}).messages[0] == USER


def test_a_context_or_a_system_prompt_in_a_column_of_its_own_is_part_of_the_prompt() -> None:
    asked = conversation({"context": "c", "question": "q", "answer": "a"})
    assert asked.messages[0]["content"] == "c\n\nq"
    assert read({"prompt": "p", "completion": "c", "system": "s"}) == PromptCompletion(prompt="s\n\np", completion="c")
    assert conversation({"messages": [USER, ANSWER], "system": "s"}).messages[0]["content"] == "s"


def test_tokens_are_read_unchanged_and_masks_apply() -> None:
    for row, labels in (
        ({"input_ids": [1, 2]}, [1, 2]),
        ({"input_ids": [1, 2], "labels": [-100, 2]}, [-100, 2]),
        ({"input_ids": [1, 2, 0], "attention_mask": [1, 1, 0]}, [1, 2]),
        ({"input_ids": [1, 2], "completion_mask": [0, 1]}, [-100, 2]),
        ({"input_ids": [1, 2], "labels": None, "assistant_masks": [0, 1]}, [-100, 2]),
        ({"input_ids": [1, 2, 3], "attention_mask": [True, True, False], "loss_mask": [False, True, True]}, [-100, 2]),
        ({"input_ids": [1, 2], "loss_mask": [0.0, 1.0]}, [-100, 2]),
    ):
        example = read(row)
        assert isinstance(example, Tokenized)
        assert (example.input_ids.tolist(), example.labels.tolist()) == ([1, 2], labels)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": "hello"}, "'messages' is text, but not JSON"),
        ({"messages": {"role": "user"}}, "must be a list of at least one message, found an object"),
        ({"messages": []}, "found an empty one"),
        ({"messages": ["hello"]}, r"messages[0] must be an object with role and content, found text"),
        ({"messages": [{"content": "x"}]}, "messages[0] has no role, only 'content'"),
        ({"messages": [{"role": "she", "content": "x"}]}, "messages[0].role is 'she', not one of system, developer"),
        ({"messages": [{"role": "user"}]}, "messages[0] has no content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content must be text, found a number"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "holds image, but only text can be trained on",
        ),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "the answer in message 1 is empty"),
        ({"messages": [USER, {**ANSWER, "train": "no"}]}, "messages[1].train must be true or false, found 'no'"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{"x": 1}]}]}, "must hold functions with a name"),
        ({"messages": [USER, ANSWER], "tools": "{"}, "'tools' is text, but not JSON"),
        ({"messages": [USER, ANSWER], "tools": {"a": 1}}, "'tools' must be a list of tools, found an object"),
        ({"prompt": "p", "completion": None}, "'completion' must be text, found null"),
        ({"prompt": "p", "completion": ["a"]}, "'completion' must be text, found a list"),
        ({"prompt": "p", "completion": ""}, "'completion' is empty"),
        ({"instruction": "i", "input": 1, "output": "o"}, "'input' must be text, found a number"),
        ({"question": True, "answer": "a"}, "'question' must be text, found true or false"),
        ({"text": " \n"}, "'text' is empty"),
        ({"input_ids": [1, 2], "loss_mask": [0, 0.5]}, "loss_mask[1] is 0.5: a mask holds 0 and 1, or false and true"),
        ({"input_ids": [1, 2], "attention_mask": [1, 2]}, "attention_mask[1] is 2: a mask holds 0 and 1"),
        ({"input_ids": [1, 2], "attention_mask": ["1"]}, "attention_mask[0] is '1': a mask holds"),
        ({"input_ids": [1], "attention_mask": "1"}, "'attention_mask' must be a list of 0 and 1, found text"),
        ({"input_ids": []}, "must be a list of token ids, found an empty one"),
        ({"input_ids": [1, "2"]}, "input_ids[1] is '2', not a token id"),
        ({"input_ids": [1, -2]}, "input_ids[1] is -2, not a token id"),
        ({"input_ids": [1, 2], "labels": [1]}, "'labels' has 1 value, the row has 2 tokens"),
        ({"input_ids": [1, 2], "labels": [1, 3]}, "labels[1] is 3: a label is the token itself (2) or -100"),
    ],
)
def test_the_problem_with_a_row_names_its_key(row: dict[str, Any], expected: str) -> None:
    assert expected in problem(row)


def test_a_row_of_another_format_is_an_error_that_names_the_nearest() -> None:
    message = problem({"question": "q", "answer": "a"}, "prompt", "completion")
    assert message == (
        "there is no 'prompt', only 'question', 'answer'; the nearest known format is "
        "question_answer (question, answer)"
    )


def test_every_format_can_be_chosen() -> None:
    for fmt in set(DataFormat) - {DataFormat.AUTO}:
        with pytest.raises(DataError, match=f"which the format {fmt.value} needs"):
            layout_of("nothing", format=fmt)
