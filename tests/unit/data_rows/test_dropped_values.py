"""Every value of a row is rendered in its own message; or the row is refused, or the dropped value is reported."""

import json
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import pytest

from qlora_cli.data.rendering.value_marks import ValueKind
from qlora_cli.data.rows.examples import IGNORE_INDEX, Conversation, RowError
from qlora_cli.data.tokenizing.encode import TextTokenizer
from qlora_cli.data.tokenizing.tokens import RowTokenizer, Tokens
from qlora_cli.settings.choices import LossOn
from tests.chat_templates import OWN, SHIPPED, TEMPLATES, tokenizer_with
from tests.support.data.drawn_rows import Drawn, draw_row
from tests.support.models.chat_tokenizers import make_tokenizer

SEEDS = range(25)  # benchmarks/rows_rendered.py draws more
# They end no turn, or prompt for a thought that they remove from every answer.
REFUSE_ALL = {"no_end", "glm4moe", "reasoning_taken_out", "deepseek_r1_distill"}


def of(
    name: str, loss_on: LossOn = LossOn.COMPLETIONS, *, accepts_lost: bool = False
) -> tuple[TextTokenizer, RowTokenizer]:
    text = tokenizer_with(name)
    return text, RowTokenizer(text.tokenizer, loss_on, text.end_ids, accepts_lost=accepts_lost)


def one(tokenizer: RowTokenizer, conversation: Conversation) -> Tokens | RowError:
    (tokens,) = tokenizer.tokenize([conversation])
    return tokens


def trained_texts(text: TextTokenizer, tokens: Tokens) -> list[str]:
    """Return the stretches of trained tokens as texts."""
    labels = [IGNORE_INDEX, *tokens.labels.tolist(), IGNORE_INDEX]
    edges = [index for index, (a, b) in enumerate(pairwise(labels)) if (a == IGNORE_INDEX) != (b == IGNORE_INDEX)]
    ids = tokens.input_ids.tolist()
    return [str(text.tokenizer.decode(ids[start:end])) for start, end in zip(edges[::2], edges[1::2], strict=True)]


def is_quoted_in(value: str, text: str) -> bool:
    """Return whether a text contains a value, in one of the ways in which templates quote."""
    written = (text, text.replace("\\\\", "\\"))
    quoted = (value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1])
    return any(each in whole for each in quoted for whole in written)


def lost(drawn: Drawn, whole: str, trained: dict[int, str]) -> set[ValueKind]:
    """Return the kinds of values that are not in the text of their own message."""
    lost_kinds = set()
    kinds = {
        ValueKind.CONTENT: drawn.values,
        ValueKind.REASONING: drawn.reasoning,
        ValueKind.TEXT_WITH_CALLS: drawn.texts_with_calls,
    }
    for kind, by_index in kinds.items():
        for index, values in by_index.items():
            if index >= len(drawn.conversation.messages):
                continue
            for value in values:
                parts = [part.strip() for part in value.replace("<think>", "</think>").split("</think>")]
                if not all(is_quoted_in(part, trained.get(index, whole)) for part in parts[-1:]):
                    lost_kinds.add(kind)
    for kind, values in ((ValueKind.TOOL, drawn.tools), (ValueKind.TOOL_DETAILS, drawn.tool_details)):
        if drawn.conversation.tools and not all(is_quoted_in(value, whole) for value in values):
            lost_kinds.add(kind)
    return lost_kinds


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_value_of_a_row_is_rendered_in_its_message_refused_or_reported(name: str) -> None:
    num_used = 0
    text, tokenizer = of(name)
    for seed in SEEDS:
        drawn = draw_row(seed)
        before = tokenizer.renderer.num_dropped.copy()
        tokens = one(tokenizer, drawn.conversation)
        if isinstance(tokens, RowError):
            continue
        num_used += 1
        reported = set(tokenizer.renderer.num_dropped - before)
        trained = trained_texts(text, tokens)
        assert len(trained) == len(drawn.conversation.trained), seed
        by_place = dict(zip(drawn.conversation.trained, trained, strict=True))
        missing = lost(drawn, str(text.tokenizer.decode(tokens.input_ids.tolist())), by_place)
        assert missing <= reported, (seed, trained)
        assert missing <= {ValueKind.REASONING, ValueKind.TEXT_WITH_CALLS, ValueKind.TOOL_DETAILS}, seed
        for index, answer in by_place.items():
            values = [*drawn.values[index], *drawn.reasoning.get(index, ())]
            last = max((answer.rfind(value.split()[0]) + len(value.split()[0]) for value in values), default=0)
            assert answer[last:].strip(), (seed, "nothing ends the turn")
    assert (num_used == 0) == (name in REFUSE_ALL)


