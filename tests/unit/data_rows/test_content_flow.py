"""A row is rendered without the template only if that is proven to give the same text."""

import random
from itertools import product
from typing import Any

import pytest

from qlora_cli.data.rendering.content_flow import only_inserts_contents
from qlora_cli.data.rendering.renderer import Renderer
from qlora_cli.data.rows.examples import Conversation, RowError
from qlora_cli.data.tokenizing.encode import TextTokenizer
from qlora_cli.errors import ModelError
from qlora_cli.settings.choices import LossOn
from tests.chat_templates import SHIPPED, TEMPLATES, tokenizer_with
from tests.support.models.chat_tokenizers import FAMILIES, make_tokenizer

EACH = "{{% for message in messages %}}[{{{{ message.role }}}}]{}</s>{{% endfor %}}"
# Contents that templates test, or that look like a part of a template.
CONTENTS = (
    *(
        "text",
        "a",
        "x" * 50,
        " led",
        "trailed \n",
        "\n\n",
        "",
        "\v",
        "\u00a0text\u2003",
        "two\n\nlines",
        "日本語",
        "0",
    ),
    *("None", "{{ bos_token }}", "{% if %}", "%s %d {}", "</s>", "<|im_end|>", "[INST] a [/INST]", "<tool_call>"),
    *("<think>a</think>b", "<b>&amp;</b>", "Mark0Of2", "\x1c\x85text", "user", "Assistant: no"),
)
ROLES = ("system", "user", "assistant", "tool", "developer", "other")

