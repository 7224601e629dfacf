"""A chat template as texts around turns: derived for common ones with the same prompt, else refused."""

import re

import pytest
from transformers import PreTrainedTokenizerBase

from qlora_cli.errors import ModelError
from qlora_cli.merging.exports.go_template import go_template, literal
from qlora_cli.merging.exports.template_turns import SystemPosition, derive_turns, strips_contents, writes_bos
from tests.support.models.chat_tokenizers import CHATML, FAMILIES, REASONING, TRIMS, make_tokenizer

# In the style of common templates, by the family whose tokens they use.
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helper.<|im_end|>\n{% endif %}" + CHATML
)
ALWAYS_A_SYSTEM_TURN = (
    "{{ bos_token }}{% set with_system = messages[0].role == 'system' %}"
    "<|start_header_id|>system<|end_header_id|>\n\nToday: Monday\n\n"
    "{{ messages[0].content if with_system }}<|eot_id|>"
    "{% for message in (messages[1:] if with_system else messages) %}"
    "<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n{{ message.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
BOS_EACH_TURN = (
    "{% set ns = namespace(system='') %}{% for message in messages %}{% if message.role == 'system' %}"
    "{% set ns.system = '<<SYS>>\n' + message.content + '\n<</SYS>>\n\n' %}{% elif message.role == 'user' %}"
    "{{ bos_token }}[INST] {{ ns.system + message.content }} [/INST]{% set ns.system = '' %}"
    "{% else %} {{ message.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
SYSTEM_BEFORE_THE_LAST_USER = (
    "{{ bos_token }}{% set with_system = messages[0].role == 'system' %}"
    "{% for message in (messages[1:] if with_system else messages) %}{% if message.role == 'user' %}"
    "[INST] {% if loop.last and with_system %}{{ messages[0].content }}\n\n{% endif %}{{ message.content }}[/INST]"
    "{% else %} {{ message.content + eos_token }}{% endif %}{% endfor %}"
)
EOS_INSTEAD_OF_A_QUESTION = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
LINES_OF_ITS_OWN = (
    "{% for message in messages %}\n{% if message.role == 'user' %}\n<|user|>\n{{ message.content + eos_token }}\n"
    "{% elif message.role == 'system' %}\n<|system|>\n{{ message.content + eos_token }}\n"
    "{% else %}\n<|assistant|>\n{{ message.content + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n<|assistant|>\n{% endif %}\n{% endfor %}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for message in messages %}<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{{ message.content }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
SYSTEM_LEFT_OUT = (
    "{% for message in messages %}{% if message.role == 'user' %}<|user|>{{ message.content }}<|assistant|>"
    "{% elif message.role == 'assistant' %}{{ message.content }}<|end|>{% endif %}{% endfor %}"
)
THINKING = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")
AWKWARD = (
    "{% for message in messages %}\u00a0\"\"\"{{ '{{' }}{{ message.role }} }}\t{\n{{ '{' }}{{ message.content }}"
    "{{ '\"\"\"\"' }}\n{% endfor %}{% if add_generation_prompt %}{{ '{{ answer' }} {% endif %}"
)
TEMPLATES = {
    "chatml": ("chatml", CHATML, SystemPosition.OWN_TURN),
    "llama": ("llama", FAMILIES["llama"][0], SystemPosition.OWN_TURN),
    "gemma": ("gemma", FAMILIES["gemma"][0], SystemPosition.FIRST_USER),
    "mistral": ("mistral", FAMILIES["mistral"][0], SystemPosition.FIRST_USER),
    "default system": ("chatml", DEFAULT_SYSTEM, SystemPosition.OWN_TURN),
    "always a system turn": ("llama", ALWAYS_A_SYSTEM_TURN, SystemPosition.OWN_TURN),
    "bos each turn": ("mistral", BOS_EACH_TURN, SystemPosition.FIRST_USER),
    "system before the last user": ("mistral", SYSTEM_BEFORE_THE_LAST_USER, SystemPosition.LAST_USER),
    "eos instead of a question": ("chatml", EOS_INSTEAD_OF_A_QUESTION, SystemPosition.OWN_TURN),
    "lines of its own": ("mistral", LINES_OF_ITS_OWN, SystemPosition.OWN_TURN),
    "no system": ("gemma", NO_SYSTEM, SystemPosition.NOWHERE),
    "system left out": ("chatml", SYSTEM_LEFT_OUT, SystemPosition.NOWHERE),
    "thinking": ("chatml", THINKING, SystemPosition.OWN_TURN),
    "reasoning in the last answer": ("chatml", REASONING, SystemPosition.OWN_TURN),
    "awkward": ("chatml", AWKWARD, SystemPosition.OWN_TURN),
}
SYSTEM = ("system", "Be brief.")
QUESTION = ("user", "What is «2 + 2»?\nShow it.")
ANSWER = ("assistant", "4")
CONVERSATIONS = ([QUESTION], [QUESTION, ANSWER, ("user", "Why?")], [QUESTION, ANSWER, QUESTION, ANSWER, QUESTION])


def tokenizer_with(family: str, template: str) -> PreTrainedTokenizerBase:
    tokenizer = make_tokenizer(family).tokenizer
    tokenizer.chat_template = template
    return tokenizer


def by_jinja(tokenizer: PreTrainedTokenizerBase, messages: list[tuple[str, str]]) -> str:
    asked = [{"role": role, "content": content} for role, content in messages]
    return str(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))


@pytest.mark.parametrize("drops_bos", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_turns_make_the_prompts_that_the_template_makes(name: str, drops_bos: bool) -> None:
    family, template, place = TEMPLATES[name]
    tokenizer = tokenizer_with(family, template)
    turns = derive_turns(tokenizer, drops_bos=drops_bos)
    assert turns.system_position == place
    for conversation in CONVERSATIONS:
        assert turns.render(conversation) == by_jinja(tokenizer, conversation)
        if place != SystemPosition.NOWHERE:
            with_system = [SYSTEM, *conversation]
            assert turns.render(with_system) == by_jinja(tokenizer, with_system)


@pytest.mark.parametrize("family", ["llama", "gemma", "mistral"])
def test_bos_is_the_opening_of_a_conversation(family: str) -> None:
    tokenizer = make_tokenizer(family).tokenizer
    assert derive_turns(tokenizer, drops_bos=True).opening == tokenizer.bos_token
    assert writes_bos(tokenizer)


def test_bos_that_begins_each_turn_is_dropped_before_the_first_only() -> None:
    tokenizer = tokenizer_with("mistral", BOS_EACH_TURN)
    turns = derive_turns(tokenizer, drops_bos=True)
    assert turns.opening == "<s>"
    assert turns.render(CONVERSATIONS[1]).count("<s>") == 2
    assert derive_turns(tokenizer, drops_bos=False).opening == ""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_template_that_trims_contents_is_detected(family: str) -> None:
    tokenizer = make_tokenizer(family).tokenizer
    assert strips_contents(tokenizer, derive_turns(tokenizer, drops_bos=True)) == (family in TRIMS)


REFUSED = {
    "it changes contents": "{% for m in messages %}<{{ m.role }}>{{ m.content | upper }}{% endfor %}",
    "it writes one twice": "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ m.content }}{% endfor %}",
    "it counts": "{% for m in messages %}<{{ loop.index }} {{ m.role }}>{{ m.content }}{% endfor %}",
    "it looks at contents": "{% for m in messages %}{{ m.content }}{{ m.role if m.content == 'a' }}{% endfor %}",
    "it refuses answers": "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('no') }}{% endif %}"
    "{{ m.content }}{% endfor %}",
    "it is wrong": "{% for m in messages %}{{ m.content + 1 }}{% endfor %}",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_writes_anything_else_is_an_error_with_a_hint(name: str) -> None:
    tokenizer = tokenizer_with("chatml", REFUSED[name])
    with pytest.raises(ModelError, match="can't be written as Ollama's TEMPLATE") as caught:
        derive_turns(tokenizer, drops_bos=False)
    assert "by hand" in str(caught.value.hint)


# In Go's language. Ollama's own parser and engine render these texts to what the templates render to.

GO = {
    "chatml": '{{ range $i, $_ := .Messages }}{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
    '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n<|im_start|>assistant\n'
    '{{ else if eq .Role "assistant" }}{{ .Content }}{{ if not (eq (len (slice $.Messages $i)) 1) }}<|im_end|>\n'
    "{{ end }}{{ end }}{{ end }}",
    "default system": '{{ range $i, $_ := .Messages }}{{ if and (eq $i 0) (ne .Role "system") }}<|im_start|>system\n'
    'You are a helper.<|im_end|>\n{{ end }}{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
    '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n<|im_start|>assistant\n'
    '{{ else if eq .Role "assistant" }}{{ .Content }}{{ if not (eq (len (slice $.Messages $i)) 1) }}<|im_end|>\n'
    "{{ end }}{{ end }}{{ end }}",
    "gemma": '<bos>{{ range $i, $_ := .Messages }}{{ if eq .Role "system" }}<start_of_turn>user\n{{ .Content }}\n\n'
    '{{ else if eq .Role "user" }}{{ if not (and (eq $i 1) (eq (index $.Messages 0).Role "system")) }}'
    "<start_of_turn>user\n{{ end }}{{ .Content }}<end_of_turn>\n<start_of_turn>model\n"
    '{{ else if eq .Role "assistant" }}{{ .Content }}{{ if not (eq (len (slice $.Messages $i)) 1) }}<end_of_turn>\n'
    "{{ end }}{{ end }}{{ end }}",
    "system before the last user": '<s>{{ range $i, $_ := .Messages }}{{ if eq .Role "user" }}[INST] '
    '{{ if and (eq (len (slice $.Messages $i)) 1) (eq (index $.Messages 0).Role "system") }}'
    "{{ (index $.Messages 0).Content }}\n\n{{ end }}{{ .Content }}[/INST]"
    '{{ else if eq .Role "assistant" }} {{ .Content }}{{ if not (eq (len (slice $.Messages $i)) 1) }}</s>{{ end }}'
    "{{ end }}{{ end }}",
    "thinking": '{{ range $i, $_ := .Messages }}{{ if eq .Role "system" }}<|im_start|>system\n'
    "{{ .Content }}<|im_end|>\n"
    '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n<|im_start|>assistant\n'
    "{{ if (eq (len (slice $.Messages $i)) 1) }}<think>\n{{ end }}"
    '{{ else if eq .Role "assistant" }}{{ .Content }}{{ if not (eq (len (slice $.Messages $i)) 1) }}<|im_end|>\n'
    "{{ end }}{{ end }}{{ end }}",
}


@pytest.mark.parametrize("name", GO)
def test_the_turns_are_written_in_go(name: str) -> None:
    family, template, _ = TEMPLATES[name]
    assert go_template(derive_turns(tokenizer_with(family, template), drops_bos=True)) == GO[name]


@pytest.mark.parametrize("text", ["{{", "a{", 'say """', "no\u00a0break", "tab\there", "zero\u200bwidth", "{{{{ }}"])
def test_what_go_or_a_modelfile_would_misread_is_written_by_number(text: str) -> None:
    written = literal(text)
    actions = re.findall(r'\{\{ "((?:\\U[0-9a-f]{8})+)" \}\}', written)
    plain = re.sub(r'\{\{ "(?:\\U[0-9a-f]{8})+" \}\}', "", written)
    assert actions
    assert plain.isprintable()
    assert "{{" not in plain
    assert '"""' not in written
    numbers = re.sub(r'\{\{ "((?:\\U[0-9a-f]{8})+)" \}\}', lambda match: match[1], written)
    assert re.sub(r"\\U([0-9a-f]{8})", lambda match: chr(int(match[1], 16)), numbers) == text


def test_other_text_and_line_breaks_are_unchanged() -> None:
    text = "<|im_start|>Größe 日本語 ▁ \"quoted\" 'and' {one} brace }}\n\n  next  \n"
    assert literal(text) == text
