"""Tool calls are read from every place in a message, together with its other values, or the row is refused."""

import json
from typing import Any

import pytest
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

from qlora_cli.data.rows.examples import RowError
from tests.support.data.reading_rows import ANSWER, AS_SERVED, CALL, USER, chat, problem

CALLING = {"role": "tool_call", "content": '{"name": "f", "arguments": {"x": 1}}'}
ONE_CALL = [
    CALLING,
    {"role": "tool_call", "content": "", "tool_calls": [AS_SERVED]},
    {"role": "tool_call", "content": None, "tool_calls": [AS_SERVED]},
    {"role": "tool_call", "content": [{"type": "tool_call", "value": '{"name": "f", "arguments": {"x": 1}}'}]},
    {"role": "tool_call", "content": [{"type": "tool_use", "name": "f", "input": {"x": 1}}]},
    {**CALLING, "tool_calls": [{"id": "1", **AS_SERVED}]},
    {**CALLING, "function_call": CALL},
]


@pytest.mark.parametrize("message", ONE_CALL)
@pytest.mark.parametrize("before", [[], [ANSWER]])
def test_calls_of_a_calling_role_are_read_from_every_place(
    message: dict[str, Any], before: list[dict[str, Any]]
) -> None:
    answer = chat(USER, *before, message, {"role": "tool", "content": "1"}, ANSWER).messages[1]
    assert [call["function"] for call in answer["tool_calls"]] == [CALL]
    assert answer["content"] == ("a" if before else "")


def test_calls_in_text_and_in_parts_are_both_read() -> None:
    call = '{"name": "g", "arguments": {}}'
    parts = [{"type": "text", "text": call}, {"type": "tool_use", "name": "f", "input": {"x": 1}}]
    answer = chat(USER, {"role": "tool_call", "content": parts}).messages[1]
    assert [each["function"]["name"] for each in answer["tool_calls"]] == ["g", "f"]


@drawn(
    answer=st.dictionaries(st.sampled_from(["reasoning", "mood", "score", "train"]), st.booleans()),
    calls=st.dictionaries(st.sampled_from(["reasoning", "thinking", "mood", "score", "train"]), st.booleans()),
    text=st.sampled_from(["", "a"]),
)
@settings(deadline=None)
def test_merging_calls_into_the_previous_answer_loses_nothing(
    answer: dict[str, bool], calls: dict[str, bool], text: str
) -> None:
    """All values of both messages are in the turn, or the row is refused."""

    def message_keys(drawn: dict[str, bool], origin: str) -> dict[str, Any]:
        return {key: value if key == "train" else f"{key} of {value and origin}" for key, value in drawn.items()}

    first = {"role": "assistant", "content": text, **message_keys(answer, "answer")}
    second = {**CALLING, **message_keys(calls, "calls")}
    try:
        conversation = chat(USER, first, second, {"role": "tool", "content": "1"}, ANSWER)
    except RowError as error:
        problem_of_turn = "are one turn" in str(error) or "which differ" in str(error)
        assert problem_of_turn, error  # noqa: PT017 - any of them may be refused
        return
    turn = conversation.messages[1]
    assert turn["tool_calls"] == [AS_SERVED]
    assert turn["content"] == text
    for message in (first, second):
        for key, value in message_keys({**answer, **calls}, "").items():
            if key in message and key == "train":
                assert (1 in conversation.trained) is value
            elif key in message and key not in ("reasoning", "thinking"):
                assert turn[key] == message[key]
            elif key in message:
                assert message[key] in (turn.get("reasoning"), turn.get("thinking"))


def test_reasoning_of_calls_joins_the_turn_or_is_refused_after_text() -> None:
    result = {"role": "tool", "content": "1"}
    thinking = {**CALLING, "reasoning_content": "hm"}
    assert chat(USER, thinking, result, ANSWER).messages[1]["reasoning_content"] == "hm"
    assert chat(USER, {**ANSWER, "content": ""}, thinking, result, ANSWER).messages[1]["reasoning_content"] == "hm"
    for before in ({**ANSWER}, {**ANSWER, "content": "", "thinking": "oh"}, CALLING):
        error = problem(USER, before, thinking, result, ANSWER)
        assert "messages[2] has reasoning after the text of the message before it" in str(error)


@pytest.mark.parametrize(("before", "after"), [({}, {"loss": True}), ({"train": True}, {}), ({}, {})])
def test_a_missing_switch_agrees_with_being_trained(before: dict[str, Any], after: dict[str, Any]) -> None:
    conversation = chat(USER, {**ANSWER, **before}, {**CALLING, **after}, {"role": "tool", "content": "1"}, ANSWER)
    assert conversation.trained == (1, 3)
    for one, other in (({"loss": False}, {}), ({}, {"loss": False}), ({"train": True}, {"train": False})):
        assert "disagree" in str(problem(USER, {**ANSWER, **one}, {**CALLING, **other}, ANSWER))


NAMES = ("arguments", "parameters", "args", "input")
GIVEN = st.none() | st.sampled_from(["", "{}", "null", {}, {"x": 1}, '{"x": 1}', {"x": 2}, {"x": None}, "1"])


@drawn(
    inside=st.dictionaries(st.sampled_from(NAMES), GIVEN, max_size=2),
    outside=st.dictionaries(st.sampled_from(NAMES), GIVEN, max_size=2),
)
@settings(deadline=None, max_examples=300)
def test_arguments_are_read_under_every_known_key_or_refused(inside: dict[str, Any], outside: dict[str, Any]) -> None:
    call = {"type": "function", "function": {"name": "f", **inside}, **outside}
    given = [*inside.values(), *outside.values()]
    values = [json.loads(each) if isinstance(each, str) and each else each for each in given]
    non_empty = [value for value in values if value not in (None, "", {})]
    try:
        conversation = chat(USER, {**ANSWER, "tool_calls": [call]})
    except RowError as error:
        differs = "which differ" in str(error) and any(value != non_empty[0] for value in non_empty)
        assert differs, error  # noqa: PT017 - any of them may be refused
        return
    expected = non_empty[0] if non_empty else {}
    assert all(value == expected for value in non_empty)
    assert conversation.messages[1]["tool_calls"] == [
        {"type": "function", "function": {"name": "f", "arguments": expected}}
    ]


def test_a_name_next_to_the_function_must_equal_the_function_name() -> None:
    same = {**AS_SERVED, "name": "f"}
    assert chat(USER, {**ANSWER, "tool_calls": [same]}).messages[1]["tool_calls"] == [AS_SERVED]
    error = problem(USER, {**ANSWER, "tool_calls": [{**AS_SERVED, "name": "g"}]})
    assert "has a call of 'g' with a function 'f'" in str(error)


@pytest.mark.parametrize(
    "message",
    [
        {**ANSWER, "tool_calls": [{"name": "f", "arguments": '{"x": 1, "x": 2}'}]},
        {**ANSWER, "tool_calls": '[{"name": "f", "arguments": {"x": 1, "x": 2}}]'},
        {"role": "tool_call", "content": '{"name": "f", "arguments": {"x": {"y": 1, "y": 2}}}'},
    ],
)
def test_json_with_two_values_under_one_key_is_refused(message: dict[str, Any]) -> None:
    assert "is repeated with different values" in str(problem(USER, message))
    same = {"name": "f", "arguments": '{"x": 1, "x": 1}'}
    assert chat(USER, {**ANSWER, "tool_calls": [same]}).messages[1]["tool_calls"] == [AS_SERVED]
