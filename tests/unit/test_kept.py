"""All that a row says is in its text, in its own message; or the row is refused, or what is left out is told."""

import json
from itertools import pairwise
from typing import Any

import pytest

from qlora_cli.data.encode import TextTokenizer
from qlora_cli.data.marks import What
from qlora_cli.data.rows import IGNORED, Conversation, RowError
from qlora_cli.data.tokens import Tokenizer, Tokens
from qlora_cli.settings.choices import LossOn
from tests.chat_templates import OWN, SHIPPED, TEMPLATES, tokenizer_with
from tests.chat_tokenizers import make_tokenizer
from tests.drawn_rows import Drawn, draw_row

SEEDS = range(25)  # benchmarks/rows_kept.py draws more
# They end no turn, or ask for a thought that they take out of every answer.
REFUSE_ALL = {"no_end", "glm4moe", "reasoning_taken_out", "deepseek_r1_distill"}


def of(
    name: str, loss_on: LossOn = LossOn.COMPLETIONS, *, accepts_lost: bool = False
) -> tuple[TextTokenizer, Tokenizer]:
    text = tokenizer_with(name)
    return text, Tokenizer(text.tokenizer, loss_on, text.end_ids, accepts_lost=accepts_lost)


def one(tokenizer: Tokenizer, conversation: Conversation) -> Tokens | RowError:
    (found,) = tokenizer.tokenize([conversation])
    return found


def trained_texts(text: TextTokenizer, tokens: Tokens) -> list[str]:
    """Return the stretches of trained tokens as texts."""
    labels = [IGNORED, *tokens.labels.tolist(), IGNORED]
    edges = [place for place, (a, b) in enumerate(pairwise(labels)) if (a == IGNORED) != (b == IGNORED)]
    ids = tokens.input_ids.tolist()
    return [str(text.tokenizer.decode(ids[start:end])) for start, end in zip(edges[::2], edges[1::2], strict=True)]


def stands_in(value: str, text: str) -> bool:
    """Whether the words of a value stand in a text in order, in one of the ways in which templates quote."""
    written = (text, text.replace("\\\\", "\\"))
    quoted = (value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1])
    return any(each in whole for each in quoted for whole in written)


def lost(drawn: Drawn, whole: str, trained: dict[int, str]) -> set[What]:
    """Return the kinds of what is in no text of its own message."""
    found = set()
    kinds = {What.CONTENT: drawn.said, What.REASONING: drawn.reasoning, What.BESIDE_CALLS: drawn.beside_calls}
    for what, by_place in kinds.items():
        for place, values in by_place.items():
            if place >= len(drawn.conversation.messages):
                continue
            for value in values:
                parts = [part.strip() for part in value.replace("<think>", "</think>").split("</think>")]
                if not all(stands_in(part, trained.get(place, whole)) for part in parts[-1:]):
                    found.add(what)
    for what, values in ((What.TOOL, drawn.tools), (What.TOOL_DETAILS, drawn.tool_details)):
        if drawn.conversation.tools and not all(stands_in(value, whole) for value in values):
            found.add(what)
    return found


@pytest.mark.parametrize("name", TEMPLATES)
def test_all_that_a_row_says_is_in_its_own_message_or_it_is_refused_or_told(name: str) -> None:
    num_used = 0
    for seed in SEEDS:
        drawn = draw_row(seed)
        text, tokenizer = of(name)
        found = one(tokenizer, drawn.conversation)
        if isinstance(found, RowError):
            continue
        num_used += 1
        trained = trained_texts(text, found)
        assert len(trained) == len(drawn.conversation.trained), seed
        by_place = dict(zip(drawn.conversation.trained, trained, strict=True))
        missing = lost(drawn, str(text.tokenizer.decode(found.input_ids.tolist())), by_place)
        assert missing <= set(tokenizer.renderer.told), (seed, trained)
        assert missing <= {What.REASONING, What.BESIDE_CALLS, What.TOOL_DETAILS}, seed
        for place, answer in by_place.items():
            values = [*drawn.said[place], *drawn.reasoning.get(place, ())]
            last = max((answer.rfind(value.split()[0]) + len(value.split()[0]) for value in values), default=0)
            assert answer[last:].strip(), (seed, "nothing ends the turn")
    assert (num_used == 0) == (name in REFUSE_ALL)