def test_templates_of_real_models_are_included() -> None:
    assert len(OWN) >= 14
    assert len(SHIPPED) >= 30


CALL = {"type": "function", "function": {"name": "lookup", "arguments": {"word": "iron"}}}
TOOL = {"type": "function", "function": {"name": "lookup", "description": "Looks a word up"}}


def asked(*messages: dict[str, Any], tools: list[Any] | None = None, trained: tuple[int, ...] = ()) -> Conversation:
    """Return a question and `messages`, of which the last is trained unless `trained` says otherwise."""
    return Conversation(
        messages=[{"role": "user", "content": "Look up iron."}, *messages],
        trained=trained or (len(messages),),
        tools=tools,
    )


def answer(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def trained_by(name: str, conversation: Conversation, *, accepts_lost: bool = False) -> list[str]:
    text, tokenizer = of(name, accepts_lost=accepts_lost)
    tokens = one(tokenizer, conversation)
    assert isinstance(tokens, Tokens), tokens
    return trained_texts(text, tokens)


def whole_text(name: str, conversation: Conversation) -> str:
    text, tokenizer = of(name)
    tokens = one(tokenizer, conversation)
    assert isinstance(tokens, Tokens), tokens
    return str(text.tokenizer.decode(tokens.input_ids.tolist()))


def with_template(template: str) -> tuple[TextTokenizer, RowTokenizer]:
    """Return a tokenizer with a template that writes turns as ChatML does; `template` writes the inside of a turn."""
    text = make_tokenizer("chatml")
    text.tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n" + template + "<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return text, RowTokenizer(text.tokenizer, LossOn.COMPLETIONS, text.end_ids)


def trained_with(template: str, conversation: Conversation) -> list[str]:
    text, tokenizer = with_template(template)
    tokens = one(tokenizer, conversation)
    assert isinstance(tokens, Tokens), tokens
    return trained_texts(text, tokens)


def refused_by(name: str, conversation: Conversation, loss_on: LossOn = LossOn.COMPLETIONS) -> RowError:
    error = one(of(name, loss_on)[1], conversation)
    assert isinstance(error, RowError)
    return error


def test_a_template_that_expects_parts_gets_contents_in_parts() -> None:
    assert trained_by("contents_in_parts", asked(answer("Iron is one."))) == ["Iron is one.<|im_end|>"]


@pytest.mark.parametrize("name", ["arguments_joined", "arguments_printed"])
def test_a_template_that_joins_or_prints_arguments_gets_them_as_json_text(name: str) -> None:
    (trained,) = trained_by(name, asked(answer("", tool_calls=[CALL])))
    assert '{"word": "iron"}' in trained


def test_a_call_that_only_the_list_of_tools_names_is_refused() -> None:
    conversation = asked(answer("", tool_calls=[CALL]), tools=[TOOL])
    assert "does not write tool calls: 'lookup' is not in the answer" in str(
        refused_by("tools_without_calls", conversation)
    )


def test_dropped_reasoning_is_refused_unless_accepted_or_untrained() -> None:
    first = answer("An ore.", reasoning_content="Ores are mined.")
    problem = refused_by("contents_alone", asked(first))
    assert "does not write reasoning: 'reasoning_content' of message 1, 'Ores are mined.'" in str(problem)
    assert "--accept-lost" in str(problem.hint)
    assert trained_by("contents_alone", asked(first), accepts_lost=True) == ["An ore.<|im_end|>"]
    two = asked(first, {"role": "user", "content": "And zinc?"}, answer("A metal."))
    _, tokenizer = of("contents_alone")
    assert isinstance(one(tokenizer, two), Tokens)
    assert tokenizer.renderer.num_dropped == {ValueKind.REASONING: 1}
    assert "does not write reasoning" in str(refused_by("contents_alone", two, LossOn.ALL))


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_passed_under_the_key_that_the_template_knows(key: str) -> None:
    (trained,) = trained_by("everything", asked(answer("A metal.", **{key: "Iron is one."})))
    assert trained == "<think>\nIron is one.\n</think>\n\nA metal.<|im_end|>"


def test_a_template_that_removes_reasoning_from_every_answer_is_recognised() -> None:
    reasoned = asked(answer("<think>\n30 and 12\n</think>\n\n42"))
    problem = refused_by("reasoning_taken_out", reasoned)
    assert "removes reasoning from every answer" in str(problem)
    assert "--chat-template chatml" in str(problem.hint)
    assert "--accept-lost" not in str(problem.hint)  # which would not help: the template prompts for a thought
    assert trained_by("contents_alone", reasoned) == ["<think>\n30 and 12\n</think>\n\n42<|im_end|>"]


def test_reasoning_that_is_dropped_when_a_message_follows_is_refused_with_a_hint() -> None:
    messages = [answer("<think>\nhm\n</think>\n\n42"), {"role": "user", "content": "Sure?"}, answer("Yes.")]
    problem = refused_by("reasoning_of_the_last", asked(*messages, trained=(1, 3)))
    assert "differently when others follow" in str(problem)
    assert "--loss-on last" in str(problem.hint)
    assert trained_by("reasoning_of_the_last", asked(*messages)) == ["Yes.<|im_end|>"]


def test_dropped_text_next_to_calls_is_refused_unless_accepted() -> None:
    conversation = asked(answer("I look it up.", tool_calls=[CALL]))
    problem = refused_by("calls_or_content", conversation)
    assert "leaves out the text next to the tool calls of message 1: 'I look it up.'" in str(problem)
    (trained,) = trained_by("calls_or_content", conversation, accepts_lost=True)
    assert trained == '{"name": "lookup", "arguments": {"word": "iron"}}<|im_end|>'


def test_developer_becomes_system_if_the_template_lacks_the_role() -> None:
    developer = {"role": "developer", "content": "Answer in one word."}
    conversation = Conversation(messages=[developer, *asked(answer("Iron.")).messages], trained=(2,))
    text, tokenizer = of("three_roles")
    tokens = one(tokenizer, conversation)
    assert isinstance(tokens, Tokens)
    whole = str(text.tokenizer.decode(tokens.input_ids.tolist()))
    assert whole.startswith("<|im_start|>system\nAnswer in one word.<|im_end|>")
    assert whole_text("contents_alone", conversation).startswith("<|im_start|>system\nAnswer in one word.")
    assert "<|start|>developer<|message|>" in whole_text("gptoss", conversation)  # which names it


def test_a_message_that_a_template_skips_is_refused() -> None:
    conversation = asked(answer("One moment."), {"role": "tool", "content": "symbol Fe"}, answer("Its symbol is Fe."))
    assert "leaves out message 2 (tool): 'symbol Fe'" in str(refused_by("three_roles", conversation))


def test_a_value_dropped_because_of_its_content_is_refused() -> None:
    assert len(trained_by("contents_cut_short", asked(answer("short")))) == 1
    problem = refused_by("contents_cut_short", asked(answer("word " * 50 + "and the end")))
    assert "leaves out message 1 (assistant)" in str(problem)


@pytest.mark.parametrize(
    "given",
    [
        answer("42"),
        answer("<think>\n6 times 7\n</think>\n\n42"),
        answer("", tool_calls=[CALL]),
        answer("I look it up.", tool_calls=[CALL, CALL]),
    ],
)
def test_every_kind_of_answer_needs_an_end_of_turn(given: dict[str, Any]) -> None:
    assert "ends no turn" in str(refused_by("no_end", asked(given)))


def test_the_text_that_closes_a_call_is_not_an_end_of_turn() -> None:
    assert trained_by("no_end_behind_calls", asked(answer("42"))) == ["42<|im_end|>"]
    problem = refused_by("no_end_behind_calls", asked(answer("", tool_calls=[CALL])))
    assert "after the tool calls of message 1" in str(problem)
    assert "<|im_end|>" in trained_by("everything", asked(answer("", tool_calls=[CALL, CALL])))[0]
    assert "<|im_end|>" in trained_by("one_call", asked(answer("", tool_calls=[CALL])))[0]


def test_the_token_of_the_next_role_is_trained_if_generation_stops_at_it() -> None:
    text, _ = of("glm4moe")
    ids = text.tokenizer.get_vocab()
    ends = frozenset({ids["<|user|>"], ids["<|observation|>"]})
    tokenizer = RowTokenizer(text.tokenizer, LossOn.COMPLETIONS, ends)
    conversation = asked(answer("", tool_calls=[CALL]), {"role": "tool", "content": "Fe"}, trained=(1,))
    tokens = one(tokenizer, conversation)
    assert isinstance(tokens, Tokens), tokens
    (trained,) = trained_texts(text, tokens)
    assert trained.endswith("<|observation|>")


def test_an_answer_without_reasoning_is_refused_with_the_switch_that_helps() -> None:
    conversation = asked(answer("42"))
    problem = refused_by("nemotron_3_nano", conversation)
    assert 'chat_template_kwargs: {"enable_thinking": false}' in str(problem.hint)
    switched = Conversation(messages=conversation.messages, trained=(1,), template_kwargs={"enable_thinking": False})
    assert len(trained_by("nemotron_3_nano", switched)) == 1


def test_a_template_that_refuses_marks_is_judged_by_the_row_itself() -> None:
    text = make_tokenizer("chatml")
    text.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.content != 'yes' and m.role == 'assistant' %}"
        "{{ raise_exception('yes or nothing') }}{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = RowTokenizer(text.tokenizer, LossOn.COMPLETIONS, text.end_ids)
    assert isinstance(one(tokenizer, asked(answer("yes"))), Tokens)
    error = one(tokenizer, asked(answer("yes", reasoning_content="It is.")))
    assert "does not write reasoning" in str(error)


