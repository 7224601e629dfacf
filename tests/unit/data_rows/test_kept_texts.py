"""A row has the same prefixes rendered several times: the template renders each once, and nothing is mixed up."""

from dataclasses import replace
from typing import Any

import pytest

from qlora_cli.data.rendering import template as template_module
from qlora_cli.data.rendering.template import MAX_KEPT_SIZE, MAX_KEPT_TEXTS, ChatTemplate
from qlora_cli.data.rows.examples import Conversation, RowError
from qlora_cli.tokenizing.template_rendering import render
from tests.support.models.chat_tokenizers import make_tokenizer

# Refuses an empty first message, and else writes all that a template is given.
ALL = (
    "{% if not messages[0].content %}{{ raise_exception('empty') }}{% endif %}"
    "{{ messages | tojson }}{{ tools | tojson if tools }}{{ kind }}{{ '>' if add_generation_prompt }}"
)
PLAIN = Conversation(messages=[{"role": "user", "content": "1"}], trained=())
OTHERS = (
    replace(PLAIN, messages=[*PLAIN.messages, *PLAIN.messages]),
    replace(PLAIN, messages=[{"role": "user", "content": 1}]),
    replace(PLAIN, messages=[{"role": "user", "content": 1.0}]),
    replace(PLAIN, messages=[{"role": "user", "content": True}]),
    replace(PLAIN, messages=[{"content": "1", "role": "user"}]),
    replace(PLAIN, tools=[{"name": "f"}]),
    replace(PLAIN, template_kwargs={"kind": "a"}),
)


@pytest.fixture
def template() -> ChatTemplate:
    tokenizer = make_tokenizer("chatml").tokenizer
    tokenizer.chat_template = ALL
    return ChatTemplate(tokenizer, frozenset())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []

    def counted(*arguments: Any, **more: Any) -> str:
        calls.append(arguments)
        return render(*arguments, **more)

    monkeypatch.setattr(template_module, "render", counted)
    return calls


def test_conversations_that_differ_in_anything_have_texts_of_their_own(
    template: ChatTemplate, calls: list[Any]
) -> None:
    asked = [(each, is_prompt) for each in (PLAIN, *OTHERS) for is_prompt in (False, True)]
    once, again = ([template.text(each, add_generation_prompt=prompt) for each, prompt in asked] for _ in range(2))
    assert once == again
    assert len(set(once)) == len(once) == len(calls)


def test_a_refusal_is_kept_too(template: ChatTemplate, calls: list[Any]) -> None:
    for _ in range(2):
        with pytest.raises(RowError, match="the chat template refuses it: empty"):
            template.text(replace(PLAIN, messages=[{"role": "user", "content": ""}]))
    assert len(calls) == 1


def test_few_and_short_texts_are_kept(template: ChatTemplate, calls: list[Any]) -> None:
    long = replace(PLAIN, messages=[{"role": "user", "content": "x" * MAX_KEPT_SIZE}])
    deep: Any = "x"
    for _ in range(100):
        deep = {"a": deep}
    several = [replace(PLAIN, template_kwargs={"kind": number}) for number in range(MAX_KEPT_TEXTS + 1)]
    for each in (long, long, replace(PLAIN, tools=[deep]), *several):
        template.text(each)
    assert len(calls) == 3 + len(several)
    template.text(several[-1])
    assert len(calls) == 3 + len(several)
    template.text(several[0])
    assert len(calls) == 4 + len(several)