INSERTING = (
    "{{ message.content }}",
    "{{ message['content'] | trim }}",
    "{{ message.get('content').strip() }}",
    "{{- ' ' ~ message.content ~ eos_token -}}",
    "{% set content = message.content %}{% if content is string %}{{ content }}{% endif %}",
    "{% set content = message.content if message.role != 'user' else message.content.rstrip() %}{{ content }}",
    "{% if message.content %}{{ message.content }}{% else %}nothing{% endif %}",
    "{% if 'content' in message and message.content is not none %}{{ message.content }}{% endif %}",
    "{% if not loop.last and loop.nextitem.role == 'user' %}>{% endif %}{{ message.content }}",
    "{% generation %}{{ message.content }}{% endgeneration %}",
    "{{ message.content or '' }}{% set rest = messages[loop.index0:] %}{{ rest | length }}",
    "{{ message.content }}{{ (messages | selectattr('role', 'equalto', 'user') | list)[0].role }}",
    "{% set ns = namespace(seen=0) %}{% set ns.seen = ns.seen + 1 %}{{ message.content }}{{ ns.seen }}",
    "{% macro name(role) %}<{{ role }}>{% endmacro %}{{ name(message.role) }}{{ message.content }}",
    "{{ message.content }}{% for call in message.tool_calls or [] %}{{ call }}{% endfor %}",
)
DECIDING = (
    "{{ message.content | upper }}",
    "{{ message.content | length }}",
    "{{ message.content | tojson }}",
    "{{ message.content | e }}",
    "{{ message.content | trim('a') }}",
    "{{ ('a ' + message.content) | trim }}",
    "{{ message.content.strip('a') }}",
    "{{ message.content[:20] }}",
    "{{ message.content[0] }}",
    "{{ message.content.split('\n')[-1] }}",
    "{{ message.content * 2 }}",
    "{{ '%s' % message.content }}",
    "{{ '{}'.format(message.content) }}",
    "{{ message }}",
    "{{ messages }}",
    "{{ messages | tojson }}",
    "{{ [message.content] }}",
    "{{ [message.content] | join }}",
    "{{ messages | map(attribute='content') | join(' ') }}",
    "{% if 'a' in message.content %}!{% endif %}{{ message.content }}",
    "{% if message.content == 'a' %}!{% endif %}{{ message.content }}",
    "{% if message.content > 'k' %}!{% endif %}{{ message.content }}",
    "{% if message.content is eq 'a' %}!{% endif %}{{ message.content }}",
    "{% if message.content is in ['a'] %}!{% endif %}{{ message.content }}",
    "{% if message.content is lower %}!{% endif %}{{ message.content }}",
    "{% if message == messages[0] %}!{% endif %}{{ message.content }}",
    "{% if message in messages[:1] %}!{% endif %}{{ message.content }}",
    "{% if messages | selectattr('content', 'equalto', 'a') | list %}!{% endif %}{{ message.content }}",
    "{% if loop.changed(message.content) %}!{% endif %}{{ message.content }}",
    "{% if loop.previtem.content == 'a' %}!{% endif %}{{ message.content }}",
    "{% for character in message.content %}{{ character }}.{% endfor %}",
    "{% for key in message %}{{ message[key] }}{% endfor %}",
    "{% for key, value in message.items() %}{{ value }}{% endfor %}",
    "{% for other in messages if other.content != 'a' %}{{ other.role }}{% endfor %}{{ message.content }}",
    "{% set first = messages[0].content %}{% if first == 'a' %}!{% endif %}{{ message.content }}",
    "{% set x = '' %}{% for y in [1] %}{% set x = message.content %}{{ x | length }}{% endfor %}",
    "{% set ns = namespace() %}{% set ns.x = message.content %}{{ ns.x | length }}",
    "{% set ns = namespace(x=message.content) %}{{ ns.x | length }}",
    "{% set a = namespace() %}{% set b = a %}{% set b.x = message.content %}{{ a.x | length }}",
    "{% set a, b = message.content, 1 %}{{ a | length }}",
    "{% set x %}{{ message.content }}{% endset %}{{ x | length }}",
    "{% set x | upper %}{{ message.content }}{% endset %}{{ x }}",
    "{% filter upper %}{{ message.content }}{% endfilter %}",
    "{% macro show() %}{{ messages[0].content }}{% endmacro %}{{ show() | length }}",
    "{% macro show(text) %}{{ text | length }}{% endmacro %}{{ show(message.content) }}",
    "{% macro show(text=messages[0].content) %}{{ text | length }}{% endmacro %}{{ show() }}",
    "{% macro show() %}{{ caller() | length }}{% endmacro %}{% call show() %}{{ message.content }}{% endcall %}",
    "{% with x = message.content %}{{ x | length }}{% endwith %}",
    "{% set around = loop %}{{ around.previtem.content | length }}",
    "{% set loop = message %}{{ '!' if loop.content == 'a' }}",
    "{% set get = message.get %}{{ get('content') | length }}",
    "{{ message['con' ~ 'tent'] | length }}",
    "{{ message.get('con' ~ 'tent') | length }}",
    "{{ message | attr('content') }}",
    "{{ dict(message).content | length }}",
    "{{ (message.role == 'user' and message).content | length }}",
    "{{ {message.content: 1} }}",
    "{{ [1, 2, 3][message.content | length] }}",
    "{{ range(message.content | length) | list }}",
    "{{ (messages + [message])[0].content | length }}",
    "{{ eos_token | default(message.content) | length }}",
    "{{ [1, 2, 3] | random }}{{ message.content }}",
    "{{ lipsum() }}{{ message.content }}",
    "{{ strftime_now('%f') }}{{ message.content }}",
    "{{ (['abc'] | map('random') | list)[0] }}{{ message.content }}",
    # Items are attributes, too.
    "{% if 'x' in message['get']('content') %}!{% endif %}{{ message.content }}",
    "{% if 'x' in message['copy']().content %}!{% endif %}{{ message.content }}",
    "{{ message['values']() | list }}",
    "{% if (messages | first)['get']('content') == 'a' %}!{% endif %}{{ message.content }}",
    "{{ messages['copy']()[0].content | length }}",
    # Characters to trim, by every way to pass them.
    "{{ message.content | trim(chars='a') }}",
    "{{ message.content | trim(*['a']) }}",
    "{{ message.content | trim(**{'chars': 'a'}) }}",
    "{{ message.content.strip(*['a']) }}",
    "{{ message.content.strip(**{}) }}",
    # Text that is marked as safe escapes what is added to it.
    "{{ ('' | safe) + message.content }}",
    "{{ message.content + ('\n' | e) }}",
    "{{ ('<' | escape) + message.content }}",
    "{{ (([''] | map('escape')) | first) + message.content }}",
    "{{ (([''] | map(*['escape'])) | first) + message.content }}",
)
# Templates in which the tags of what the model writes are text, or hide a decision.
HIDDEN = (
    "{% for message in messages %}{{ message.content }}</s>{# #{% generation %}} {% raw %} #}"
    "{% if 'x' in message.content %}!{% endif %}{# {% endraw %} #}{% endfor %}",
    EACH.format(
        "{% set q = '\\{% generation %}' %}{% if \"x\" in message.content %}!{% endif %}' %}{{ message.content }}"
    ),
)
# Contents that touch, and text of the template that looks like a mark or the spaces around it.
MERGED = (
    "{% if messages[0].role == 'system' %}{% set first = messages[0].content | trim %}{% set rest = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}{% if m.role == 'user' %}"
    "[INST]{{ first if loop.first else '' }}{{ m.content }}[/INST]{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
LOOKALIKES = (
    MERGED,
    MERGED.replace("{{ m.content }}[/INST]", "{{ m.content | trim }}[/INST]").replace(
        "content | trim %}", "content %}"
    ),
    EACH.format("{{ message.content.strip() ~ '\x0b' }}"),
    EACH.format("{{ '\x0b\x0c' ~ message.content ~ '\x0c' }}"),
    EACH.format("{% if loop.index0 == 1 %}Mark1Of2{% endif %}{{ message.content }}"),
)


def tokenizer_for(template: str) -> TextTokenizer:
    text = make_tokenizer("chatml")
    text.tokenizer.chat_template = template
    return text


def renderer_of(text: TextTokenizer, loss_on: LossOn) -> Renderer:
    """Return what renders all rows of a data set: it remembers what it has found out about the template."""
    return Renderer(text.tokenizer, loss_on, text.end_ids)


def rendered(renderer: Renderer, messages: list[dict[str, Any]]) -> tuple[object, object]:
    """Return a row rendered by insertion, or None, and rendered by the template, or its error."""
    trained = tuple(index for index, message in enumerate(messages) if message["role"] == "assistant")
    try:
        row = renderer.fit(Conversation(messages=messages, trained=trained))
        inserted = renderer.insert(row)
        return inserted, renderer.render(row, renderer.text(row))
    except (RowError, ModelError) as error:  # ModelError: Jinja compiles some nonsense to invalid Python
        return None, error


def draw_messages(chance: random.Random) -> list[dict[str, Any]]:
    """Return messages of random roles, mostly in their usual order, with contents that templates test."""
    num_turns = chance.randint(1, 3)
    roles = [*chance.sample(("system",), chance.randint(0, 1)), *(["user", "assistant"] * num_turns)]
    if chance.random() < 0.3:
        roles[chance.randrange(len(roles))] = chance.choice(ROLES)
    return [{"role": role, "content": "".join(chance.sample(CONTENTS, chance.randint(1, 2)))} for role in roles]


@pytest.mark.parametrize("part", INSERTING)
def test_a_template_that_inserts_contents_is_proven_to(part: str) -> None:
    assert only_inserts_contents(EACH.format(part))


@pytest.mark.parametrize("part", DECIDING)
def test_a_template_whose_text_depends_on_contents_is_not_proven(part: str) -> None:
    assert not only_inserts_contents(EACH.format(part))


@pytest.mark.parametrize("template", HIDDEN)
def test_the_template_that_jinja_runs_is_analysed(template: str) -> None:
    assert not only_inserts_contents(template)


@pytest.mark.parametrize("template", LOOKALIKES)
def test_contents_that_touch_and_text_like_marks_are_distinguished(template: str) -> None:
    assert only_inserts_contents(template)
    renderer = renderer_of(tokenizer_for(template), LossOn.COMPLETIONS)
    num_inserted = 0
    for system, question in product(("sys", " sys\n\n", "\v"), ("\n\nquestion", "question", "\vquestion\f")):
        messages = [
            {"role": "system", "content": system},
            {"role": "user", "content": question},
            {"role": "assistant", "content": " answer\n"},
        ]
        inserted, expected = rendered(renderer, messages)
        num_inserted += inserted is not None
        assert inserted in (None, expected)
    assert num_inserted > 0


def test_published_templates_that_only_insert_contents_are_proven_to() -> None:
    proven = {name for name, path in SHIPPED.items() if only_inserts_contents(path.read_text(encoding="utf-8"))}
    assert proven == {"gemma", "llama3", "phi3", "phi3_5", "qwen2_5", "qwen3_instruct_2507"}


@pytest.mark.parametrize(("seed", "loss_on"), [(0, LossOn.COMPLETIONS), (1, LossOn.COMPLETIONS), (2, LossOn.ALL)])
def test_inserted_rows_equal_those_that_the_template_renders(seed: int, loss_on: LossOn) -> None:
    chance = random.Random(seed)  # noqa: S311
    texts = {
        **{name: tokenizer_with(name) for name in TEMPLATES},
        **{family: make_tokenizer(family) for family in FAMILIES},
        **{part: tokenizer_for(EACH.format(part)) for part in INSERTING},
    }
    num_inserted = 0
    for name, text in texts.items():
        renderer = renderer_of(text, loss_on)
        for _ in range(5):
            messages = draw_messages(chance)
            inserted, expected = rendered(renderer, messages)
            if inserted is not None:
                num_inserted += 1
                assert inserted == expected, (name, messages)
    assert num_inserted > 60


@pytest.mark.parametrize("seed", range(2))
def test_parts_that_depend_on_contents_are_detected_among_others(seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311
    for _ in range(300):
        parts = chance.sample(INSERTING, chance.randint(1, 3))
        if decides := chance.random() < 0.2:
            parts.insert(chance.randrange(len(parts) + 1), chance.choice(DECIDING))
        assert only_inserts_contents(EACH.format("|".join(parts))) == (not decides), parts


def draw_expression(chance: random.Random, depth: int) -> str:
    """Return an expression of a template that uses contents and messages in any way."""
    if depth == 0:
        leaves = ("message.content", "message['content']", "message", "messages", "message.role", "x", "y", "'a'", "0")
        return chance.choice((*leaves, "loop.index0", "loop.previtem", "eos_token", "none", "message.other"))
    first, second, third = (draw_expression(chance, depth - 1) for _ in range(3))
    name = chance.choice(
        ("trim", "length", "list", "first", "last", "default('a')", "string", "upper", "join", "tojson")
    )
    test = chance.choice(("string", "none", "defined", "mapping", "iterable", "eq('a')", "true"))
    method = chance.choice(
        ("strip()", "lstrip()", "rstrip()", "strip('a')", "get('content')", "get('role')", "upper()")
    )
    return chance.choice(
        (
            *(f"({first}) + ({second})", f"({first}) ~ ({second})", f"({first}) | {name}", f"({first}).{method}"),
            *(f"({first}) is {test}", f"not ({first})", f"({first}) == ({second})", f"({first}) in ({second})"),
            *(f"({first}) and ({second})", f"({first}) or ({second})", f"({first}) if ({second}) else ({third})"),
            *(f"({first})[0]", f"({first})[1:]", f"({first}).content", f"({first})['role']", f"[{first}]"),
        )
    )


@pytest.mark.parametrize("seed", range(3))
def test_expressions_are_never_proven_wrongly(seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311
    num_inserted = 0
    for _ in range(600):
        x, y, shown = (draw_expression(chance, chance.randint(0, 2)) for _ in range(3))
        if "content" not in x + y + shown:
            continue
        part = f"{{% set x = {x} %}}{{% if {y} %}}{{% set y = {shown} %}}{{% endif %}}{{{{ {shown} }}}}"
        template = EACH.format(f"{part}{{{{ message.content if '' == '{chance.choice(('', 'a'))}' }}}}")
        if not only_inserts_contents(template):
            continue
        renderer = renderer_of(tokenizer_for(template), LossOn.COMPLETIONS)
        for _ in range(4):
            messages = draw_messages(chance)
            inserted, expected = rendered(renderer, messages)
            num_inserted += inserted is not None
            assert inserted in (None, expected), (template, messages)
    assert num_inserted > 20
