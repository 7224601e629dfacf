"""Reading messages of other tools: switches, parts, calls and tools in every form that is in use."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_cli.data.rows.examples import REASONING_KEYS, Conversation, RowError, is_blank
from qlora_cli.data.rows.messages import KNOWN_MESSAGE_KEYS
from qlora_cli.data.rows.train_switches import SWITCHES
from qlora_cli.settings.choices import LossOn
from tests.support.data.reading_rows import ANSWER, AS_SERVED, CALL, TEXT, USER, chat, problem, read, reader_of


@pytest.mark.parametrize(("key", "is_upright"), SWITCHES.items())
@pytest.mark.parametrize("kind", [bool, int, float])
def test_the_switches_of_every_tool_select_the_trained_answers(key: str, is_upright: bool, kind: type) -> None:
    off, on = kind(not is_upright), kind(is_upright)
    conversation = chat(USER, {**ANSWER, key: off}, {**USER, key: off}, {**ANSWER, key: on})
    assert conversation.trained == (3,)
    assert conversation.messages == [USER, ANSWER, USER, ANSWER]


@pytest.mark.parametrize(
    ("switches", "expected"),
    [
        ({"weight": 0.5}, "messages[1].weight is 0.5: a message is either trained or not"),
        ({"loss_scale": 2}, "messages[1].loss_scale is 2: a message is either trained or not"),
        ({"loss": "yes"}, "messages[1].loss must be true or false, found 'yes'"),
        ({"train": True, "weight": 0}, "messages[1]: train, weight disagree on whether it is trained"),
        ({"train": True, "masked": True}, "messages[1]: train, masked disagree on whether it is trained"),
        (
            {"train_detail": [{"begin_offset": 0, "end_offset": 8, "train": False}]},
            "messages[1].train_detail looks like a training switch, but is not a known one",
        ),
        (
            {"is_trainable": False},
            "messages[1].is_trainable looks like a training switch, but is not a known one",
        ),
        ({"lossMask": 0}, "messages[1].lossMask looks like a training switch, but is not a known one"),
        (
            {"ignore_loss": "true"},
            "messages[1].ignore_loss looks like a training switch, but is not a known one",
        ),
        ({"loss": "0.5"}, "messages[1].loss must be true or false, found '0.5'"),
        ({"supervised": False}, "messages[1].supervised looks like a training switch, but is not a known one"),
    ],
)
def test_an_unusable_switch_is_refused(switches: dict[str, Any], expected: str) -> None:
    assert expected in str(problem(USER, {**ANSWER, **switches}))


@pytest.mark.parametrize(
    "key",
    [
        *({"constraints": [1]}, {"glossary": {"x": True}}, {"learner_id": 17}, {"straining": 1, "unmasking": True}),
        *({"train_detail": []}, {"is_trainable": None}, {"learning": "by heart"}, {"weight_kg": 70}),
    ],
)
def test_keys_that_are_not_switches_or_are_blank_are_left_to_the_template(key: dict[str, Any]) -> None:
    assert chat(USER, {**ANSWER, **key}).trained == (1,)


@pytest.mark.parametrize("key", SWITCHES)
@pytest.mark.parametrize(("text", "is_on"), [("true", True), (" False", False), ("1", True), ("0", False)])
def test_switches_may_be_text(key: str, text: str, is_on: bool) -> None:
    assert (chat(USER, {**ANSWER, key: text}).trained == (1,)) is (is_on is SWITCHES[key])


def test_switches_that_agree_are_accepted() -> None:
    assert chat(USER, {**ANSWER, "train": True, "weight": 1, "masked": False}).trained == (1,)
    assert chat(USER, {**ANSWER, "train": False, "weight": 0, "masked": True}).trained == ()


@pytest.mark.parametrize("role", ["system", "user", "tool"])
def test_other_roles_are_trained_only_with_loss_on_all(role: str) -> None:
    asked = {"role": role, "content": "x", "train": True}
    error = problem(USER, asked, ANSWER)
    assert f"message 1 is to be trained, but its role is {role}" in str(error)
    assert "--loss-on all" in str(error.hint)
    assert chat(USER, asked, ANSWER, loss_on=LossOn.ALL).trained == (2,)


def test_answers_in_a_prompt_are_trained_if_the_row_says_so() -> None:
    prompt = [USER, {**ANSWER, "loss": True}, USER, ANSWER, USER]
    assert read({"prompt": prompt, "completion": [ANSWER]}).trained == (1, 5)


def test_a_switch_on_every_part_applies_to_the_message() -> None:
    parts = [{**TEXT, "train": False}, {**TEXT, "weight": 0}]
    conversation = chat(USER, {"role": "assistant", "content": parts}, USER, ANSWER)
    assert conversation.trained == (3,)
    assert conversation.messages[1] == {"role": "assistant", "content": "aa"}
    trained = {"role": "assistant", "content": [{**TEXT, "train": True}, TEXT]}
    assert chat(USER, trained).trained == (1,)


@pytest.mark.parametrize("other", [TEXT, {**TEXT, "train": True}])
def test_a_partly_trained_answer_is_refused(other: dict[str, Any]) -> None:
    error = problem(USER, {"role": "assistant", "content": [{**TEXT, "train": False}, other]})
    assert "messages[1].content has parts that are trained and others that are not" in str(error)


def test_a_message_whose_parts_disagree_with_its_switch_is_refused() -> None:
    error = problem(USER, {"role": "assistant", "content": [{**TEXT, "train": False}], "weight": 1})
    assert "messages[1] and its parts disagree" in str(error)


def test_text_parts_are_read_under_every_known_key() -> None:
    parts = ["a", {"type": "text", "value": "b"}, {"type": "output_text", "text": "c"}, {"text": "d"}]
    refused = {"type": "refusal", "refusal": "e"}
    nulls = {"type": "text", "text": "f", "image_url": None, "cache_control": {"type": "ephemeral"}}
    assert chat(USER, {"role": "assistant", "content": [*parts, refused, nulls]}).messages[1]["content"] == "abcdef"
    assert chat(USER, {"role": "assistant", "content": None, "refusal": "no"}).messages[1]["content"] == "no"
    assert chat(USER, {**ANSWER, "refusal": True}).messages[1] == {**ANSWER, "refusal": True}  # it only describes it


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ({"type": "image", "text": ""}, "image"),
        ({"type": "image", "text": "a bridge"}, "image"),
        ({"type": "image_url", "image_url": {"url": "x"}}, "image_url"),
        ({"type": "input_audio", "input_audio": {"data": "x"}}, "input_audio"),
        ({"type": "video", "video": "x"}, "video"),
        ({"type": "file", "file": {"file_id": "x"}}, "file"),
        ({"type": "tool_result", "content": "x"}, "tool_result"),
        ({"type": "redacted_thinking", "data": "x"}, "redacted_thinking"),
        ({"type": "document", "text": "x"}, "document"),
        ({"type": ["text"], "text": "x"}, "['text']"),
        ({"image": "x.png"}, "image"),
        ({"type": "text", "text": "x", "image_url": "x.png"}, "image_url"),
        (3, "a number"),
    ],
)
def test_a_part_that_is_not_text_is_refused_by_its_type(part: object, kind: str) -> None:
    error = problem({"role": "user", "content": [TEXT, part]}, ANSWER)
    assert f"messages[0].content[1] holds {kind}, but only text can be trained on" in str(error)
    assert "--on-bad-row skip" in str(error.hint)


def test_pictures_next_to_the_text_of_a_message_are_refused() -> None:
    assert "messages[0] holds images, but only text" in str(problem({**USER, "images": ["x.png"]}, ANSWER))
    assert chat({**USER, "images": [], "audio": {"path": None}}, ANSWER).trained == (1,)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "reasoning", "value": "hm"},
        {"type": "reasoning", "reasoning": "hm"},
        {"type": "thinking", "thinking": "hm", "signature": "x"},
        {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
    ],
)
def test_a_reasoning_part_becomes_the_reasoning_of_its_message(part: dict[str, Any]) -> None:
    conversation = chat(USER, {"role": "assistant", "content": [part, TEXT]})
    assert conversation.messages[1] == {"role": "assistant", "content": "a", "reasoning_content": "hm"}


def test_misplaced_reasoning_is_refused() -> None:
    thought = {"type": "thinking", "thinking": "hm"}
    after_text = problem(USER, {"role": "assistant", "content": [TEXT, thought]})
    assert "messages[1].content[1] is thinking after text" in str(after_text)
    twice = problem(USER, {"role": "assistant", "content": [thought, TEXT], "reasoning": "other"})
    assert "messages[1] has reasoning both in its parts and outside of them" in str(twice)
    differing = problem(USER, {**ANSWER, "reasoning": "hm", "reasoning_content": "oh"})
    assert "messages[1] has both 'reasoning_content' and 'reasoning', which differ" in str(differing)
    no_text = problem(USER, {**ANSWER, "thinking": ["hm"]})
    assert "messages[1].thinking must be text, found a list" in str(no_text)
    asked = problem({"role": "user", "content": [thought, TEXT]}, ANSWER)
    assert "messages[0] has reasoning, which only the assistant may have" in str(asked)


def test_equal_reasoning_under_two_keys_is_merged_and_empty_reasoning_ignored() -> None:
    both = {**ANSWER, "reasoning": "hm", "reasoning_content": "hm"}
    assert chat(USER, both).messages[1] == {**ANSWER, "reasoning_content": "hm"}
    assert chat(USER, {**ANSWER, "thinking": "", "reasoning": None}).messages[1] == ANSWER


@pytest.mark.parametrize(
    "part",
    [
        {"type": "tool_use", "name": "f", "input": {"x": 1}},
        {"type": "tool_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
    ],
)
def test_a_call_part_becomes_a_call_of_the_message(part: dict[str, Any]) -> None:
    conversation = chat(USER, {"role": "assistant", "content": [TEXT, part]})
    assert conversation.messages[1] == {"role": "assistant", "content": "a", "tool_calls": [AS_SERVED]}
    assert "is text after calls" in str(problem(USER, {"role": "assistant", "content": [part, TEXT]}))
    assert "messages[0] has tool calls, which only the assistant may have" in str(
        problem({"role": "user", "content": [TEXT, part]}, ANSWER)
    )


def test_an_anthropic_call_keeps_its_id() -> None:
    part = {"type": "tool_use", "id": "1", "name": "f", "input": {"x": 1}, "cache_control": {"type": "ephemeral"}}
    assert chat(USER, {"role": "assistant", "content": [part]}).messages[1]["tool_calls"] == [{"id": "1", **AS_SERVED}]


@pytest.mark.parametrize(
    "calls",
    [
        *([], None, "", "null", "{}", "[]", "[null]", [None], [{}], {"name": None, "arguments": None}),
        *({"name": "", "arguments": ""}, {"name": "", "arguments": "{}"}, '{"name": "", "arguments": {}}'),
        [{"id": "", "type": "function", "function": {"name": "", "arguments": "null"}}],
    ],
)
@pytest.mark.parametrize("key", ["tool_calls", "function_call"])
def test_empty_calls_are_ignored(key: str, calls: object) -> None:
    assert chat({**USER, key: calls}, {**ANSWER, key: calls}).messages == [USER, ANSWER]


@pytest.mark.parametrize("arguments", [{"x": 1}, '{"x": 1}'])
@pytest.mark.parametrize("name", ["arguments", "parameters", "args"])
def test_a_legacy_function_call_becomes_a_tool_call_and_its_text_stays(name: str, arguments: object) -> None:
    message = {**ANSWER, "function_call": {"name": "f", name: arguments}}
    conversation = chat(
        USER, message, {"role": "function", "name": "f", "content": "1"}, ANSWER, functions=[{"name": "f"}]
    )
    assert conversation.messages[1] == {**ANSWER, "tool_calls": [AS_SERVED]}
    assert conversation.messages[2] == {"role": "tool", "content": "1", "name": "f"}
    assert conversation.trained == (1, 3)


def test_calls_that_contradict_each_other_are_refused() -> None:
    twice = {**ANSWER, "tool_calls": [AS_SERVED], "function_call": {"name": "g", "arguments": {}}}
    assert "messages[1] has calls in 'function_call' that differ from its other calls" in str(problem(USER, twice))
    assert chat(USER, {**ANSWER, "tool_calls": [AS_SERVED], "function_call": CALL}).messages[1] == {
        **ANSWER,
        "tool_calls": [AS_SERVED],
    }


@pytest.mark.parametrize(
    "value",
    [
        '[{"name": "f", "arguments": {"x": 1}}, {"name": "f", "arguments": "{\\"x\\": 1}"}]',
        '{"name": "f", "arguments": {"x": 1}}\n{"name": "f", "parameters": {"x": 1}}',
        ' {"name": "f", "args": {"x": 1}} {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}} ',
    ],
)
@pytest.mark.parametrize("role", ["function_call", "tool_call"])
def test_several_calls_in_one_value_are_all_read(role: str, value: str) -> None:
    turns = [{"from": "human", "value": "q"}, {"from": role, "value": value}, {"from": "observation", "value": "1"}]
    conversation = read({"conversations": turns})
    assert conversation.messages[1] == {"role": "assistant", "content": "", "tool_calls": [AS_SERVED, AS_SERVED]}


@pytest.mark.parametrize("first", [{"role": "tool_call", "content": '{"name": "f", "arguments": {"x": 1}}'}, ANSWER])
def test_calls_right_after_an_assistant_message_join_its_turn(first: dict[str, Any]) -> None:
    call = {"role": "tool_call", "content": '{"name": "f", "arguments": {"x": 1}}'}
    result = {"role": "tool_response", "content": "1"}
    conversation = chat(USER, first, call, result, result, call, ANSWER)
    calls = [AS_SERVED] * (1 + (first is not ANSWER))
    text = "a" if first is ANSWER else ""
    assert conversation.messages[1] == {"role": "assistant", "content": text, "tool_calls": calls}
    assert [message["role"] for message in conversation.messages] == [
        "user",
        "assistant",
        "tool",
        "tool",
        *["assistant"] * 2,
    ]
    assert conversation.trained == (1, 4, 5)
    assert "are one turn, but disagree" in str(problem(USER, {**first, "loss": False}, call, result))


def test_a_value_that_is_not_a_call_is_refused() -> None:
    for value, expected in (
        ("call f", "conversations[1].value is text, but not JSON"),
        ('{"name": "f"} and more', "conversations[1].value is text, but not JSON"),
        ('["f"]', "conversations[1].value must hold functions with a name"),
        ('{"name": "", "arguments": {"x": 1}}', "conversations[1].value must hold functions with a name"),
        ("", "conversations[1] is a call by its role, but holds none"),
        ("[]", "conversations[1] is a call by its role, but holds none"),
    ):
        turns = [{"from": "human", "value": "q"}, {"from": "function_call", "value": value}]
        with pytest.raises(RowError) as caught:
            read({"conversations": turns})
        assert expected in str(caught.value)


@pytest.mark.parametrize(
    "tools",
    [
        [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        [{"function": {"name": "f", "parameters": {"type": "object"}}}],
        [{"name": "f", "parameters": {"type": "object"}}],
        [{"type": "function", "name": "f", "parameters": {"type": "object"}}],
        [{"name": "f", "input_schema": {"type": "object"}, "description": None}],
        '[{"name": "f", "parameters": {"type": "object"}}]',
        '{"name": "f", "parameters": {"type": "object"}}',
        ['{"name": "f", "parameters": {"type": "object"}}'],
    ],
)
def test_tools_are_read_into_the_form_of_servers(tools: object) -> None:
    served = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    assert chat(USER, ANSWER, tools=tools).tools == served


@pytest.mark.parametrize(
    "tools", [None, [], "", "[]", "null", "{}", "[null]", {}, {"name": None}, [None], [{"type": "function"}]]
)
def test_empty_tools_are_ignored(tools: object) -> None:
    assert chat(USER, ANSWER, tools=tools).tools is None


@pytest.mark.parametrize("tool", [{"type": "web_search"}, {"parameters": {"type": "object"}}, 3, '"f"'])
def test_a_tool_without_a_name_is_refused(tool: object) -> None:
    assert "'tools'[0] must be a function with a name" in str(problem(USER, ANSWER, tools=[tool]))


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "user", "from": "gpt", "content": "x"}, "messages[0] has two roles: 'user' and 'gpt'"),
        ({"role": "user", "content": "x", "value": "y"}, "has both 'content' and 'value', which differ"),
        ({"role": "user", "content": [{"text": "x", "value": "y"}]}, "has both 'text' and 'value', which differ"),
        (
            {"role": "user", "content": [{"type": "text"}]},
            "messages[0].content[0] is a part of type text, but has no text",
        ),
        (
            {"role": "assistant", "content": "yes", "refusal": "no"},
            "messages[0] has both 'content' and 'refusal', which differ",
        ),
        (
            {"role": "user", "content": "x", "tool_calls": [AS_SERVED]},
            "messages[0] has tool calls, which only the assistant",
        ),
    ],
)
def test_a_message_that_contradicts_itself_is_refused(message: dict[str, Any], expected: str) -> None:
    assert expected in str(problem(message, ANSWER))


def test_equal_values_under_two_keys_are_accepted() -> None:
    both = {"role": "user", "from": "human", "content": "q", "value": "q"}
    assert chat(both, ANSWER).messages == [USER, ANSWER]


KEYS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        [*SWITCHES, *REASONING_KEYS, *KNOWN_MESSAGE_KEYS, "value", "from", "images", "refusal", "function_call"]
    ),
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.sampled_from([0, 1, 0.5, "", "q", "a", "user", "1"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


@pytest.mark.slow
@given(key=KEYS, value=VALUES)
@settings(max_examples=400, deadline=None)
def test_each_key_of_a_message_is_read_passed_on_reported_or_refused(key: str, value: Any) -> None:
    """A switch of an answer says whether it is trained; any other key is in the message, reported if it is unknown."""
    row = {"messages": [USER, {**ANSWER, key: value}]}
    reader = reader_of(row)
    try:
        conversation = reader.read(row)
    except RowError:
        return
    assert isinstance(conversation, Conversation)
    message = conversation.messages[1]
    empty_calls = key in ("function_call", "tool_calls") and is_blank(value)
    if value is None or empty_calls or (value == "" and key in ("refusal", *REASONING_KEYS)):
        assert message == ANSWER
    elif key in SWITCHES:
        is_on = SWITCHES[key] if is_blank(value) else value in (1, "1")
        assert (conversation.trained == (1,)) is (is_on is SWITCHES[key])
        assert message == ANSWER
    elif key in ("from", "value") or (key == "refusal" and value == ANSWER["content"]):  # the same, by another name
        assert message == ANSWER
    else:
        assert message.get(key) == value or (key == "content" and message["content"] == "".join(value))
        assert (key in reader.unknown_keys) is (key not in KNOWN_MESSAGE_KEYS and not is_blank(value))


def test_unknown_keys_are_counted_by_row_and_left_to_the_template() -> None:
    row: dict[str, Any] = {"messages": [{**USER, "mood": "glad", "id": 1, "lang": None}, {**ANSWER, "mood": "glad"}]}
    parts = {"messages": [{"role": "user", "content": [{**TEXT, "lang": "en"}]}, ANSWER]}
    reader = reader_of(row)
    for each in (row, row, parts):
        conversation = reader.read(each)
    assert reader.unknown_keys == {"mood": 2, "content.lang": 1}
    assert isinstance(conversation, Conversation)
    assert chat(*row["messages"]).messages[0] == {**USER, "mood": "glad", "id": 1}
