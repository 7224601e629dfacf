"""The trained tokens of any conversation are exactly the answers and the ends of their turns."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, processors

from qlora_cli.data.rendering.renderer import Renderer
from qlora_cli.data.rendering.template import ChatTemplate
from qlora_cli.data.rendering.template_source import has_constant_prompt
from qlora_cli.data.rows.examples import IGNORE_INDEX, Conversation, PromptCompletion, RowError, Tokenized
from qlora_cli.data.tokenizing.encode import TextTokenizer
from qlora_cli.data.tokenizing.tokens import RowTokenizer, Tokens
from qlora_cli.settings.choices import LossOn
from tests.support.models.chat_tokenizers import CHATML, FAMILIES, REASONING, TRIMS, make_sentencepiece, make_tokenizer

TOKENIZERS = {family: make_tokenizer(family) for family in FAMILIES}
# Those of a data set of all the conversations that are drawn.
ROW_TOKENIZERS = {
    family: RowTokenizer(text.tokenizer, LossOn.COMPLETIONS, text.end_ids) for family, text in TOKENIZERS.items()
}
# Usual and unusual text: line breaks and spaces at the ends, control tokens, any character.
WORDS = st.sampled_from(
    [
        "one",
        " two",
        "\n",
        "\n\n",
        "  ",
        "Größe",
        "日本",
        "🙂",
        "<|im_end|>",
        "<s>",
        "[INST]",
        "assistant\n",
        "</s>",
        "<think>",
    ]
)
ANYTHING = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
TEXT = st.lists(st.one_of(WORDS, ANYTHING), max_size=6).map("".join)
ANSWER = TEXT.filter(lambda text: text.strip() != "")


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    """Draw a conversation of some turns, with any of its answers trained."""
    messages: list[dict[str, Any]] = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(TEXT)})
    for _ in range(draw(st.integers(1, 4))):
        messages.append({"role": "user", "content": draw(TEXT)})
        messages.append({"role": "assistant", "content": draw(ANSWER)})
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    trained = tuple(index for index in answers if draw(st.booleans()))
    if draw(st.booleans()):  # a question at the end has no answer
        messages.append({"role": "user", "content": draw(TEXT)})
    return Conversation(messages=messages, trained=trained)


def asked(question: str, answer: str) -> Conversation:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Conversation(messages=messages, trained=(1,))


def tokens_of(text: TextTokenizer, example: Any, loss_on: LossOn = LossOn.COMPLETIONS) -> Tokens:
    return only_row(RowTokenizer(text.tokenizer, loss_on, text.end_ids), example)


def only_row(tokenizer: RowTokenizer, example: Any) -> Tokens:
    (row,) = tokenizer.tokenize([example])
    assert isinstance(row, Tokens), row
    return row


def trained_text(text: TextTokenizer, tokens: Tokens) -> str:
    return str(text.tokenizer.decode([label for label in tokens.labels.tolist() if label != IGNORE_INDEX]))


def expected(family: str, conversation: Conversation) -> str:
    """Return the text to train: the answers as the template writes them, each with the end of its turn."""
    *_, end, before = FAMILIES[family]
    answers = [conversation.messages[index]["content"] for index in conversation.trained]
    return "".join(before + (answer.strip() if family in TRIMS else answer) + end for answer in answers)


@pytest.mark.parametrize("family", FAMILIES)
@given(conversation=conversations())
@settings(max_examples=120, deadline=None)
def test_exactly_the_answers_and_their_ends_are_trained(family: str, conversation: Conversation) -> None:
    text = TOKENIZERS[family]
    tokens = only_row(ROW_TOKENIZERS[family], conversation)
    assert trained_text(text, tokens) == expected(family, conversation)


@pytest.mark.parametrize("family", FAMILIES)
@given(conversation=conversations())
@settings(max_examples=60, deadline=None)
def test_rows_are_fed_as_a_server_renders_them_and_labels_are_tokens_or_ignored(
    family: str, conversation: Conversation
) -> None:
    text = TOKENIZERS[family]
    tokens = only_row(ROW_TOKENIZERS[family], conversation)
    rendered = text.tokenizer.apply_chat_template(conversation.messages, tokenize=False)
    assert text.tokenizer.decode(tokens.input_ids.tolist()) == rendered
    pairs = list(zip(tokens.input_ids.tolist(), tokens.labels.tolist(), strict=True))
    assert all(label in (token, IGNORE_INDEX) for token, label in pairs)
    if conversation.trained:
        first = conversation.trained[0]
        served: Any = text.tokenizer.apply_chat_template(
            conversation.messages[:first], tokenize=True, add_generation_prompt=True, return_dict=True
        )
        begin = next(index for index, (_, label) in enumerate(pairs) if label != IGNORE_INDEX)
        assert [token for token, _ in pairs[:begin]] == served["input_ids"]


@pytest.mark.parametrize("family", FAMILIES)
@given(conversation=conversations())
@settings(max_examples=60, deadline=None)
def test_spans_by_shape_equal_spans_by_rendering(family: str, conversation: Conversation) -> None:
    text = TOKENIZERS[family]
    renderer = Renderer(text.tokenizer, LossOn.COMPLETIONS, text.end_ids)
    template = ChatTemplate(text.tokenizer, text.end_ids)
    row = renderer.fit(conversation)
    rendered = renderer.render(row, renderer.text(row))
    long_way = [template.span(conversation, index, rendered.text) for index in conversation.trained]
    assert list(rendered.spans) == long_way


@pytest.mark.parametrize("family", FAMILIES)
@given(conversation=conversations())
@settings(max_examples=60, deadline=None)
def test_splitting_after_the_end_of_an_answer_changes_no_token(family: str, conversation: Conversation) -> None:
    text = TOKENIZERS[family]
    uncut = RowTokenizer(text.tokenizer, LossOn.COMPLETIONS, text.end_ids)
    assert uncut._ends_alone
    uncut._ends_alone = ()
    (expected_tokens,) = uncut.tokenize([conversation])
    tokens = only_row(ROW_TOKENIZERS[family], conversation)
    assert isinstance(expected_tokens, Tokens)
    assert tokens.input_ids.tolist() == expected_tokens.input_ids.tolist()
    assert tokens.labels.tolist() == expected_tokens.labels.tolist()


@given(prompt=TEXT, completion=ANSWER)
@settings(max_examples=150, deadline=None)
def test_a_completion_is_trained_to_its_end_and_its_prompt_is_not(prompt: str, completion: str) -> None:
    text = TOKENIZERS["llama"]
    tokens = tokens_of(text, PromptCompletion(prompt=prompt, completion=completion))
    bos, eos = text.tokenizer.bos_token, text.tokenizer.eos_token
    whole = str(text.tokenizer.decode(tokens.input_ids.tolist()))
    assert tokens.input_ids[0] == text.tokenizer.bos_token_id
    assert tokens.input_ids[-1] == tokens.labels[-1] == text.tokenizer.eos_token_id
    if bos not in prompt + completion and eos not in prompt + completion:
        assert whole == f"{bos}{prompt}{completion}{eos}"
        assert trained_text(text, tokens) == completion + eos


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_on_all_trains_every_token_but_the_first(family: str) -> None:
    text = TOKENIZERS[family]
    conversation = Conversation(
        messages=[{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}], trained=(1,)
    )
    tokens = tokens_of(text, conversation, LossOn.ALL)
    assert tokens.labels[0] == IGNORE_INDEX
    assert (tokens.labels[1:] == tokens.input_ids[1:]).all()


def test_a_bos_in_the_text_is_not_doubled() -> None:
    text = TOKENIZERS["llama"]
    tokens = tokens_of(text, PromptCompletion(prompt="", completion="<|begin_of_text|>one two<|eot_id|>"))
    assert tokens.input_ids.tolist().count(text.tokenizer.bos_token_id) == 1
    assert tokens.input_ids.tolist().count(text.tokenizer.eos_token_id) == 1


def test_a_token_across_the_start_of_an_answer_is_split() -> None:
    text = TOKENIZERS["chatml"]
    assert len(text.tokenizer(" function")["input_ids"]) == 1  # so it would span both
    tokens = tokens_of(text, PromptCompletion(prompt="Which func", completion="tion returns"))
    served = text.tokenizer("Which func")["input_ids"]
    assert tokens.input_ids.tolist()[: len(served)] == served
    assert trained_text(text, tokens) == "tion returns<|im_end|>"


def test_text_is_not_split_for_a_tokenizer_that_adds_a_space() -> None:
    text = make_sentencepiece()
    tokens = tokens_of(text, PromptCompletion(prompt="Which function retu", completion="rns the current directory?"))
    whole = text.tokenizer("Which function returns the current directory?")["input_ids"]
    assert tokens.input_ids.tolist() == [*whole, text.tokenizer.eos_token_id]
    assert "rns the current directory?" in trained_text(text, tokens)


def refusal(text: TextTokenizer, example: Any) -> RowError:
    (row,) = RowTokenizer(text.tokenizer, LossOn.COMPLETIONS, text.end_ids).tokenize([example])
    assert isinstance(row, RowError)
    return row


TWO_TURNS = Conversation(
    messages=[
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "second"},
    ],
    trained=(1, 3),
)


def test_a_template_that_rewrites_earlier_answers_is_refused_with_a_hint() -> None:
    text = make_tokenizer("chatml")
    text.tokenizer.chat_template = REASONING
    problem = refusal(text, TWO_TURNS)
    assert "renders message 1 differently when others follow it" in str(problem)
    assert "--loss-on last" in (problem.hint or "")
    last = Conversation(messages=TWO_TURNS.messages, trained=(3,))
    assert trained_text(text, tokens_of(text, last)) == "<think>\n\n</think>\n\nsecond<|im_end|>"


def test_a_template_that_ends_no_turn_is_refused_with_a_hint() -> None:
    text = make_tokenizer("chatml")
    text.tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    problem = refusal(text, TWO_TURNS)
    assert "ends no turn" in str(problem)
    assert "chatml" in (problem.hint or "")


def test_a_template_whose_prompt_differs_from_the_row_is_refused() -> None:
    text = make_tokenizer("chatml")
    text.tokenizer.chat_template = CHATML_THAT_OPENS_A_THOUGHT
    assert "with a different text than it renders" in str(refusal(text, TWO_TURNS))


CHATML_THAT_OPENS_A_THOUGHT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


PHI = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)


def test_text_after_the_last_turn_is_not_trained() -> None:
    text = make_tokenizer("chatml")
    text.tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    text.tokenizer.chat_template = PHI
    assert trained_text(text, tokens_of(text, TWO_TURNS)) == "first<|end|>second<|end|>"


def test_the_generation_prompt_may_depend_on_the_contents() -> None:
    text = make_tokenizer("chatml")
    text.tokenizer.chat_template = str(CHATML).replace(
        "assistant\n{% endif %}",
        "assistant\n{% if '/no_think' in messages[0].content %}<think></think>{% endif %}{% endif %}",
    )
    asked = Conversation(
        messages=[{"role": "user", "content": "/no_think one"}, {"role": "assistant", "content": "two"}], trained=(1,)
    )
    plain = Conversation(
        messages=[{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}], trained=(1,)
    )
    tokenizer = RowTokenizer(text.tokenizer, LossOn.COMPLETIONS, text.end_ids)
    tokens, problem = tokenizer.tokenize([plain, asked])  # the first row determines the text around the contents
    assert isinstance(tokens, Tokens)
    assert isinstance(problem, RowError)
    assert "with a different text" in str(problem)


@pytest.mark.parametrize(
    ("asks", "is_constant"),
    [
        ("{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}", True),
        ("{%- if add_generation_prompt -%}{{ '<s>' + eos_token }}{%- endif -%}", True),
        ("{% generation %}{% endgeneration %}{% if add_generation_prompt %}a{% endif %}", True),
        ("{% if add_generation_prompt %}{{ messages[0].content }}{% endif %}", False),
        ("{% if add_generation_prompt %}a{% if messages|length > 2 %}b{% endif %}{% endif %}", False),
        ("{% if add_generation_prompt and messages[0].role == 'user' %}a{% endif %}", False),
        ("{{ 'a' if add_generation_prompt else 'b' }}", False),
        ("{% if messages[0].content %}{% if add_generation_prompt %}a{% endif %}{% endif %}", False),
        ("{% if add_generation_prompt %}a{% if enable_thinking is defined %}b{% endif %}{% endif %}", True),
        ("{% set x = messages[0].content %}{% if add_generation_prompt %}{{ x }}{% endif %}", False),
        ("{% broken", False),
    ],
)
def test_a_constant_generation_prompt_is_recognised(asks: str, is_constant: bool) -> None:
    assert has_constant_prompt("{% for m in messages %}{{ m.content }}{% endfor %}" + asks) == is_constant


@pytest.mark.parametrize(
    "template", ["{{ messages[0].content.index('zz') }}", "{{ 1 // 0 }}", "{{ messages[9].role }}"]
)
def test_a_template_that_fails_is_the_fault_of_the_row(template: str) -> None:
    text = make_tokenizer("chatml")
    text.tokenizer.chat_template = template
    assert "the chat template refuses it" in str(refusal(text, TWO_TURNS))


def test_a_template_that_renders_nothing_is_an_error() -> None:
    text = make_tokenizer("chatml")
    text.tokenizer.chat_template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    alone = Conversation(messages=[{"role": "system", "content": " "}], trained=())
    assert "as an empty text" in str(refusal(text, alone))


def test_tools_that_a_template_does_not_write_are_refused() -> None:
    text = TOKENIZERS["chatml"]
    call = {"type": "function", "function": {"name": "add", "arguments": {}}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    assert "does not write tool calls: 'add'" in str(refusal(text, Conversation(messages=messages, trained=(1,))))
    with_tools = Conversation(messages=TWO_TURNS.messages, trained=(1,), tools=[{"function": {"name": "sub"}}])
    assert "does not write tools: 'sub'" in str(refusal(text, with_tools))


def test_control_tokens_in_the_text_are_counted() -> None:
    text = TOKENIZERS["chatml"]
    tokenizer = RowTokenizer(text.tokenizer, LossOn.COMPLETIONS, text.end_ids)
    tokenizer.tokenize([TWO_TURNS, PromptCompletion(prompt="", completion="a <|im_end|> b <|im_end|>")])
    assert tokenizer.num_with_control_tokens == 1
    assert tokenizer.control_tokens == {"<|im_end|>": 2}


@pytest.mark.parametrize(
    ("example", "is_twice"),
    [
        (PromptCompletion(prompt="a", completion="b"), False),
        (PromptCompletion(prompt="a", completion="b<|im_end|>"), False),  # the row's own end is used
        (PromptCompletion(prompt="a", completion="b<|im_end|>\n"), True),
        (PromptCompletion(prompt="a<|im_end|>", completion="b"), False),
        (PromptCompletion(prompt="", completion="<|im_start|>user\na<|im_end|>\n"), True),
        (asked("a", "b<|im_end|> "), True),
        (asked("<|im_end|> a", "b"), False),
    ],
)
def test_a_text_that_already_contains_the_end_token_is_counted(
    example: PromptCompletion | Conversation, is_twice: bool
) -> None:
    text = TOKENIZERS["chatml"]
    tokenizer = RowTokenizer(text.tokenizer, LossOn.COMPLETIONS, text.end_ids)
    (tokens,) = tokenizer.tokenize([example])
    assert isinstance(tokens, Tokens)
    assert tokenizer.num_doubled_ends == is_twice
    end = text.tokenizer.eos_token
    decoded = str(text.tokenizer.decode(tokens.input_ids)).replace(" ", "").replace("\n", "")
    assert (f"{end}{end}" in decoded) == is_twice


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("trims", [True, False])
@given(prompt=TEXT.filter(bool), completion=ANSWER)
@settings(max_examples=40, deadline=None)
def test_a_prompt_has_the_tokens_that_are_served_whatever_the_tokenizer_adds(
    ends: bool, trims: bool, prompt: str, completion: str
) -> None:
    text = _POST_PROCESSED[ends, trims]
    tokens = tokens_of(text, PromptCompletion(prompt=prompt, completion=completion))
    served = text.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if text.tokenizer.eos_token not in prompt + completion:
        assert tokens.input_ids[: len(served)].tolist() == served
        assert trained_text(text, tokens) == completion + str(text.tokenizer.eos_token)


def _with_post_processor(*, ends: bool, trims: bool) -> TextTokenizer:
    """Return a tokenizer that writes EOS after every text, or excludes spaces from the offsets of tokens."""
    text = make_tokenizer("chatml")
    eos, backend = str(text.tokenizer.eos_token), text.tokenizer.backend_tokenizer
    adds = processors.TemplateProcessing(
        single=f"$A {eos}" if ends else "$A", special_tokens=[(eos, backend.token_to_id(eos))]
    )
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=trims), adds])
    return text


_POST_PROCESSED = {
    (ends, trims): _with_post_processor(ends=ends, trims=trims) for ends in (True, False) for trims in (True, False)
}


def test_a_header_that_includes_the_following_space_is_not_trained() -> None:
    text = make_sentencepiece()
    text.tokenizer.add_tokens([AddedToken("<|assistant|>", rstrip=True, special=True)], special_tokens=True)
    text.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{{ m.content }}</s>"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    spaced = Conversation(
        messages=[{"role": "user", "content": "one"}, {"role": "assistant", "content": " two"}], trained=(1,)
    )
    tokens = tokens_of(text, spaced)
    header = text.tokenizer.get_vocab()["<|assistant|>"]
    assert header in tokens.input_ids.tolist()
    assert header not in tokens.labels.tolist()


def test_splitting_a_very_long_text_changes_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    text = TOKENIZERS["llama"]
    example = PromptCompletion(prompt="one two " * 40, completion="Which function returns? " * 60)
    whole = tokens_of(text, example)
    monkeypatch.setattr("qlora_cli.data.tokenizing.tokens.MAX_PIECE_CHARACTERS", 50)
    sliced = tokens_of(text, example)
    assert sliced.input_ids.tolist() == whole.input_ids.tolist()
    assert sliced.labels.tolist() == whole.labels.tolist()


def test_an_unusual_end_of_turn_is_counted() -> None:
    text = TOKENIZERS["gemma"]
    only_eos = frozenset({text.tokenizer.eos_token_id or 0})
    tokenizer = RowTokenizer(text.tokenizer, LossOn.COMPLETIONS, only_eos)
    tokenizer.tokenize([TWO_TURNS])
    assert {text.tokenizer.decode([token]) for token in tokenizer.unusual_ends} == {"<end_of_turn>"}


def test_tool_calls_are_trained_as_they_are_rendered() -> None:
    text = make_tokenizer("chatml")
    text.tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
        "{% for call in message.tool_calls or [] %}{{ call.function.name }}({{ call.function.arguments | tojson }})"
        "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    tokens = tokens_of(text, Conversation(messages=messages, trained=(1,)))
    assert trained_text(text, tokens) == 'add({"a": 1})<|im_end|>'


def test_pretokenized_rows_are_fed_unchanged() -> None:
    text = TOKENIZERS["llama"]
    tokens = tokens_of(
        text,
        Tokenized(input_ids=np.array([5, 6, 7], np.int32), labels=np.array([IGNORE_INDEX, 6, IGNORE_INDEX], np.int32)),
    )
    assert tokens.input_ids.tolist() == [5, 6, 7]
    assert tokens.labels.tolist() == [IGNORE_INDEX, 6, IGNORE_INDEX]
    ids = np.array([1, 10**6], np.int32)
    beyond = Tokenized(input_ids=ids, labels=ids)
    assert "beyond the" in str(refusal(text, beyond))
