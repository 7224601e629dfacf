"""Values under unknown keys of messages, parts and calls, and unknown variables, are rendered or reported."""

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.data.rows.column_formats import recognise
from qlora_cli.data.rows.examples import RowError
from qlora_cli.data.rows.row_reader import RowReader
from qlora_cli.data.tokenizing import row_notes
from qlora_cli.data.tokenizing.tokens import RowTokenizer
from qlora_cli.settings.choices import LossOn
from qlora_cli.settings.models import DataSettings
from tests.chat_templates import tokenizer_with
from tests.support.data.preparing import make_tokenizer, prepare

HELD = "held9q"
WRITES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.arguments %}{{ m.arguments }}{% endif %}"
    "{{ m.meta.deep[0] if m.meta is mapping and m.meta.deep }}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.comment }}{{ c.function.name }} {{ c.function.arguments | tojson }}"
    "</call>{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VALUES: list[Any] = [HELD, [HELD], {"deep": [HELD]}, [{"deep": HELD}], {"deep": [{"er": HELD}]}]
KEYS = ("arguments", "meta", "comment", "text", "input")
# A second text of a part, second arguments of a call.
ARGUMENTS = [(key, place) for key in ("input", "arguments") for place in ("call", "function")]
REFUSED = {("text", "part"), *ARGUMENTS}
PLACES = ("message", "answer", "part", "call", "function")


def row_with(place: str, key: str, value: object) -> dict[str, Any]:
    more = {key: value}
    question = {"type": "text", "text": "q", **(more if place == "part" else {})}
    function = {"name": "f", "arguments": {"x": 1}, **(more if place == "function" else {})}
    call = {"type": "function", **(more if place == "call" else {}), "function": function}
    return {
        "messages": [
            {"role": "user", "content": [question], **(more if place == "message" else {})},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "1"},
            {"role": "assistant", "content": "a", **(more if place == "answer" else {})},
        ]
    }


@pytest.mark.parametrize("template", ["writes", "qwen3", "everything", "qwen2_5"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("key", KEYS)
def test_an_unknown_key_is_rendered_or_reported(template: str, place: str, key: str) -> None:
    text = tokenizer_with("qwen3" if template == "writes" else template)
    if template == "writes":
        text.tokenizer.chat_template = WRITES
    num_read = 0
    for value in VALUES:
        row = row_with(place, key, value)
        settings = DataSettings(dataset=("rows.jsonl",))
        reader = RowReader(recognise(list(row), settings, "rows.jsonl"), LossOn.COMPLETIONS, use_chat=True)
        tokenizer = RowTokenizer(text.tokenizer, LossOn.COMPLETIONS, text.end_ids, accepts_lost=True)
        try:
            (tokens,) = tokenizer.tokenize([reader.read(row)])
        except RowError:
            continue
        if isinstance(tokens, RowError):
            continue
        num_read += 1
        notes = " ".join(row_notes.on_unknown_keys(reader, tokenizer.renderer))
        is_reported = f"{key} (1 row)" in notes
        assert is_reported is (HELD not in text.tokenizer.decode(tokens.input_ids)), (value, notes)
    assert num_read or (key, place) in REFUSED


@pytest.mark.parametrize("column", ["chat_template_kwargs", "apply_chat_template_kwargs"])
def test_a_variable_that_the_chat_template_does_not_read_is_reported(tmp_path: Path, column: str) -> None:
    asked, answer = {"role": "user", "content": "6 times 7?"}, {"role": "assistant", "content": "42"}
    rows: list[dict[str, Any]] = [
        {"messages": [asked, answer], column: {"enable_thinking": True, "enable_thinkng": False}},
        {"messages": [asked, answer], column: json.dumps({"enable_thinkng": True, "effort": "high"})},
    ]
    notes = prepare(tmp_path, make_tokenizer(), rows).notes
    assert "set for the chat template, which does not read them: enable_thinkng (2 rows), effort (1 row)" in notes


def test_a_variable_with_a_default_in_the_chat_template_counts_as_read(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    assert isinstance(tokenizer.chat_template, str)
    tokenizer.chat_template = "{% set effort = effort if effort is defined else 'low' %}" + tokenizer.chat_template
    asked, answer = {"role": "user", "content": "6 times 7?"}, {"role": "assistant", "content": "42"}
    rows: list[dict[str, Any]] = [{"messages": [asked, answer], "chat_template_kwargs": {"effort": "high"}}]
    assert not any("does not read" in note for note in prepare(tmp_path, tokenizer, rows).notes)
    rows = [{"messages": [asked, answer], "enable_thinking": True}]
    tokenizer.chat_template = tokenizer.chat_template.replace("enable_thinking", "thinking")
    assert any("enable_thinking (1 row)" in note for note in prepare(tmp_path, tokenizer, rows).notes)