@pytest.mark.parametrize("value", [datetime(2024, 1, 1, tzinfo=UTC), b"x", 1.5, 7, None, [1], {"a": "b"}, True])
def test_other_keys_of_messages_may_have_any_type(value: object) -> None:
    message = answer("Iron.", sent_at=value)
    assert trained_by("contents_alone", asked(message)) == ["Iron.<|im_end|>"]


PARTS_OF_QUESTIONS = (
    "{% if m.role == 'user' %}{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}"
)


def test_only_roles_that_a_template_expects_in_parts_are_passed_in_parts() -> None:
    assert trained_with(PARTS_OF_QUESTIONS, asked(answer("Hello."))) == ["Hello.<|im_end|>"]
    messages = [{"role": "system", "content": "Be brief."}, *asked(answer("Hello.")).messages]
    assert trained_with(PARTS_OF_QUESTIONS, Conversation(messages=messages, trained=(2,))) == ["Hello.<|im_end|>"]


@pytest.mark.parametrize(
    "value", ["don't\nstop", 'say "so"\n\tnow', "a\u00a0b 🙂", "back\\slash 'and' more", "x\x07y"]
)
@pytest.mark.parametrize(
    "written", ["{{ v | tojson }}", "{{ [v] }}", "{{ v }}", "{{ {'k': v} | tojson | tojson }}", "{{ v | e }}"]
)
def test_a_value_is_found_however_it_is_quoted(value: str, written: str) -> None:
    template = (
        "{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}"
        "{% for k, v in c.function.arguments.items() %} {{ k }}=" + written + "{% endfor %}</call>{% endfor %}"
    )
    call = {"type": "function", "function": {"name": "lookup", "arguments": {"word": value}}}
    assert len(trained_with(template, asked(answer("", tool_calls=[call])))) == 1