def test_templates_of_real_models_are_among_them() -> None:
    assert len(OWN) >= 14
    assert len(SHIPPED) >= 30


CALL = {"type": "function", "function": {"name": "lookup", "arguments": {"word": "iron"}}}
TOOL = {"type": "function", "function": {"name": "lookup", "description": "Looks a word up"}}


def asked(*messages: dict[str, Any], tools: list[Any] | None = None, trained: tuple[int, ...] = ()) -> Conversation:
    """Return messages behind a question, of which the last is trained unless `trained` says otherwise."""
    return Conversation(
        messages=[{"role": "user", "content": "Look up iron."}, *messages],
        trained=trained or (len(messages),),
        tools=tools,
    )


def answer(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def trained_by(name: str, conversation: Conversation, *, accepts_lost: bool = False) -> list[str]:
    text, tokenizer = of(name, accepts_lost=accepts_lost)
    found = one(tokenizer, conversation)
    assert isinstance(found, Tokens), found
    return trained_texts(text, found)


def refused_by(name: str, conversation: Conversation, loss_on: LossOn = LossOn.COMPLETIONS) -> RowError:
    found = one(of(name, loss_on)[1], conversation)
    assert isinstance(found, RowError)
    return found


def test_a_template_that_looks_for_parts_gets_contents_in_parts() -> None:
    assert trained_by("contents_in_parts", asked(answer("Iron is one."))) == ["Iron is one.<|im_end|>"]


@pytest.mark.parametrize("name", ["arguments_joined", "arguments_printed"])
def test_a_template_that_joins_or_prints_arguments_gets_them_as_json_text(name: str) -> None:
    (trained,) = trained_by(name, asked(answer("", tool_calls=[CALL])))
    assert '{"word": "iron"}' in trained


def test_a_call_that_only_the_list_of_tools_names_is_refused() -> None:
    conversation = asked(answer("", tool_calls=[CALL]), tools=[TOOL])
    assert "no place for tool calls: 'lookup' is not in the answer" in str(
        refused_by("tools_without_calls", conversation)
    )


def test_reasoning_without_a_place_is_refused_unless_it_is_accepted_or_not_trained() -> None:
    first = answer("An ore.", reasoning_content="Ores are mined.")
    problem = refused_by("contents_alone", asked(first))
    assert "no place for reasoning: 'reasoning_content' of message 1, 'Ores are mined.'" in str(problem)
    assert "--accept-lost" in str(problem.hint)
    assert trained_by("contents_alone", asked(first), accepts_lost=True) == ["An ore.<|im_end|>"]
    two = asked(first, {"role": "user", "content": "And zinc?"}, answer("A metal."))
    _, tokenizer = of("contents_alone")
    assert isinstance(one(tokenizer, two), Tokens)
    assert tokenizer.renderer.told == {What.REASONING: 1}
    assert "no place for reasoning" in str(refused_by("contents_alone", two, LossOn.ALL))


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_goes_in_under_the_key_that_the_template_knows(key: str) -> None:
    (trained,) = trained_by("everything", asked(answer("A metal.", **{key: "Iron is one."})))
    assert trained == "<think>\nIron is one.\n</think>\n\nA metal.<|im_end|>"


def test_a_template_that_takes_reasoning_out_of_every_answer_is_recognised() -> None:
    reasoned = asked(answer("<think>\n30 and 12\n</think>\n\n42"))
    problem = refused_by("reasoning_taken_out", reasoned)
    assert "takes reasoning out of every answer" in str(problem)
    assert "--chat-template chatml" in str(problem.hint)
    assert "--accept-lost" not in str(problem.hint)  # which would not help: a thought is asked for
    assert trained_by("contents_alone", reasoned) == ["<think>\n30 and 12\n</think>\n\n42<|im_end|>"]


def test_reasoning_that_goes_once_a_message_follows_is_refused_with_what_helps() -> None:
    messages = [answer("<think>\nhm\n</think>\n\n42"), {"role": "user", "content": "Sure?"}, answer("Yes.")]
    problem = refused_by("reasoning_of_the_last", asked(*messages, trained=(1, 3)))
    assert "differently when others follow" in str(problem)
    assert "--loss-on last" in str(problem.hint)
    assert trained_by("reasoning_of_the_last", asked(*messages)) == ["Yes.<|im_end|>"]


def test_text_beside_calls_that_a_template_drops_is_refused_unless_it_is_accepted() -> None:
    conversation = asked(answer("I look it up.", tool_calls=[CALL]))
    problem = refused_by("calls_or_content", conversation)
    assert "leaves out the text beside the tool calls of message 1: 'I look it up.'" in str(problem)
    (trained,) = trained_by("calls_or_content", conversation, accepts_lost=True)
    assert trained == '{"name": "lookup", "arguments": {"word": "iron"}}<|im_end|>'


def test_developer_is_system_where_a_template_has_no_such_role() -> None:
    developer = {"role": "developer", "content": "Answer in one word."}
    conversation = Conversation(messages=[developer, *asked(answer("Iron.")).messages], trained=(2,))
    text, tokenizer = of("three_roles")
    found = one(tokenizer, conversation)
    assert isinstance(found, Tokens)
    whole = str(text.tokenizer.decode(found.input_ids.tolist()))
    assert whole.startswith("<|im_start|>system\nAnswer in one word.<|im_end|>")
    text, tokenizer = of("contents_alone")
    found = one(tokenizer, conversation)
    assert isinstance(found, Tokens)
    assert "<|im_start|>developer\n" in str(text.tokenizer.decode(found.input_ids.tolist()))


def test_a_message_that_a_template_passes_over_is_refused() -> None:
    conversation = asked(answer("One moment."), {"role": "tool", "content": "symbol Fe"}, answer("Its symbol is Fe."))
    assert "leaves out message 2 (tool): 'symbol Fe'" in str(refused_by("three_roles", conversation))


def test_what_a_template_leaves_out_for_what_a_content_holds_is_refused() -> None:
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
def test_every_kind_of_answer_needs_an_end(given: dict[str, Any]) -> None:
    assert "ends no turn" in str(refused_by("no_end", asked(given)))


def test_what_closes_a_call_is_no_end() -> None:
    assert trained_by("no_end_behind_calls", asked(answer("42"))) == ["42<|im_end|>"]
    problem = refused_by("no_end_behind_calls", asked(answer("", tool_calls=[CALL])))
    assert "behind the tool calls of message 1" in str(problem)
    assert "<|im_end|>" in trained_by("everything", asked(answer("", tool_calls=[CALL, CALL])))[0]
    assert "<|im_end|>" in trained_by("one_call", asked(answer("", tool_calls=[CALL])))[0]


def test_where_generation_stops_at_the_next_role_that_token_is_trained() -> None:
    text, _ = of("glm4moe")
    ids = text.tokenizer.get_vocab()
    ends = frozenset({ids["<|user|>"], ids["<|observation|>"]})
    tokenizer = Tokenizer(text.tokenizer, LossOn.COMPLETIONS, ends)
    conversation = asked(answer("", tool_calls=[CALL]), {"role": "tool", "content": "Fe"}, trained=(1,))
    found = one(tokenizer, conversation)
    assert isinstance(found, Tokens), found
    (trained,) = trained_texts(text, found)
    assert trained.endswith("<|observation|>")


def test_an_answer_without_reasoning_is_refused_with_the_switch_that_helps() -> None:
    conversation = asked(answer("42"))
    problem = refused_by("nemotron_3_nano", conversation)
    assert 'chat_template_kwargs: {"enable_thinking": false}' in str(problem.hint)
    switched = Conversation(messages=conversation.messages, trained=(1,), template_kwargs={"enable_thinking": False})
    assert len(trained_by("nemotron_3_nano", switched)) == 1


def test_a_template_that_refuses_marks_is_judged_by_the_row_alone() -> None:
    text = make_tokenizer("chatml")
    text.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.content != 'yes' and m.role == 'assistant' %}"
        "{{ raise_exception('yes or nothing') }}{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = Tokenizer(text.tokenizer, LossOn.COMPLETIONS, text.end_ids)
    assert isinstance(one(tokenizer, asked(answer("yes"))), Tokens)
    found = one(tokenizer, asked(answer("yes", reasoning_content="It is.")))
    assert "no place for reasoning" in str(found)