def test_arguments_with_quotes_are_found_in_shipped_templates_that_write_python() -> None:
    call = {"type": "function", "function": {"name": "lookup", "arguments": {"word": "don't\nstop"}}}
    assert len(trained_by("lfm2_v2", asked(answer("", tool_calls=[call]), tools=[TOOL]))) == 1


@pytest.mark.parametrize("role", ["tool", "system"])
def test_a_message_rendered_as_an_answer_is_refused(role: str) -> None:
    text = make_tokenizer("chatml")
    text.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}[Q] {{ m.content }}\n"
        "{% else %}[A] {{ m.content }}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}[A]{% endif %}"
    )
    tokenizer = RowTokenizer(text.tokenizer, LossOn.COMPLETIONS, text.end_ids)
    assert isinstance(one(tokenizer, asked(answer("Iron."))), Tokens)
    error = one(tokenizer, asked(answer("Hm."), {"role": role, "content": "Fe"}, answer("Iron.")))
    assert f"writes message 2 ({role}) as an answer of the assistant" in str(error)


def test_a_truncated_result_is_detected_although_the_answer_quotes_it() -> None:
    template = "{{ m.content[:20] if m.role == 'tool' else m.content }}"
    result = "a long result of a tool, whose end is Fe"
    messages = [answer("Wait."), {"role": "tool", "content": result}, answer(f"It says: {result}")]
    error = one(with_template(template)[1], asked(*messages))
    assert "leaves out message 2 (tool)" in str(error)


def test_the_prompt_of_a_later_answer_is_compared_too() -> None:
    text = make_tokenizer("chatml")
    text.tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if '/no_think' in messages[-1].content %}<think></think>{% endif %}{% endif %}"
    )
    tokenizer = RowTokenizer(text.tokenizer, LossOn.COMPLETIONS, text.end_ids)
    messages = [answer("Iron."), {"role": "user", "content": "And now? /no_think"}, answer("Zinc.")]
    assert "with a different text" in str(one(tokenizer, asked(*messages, trained=(1, 3))))


def test_a_dropped_key_is_reported_although_the_template_mentions_its_name() -> None:
    _, tokenizer = with_template(
        "{% if m.text is defined and m.role == 'tool' %}{{ m.text }}{% endif %}{{ m.content }}"
    )
    conversation = asked(answer("Iron."))
    conversation.messages[0]["text"] = "Iron is a metal."
    assert isinstance(one(tokenizer, conversation), Tokens)
    assert not tokenizer.renderer.writes_key("text", [conversation])
    assert not tokenizer.renderer.writes_key("elsewhere", [conversation])


def test_reasoning_in_the_content_moves_to_the_key_of_a_template_that_adds_an_empty_block() -> None:
    thought = "<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n"
    template = "{% if m.role == 'assistant' %}" + thought + "{% endif %}{{ m.content }}"
    (trained,) = trained_with(template, asked(answer("<think>\n6 times 7\n</think>\n\n42")))
    assert trained == "<think>\n6 times 7\n</think>\n\n42<|im_end|>"


def test_the_last_answer_ends_with_the_token_of_a_question_if_generation_stops_at_it() -> None:
    text, _ = of("glm4moe")
    tokenizer = RowTokenizer(text.tokenizer, LossOn.COMPLETIONS, frozenset({text.tokenizer.get_vocab()["<|user|>"]}))
    messages = [answer("A metal."), {"role": "user", "content": "Sure?"}, answer("Yes.")]
    for conversation in (asked(*messages, trained=(1, 3)), asked(*messages)):
        tokens = one(tokenizer, conversation)
        assert isinstance(tokens, Tokens), tokens
        assert all(trained.endswith("<|user|>") for trained in trained_texts(text, tokens))
        assert "more" not in str(text.tokenizer.decode(tokens.input_ids.tolist()))


def test_each_call_in_a_turn_of_its_own_ends() -> None:
    call = "<|im_start|>assistant\nto={{ c.function.name }}\n{{ c.function.arguments | tojson }}<|im_end|>\n"
    template = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}" + call + "{% else %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    text = make_tokenizer("chatml")
    text.tokenizer.chat_template = template
    tokenizer = RowTokenizer(text.tokenizer, LossOn.COMPLETIONS, text.end_ids)
    tokens = one(tokenizer, asked(answer("", tool_calls=[CALL])))
    assert isinstance(tokens, Tokens), tokens


def test_a_function_name_that_is_only_in_the_call_id_is_detected() -> None:
    written = "<call>{{ c.id }} {{ c.function.arguments | tojson }}</call>"
    template = "{{ m.content }}{% for c in m.tool_calls or [] %}" + written + "{% endfor %}"
    call = {**CALL, "id": "functions.lookup:0"}
    (trained,) = trained_with(template, asked(answer("", tool_calls=[call])))
    assert "functions.lookup:0" in trained


def test_hints_propose_only_what_works() -> None:
    thought = answer("42", reasoning_content="6 times 7")
    assert "<think>" not in str(refused_by("deepseek_r1_distill", asked(thought)).hint)
    assert "<think>" in str(refused_by("contents_alone", asked(thought)).hint)
    assert '{"enable_thinking": true}' in str(refused_by("qwen3_5_nothink", asked(thought)).hint)
    assert "--loss-on last" not in str(refused_by("reasoning_taken_out", asked(answer("42")), LossOn.LAST).hint)
    system = {"role": "system", "content": "Be brief."}
    refused = refused_by("gemma", Conversation(messages=[system, *asked(answer("42")).messages], trained=(2,)))
    assert "--chat-template FILE" in str(refused.hint)
