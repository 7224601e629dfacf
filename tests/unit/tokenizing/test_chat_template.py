"""Chat templates: the tokenizer's own, a named one, a file or a standard one; never a broken or unsuitable one."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qlora_cli.errors import ModelError
from qlora_cli.tokenizing.chat_template import choose_chat_template
from tests.unit.tokenizing.test_tokenizer import END, load, write_tokenizer

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
OWN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
TOOLS = "tools: {{ tools }}" + OWN
TURN_END = "<|im_end|>"
PAD = "<pad>"
RENDERED = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerBase:
    write_tokenizer(tmp_path / "model")
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tmp_path / "model")
    return loaded


def render(tokenizer: PreTrainedTokenizerBase, **options: Any) -> str:
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, **options)
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("own", [None, OWN, {"default": OWN, "tool_use": TOOLS}])
def test_without_a_choice_the_template_of_the_tokenizer_is_used(tokenizer: PreTrainedTokenizerBase, own: Any) -> None:
    tokenizer.chat_template = own
    assert choose_chat_template(tokenizer, None) == []
    assert tokenizer.chat_template == own


def test_a_template_is_chosen_by_name_from_those_saved_with_the_tokenizer(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, chat_template={"default": OWN, "tool_use": TOOLS, "rag": "documents" + OWN})
    assert (tmp_path / "additional_chat_templates" / "rag.jinja").is_file()
    loaded = load(tmp_path, chat_template="rag")
    assert render(loaded.tokenizer) == "documents[user]hi[assistant]yes"
    assert "chat template: the tokenizer's 'rag'" in loaded.notes
    # The template in training is the one served: the saved tokenizer has this one and no other.
    loaded.tokenizer.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == "documents" + OWN


def test_an_unknown_name_lists_the_available_ones(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = {"default": OWN, "rag": OWN}
    with pytest.raises(ModelError, match="no chat template 'tool': the tokenizer has default, rag") as caught:
        choose_chat_template(tokenizer, "tool")
    assert "chatml, default, rag" in str(caught.value.hint)
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="the tokenizer has none"):
        choose_chat_template(tokenizer, "default")


def test_one_of_several_templates_without_a_default_must_be_chosen(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = {"rag": OWN, "tool_use": TOOLS}
    with pytest.raises(ModelError, match="none is the default: rag, tool_use") as caught:
        choose_chat_template(tokenizer, None)
    assert "--chat-template" in str(caught.value.hint)
    choose_chat_template(tokenizer, "rag")
    assert tokenizer.chat_template == OWN


def test_the_only_template_is_used_whatever_its_name(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = {"rag": OWN}
    assert choose_chat_template(tokenizer, None) == ["chat template: the tokenizer's only one, 'rag'"]
    assert render(tokenizer) == "[user]hi[assistant]yes"


@pytest.mark.parametrize("name", ["mine.jinja", "mine.j2", "mine.txt"])
def test_a_file_is_read_and_replaces_the_template(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    path = tmp_path / name
    path.write_text("é" + OWN, encoding="utf-8")
    tokenizer.chat_template = {"default": OWN, "rag": OWN}
    assert choose_chat_template(tokenizer, str(path)) == [f"chat template read from {path}"]
    assert render(tokenizer) == "é[user]hi[assistant]yes"


def test_a_file_may_use_the_extensions_of_transformers_to_jinja(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text(
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}"
    )
    choose_chat_template(tokenizer, str(path))
    assert render(tokenizer) == '{"role": "user", "content": "hi"}'


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"{% for m in messages %}\n{{ m.role }\n{% endfor %}", "line 2: unexpected '}'"),
        (b"{% for m in messages %}\n{{ m }}\n", "line 2: Unexpected end of template"),
        (b"\n\n{{ messages | shout }}", "line 3: No filter named 'shout'"),
        (b"ok\ncaf\xe9", "line 2: not UTF-8"),
        (b" \n", "is empty"),
        (b"{# " + b" " * 2**22 + b"#}", r"is larger than 4\.00 MiB: no chat template"),
    ],
)
def test_a_broken_file_is_named_with_its_line(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, content: bytes, expected: str
) -> None:
    path = tmp_path / "broken.jinja"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=expected) as caught:
        choose_chat_template(tokenizer, str(path))
    assert str(path) in str(caught.value)


def test_a_missing_file_is_not_mistaken_for_a_name(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ModelError, match=r"missing\.jinja can't be read: No such file"):
        choose_chat_template(tokenizer, str(tmp_path / "missing.jinja"))


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir])
def test_a_folder_or_pipe_as_a_template_is_refused_without_waiting(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, make: Callable[[Path], None]
) -> None:
    make(tmp_path / "mine.jinja")
    with pytest.raises(ModelError, match=r"mine\.jinja can't be read: (it is no file|Is a directory)"):
        choose_chat_template(tokenizer, str(tmp_path / "mine.jinja"))


def test_markers_in_a_file_that_the_tokenizer_would_split_are_named(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, tokens=(END, "<|im_start|>", PAD), pad_token=PAD)
    path = tmp_path / "mine.jinja"
    path.write_text("{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}")
    notes = load(tmp_path, chat_template=str(path)).notes
    assert any("writes <|im_end|>, which the tokenizer splits" in note for note in notes)
    whole = load(tmp_path, chat_template=str(path), new_tokens="<|im_end|>")
    assert not any("splits" in note for note in whole.notes)


def test_chatml_renders_as_usual_and_sets_the_eos_token_with_a_note(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, tokens=(END, "<|im_start|>", TURN_END, PAD), pad_token=TURN_END)
    loaded = load(tmp_path, chat_template="chatml")
    tokenizer = loaded.tokenizer
    assert render(tokenizer) == RENDERED
    assert render(tokenizer, add_generation_prompt=True) == RENDERED + "<|im_start|>assistant\n"
    assert tokenizer.eos_token == TURN_END
    assert tokenizer.pad_token == PAD  # no longer the token that ends a text
    assert loaded.notes[0] == "chat template: the standard 'chatml'"
    assert "that is the eos token now, not </s>" in loaded.notes[1]
    with pytest.raises(Exception, match="chatml has no place for tools"):
        render(tokenizer, tools=[{"type": "function", "function": {"name": "f"}}])
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert (render(again), again.eos_token) == (RENDERED, TURN_END)


def test_chatml_needs_its_tokens_which_new_tokens_can_add(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, tokens=(END, "<|im_start|>", PAD))
    with pytest.raises(ModelError, match=r"needs the tokens <\|im_end\|>") as caught:
        load(tmp_path, chat_template="chatml")
    assert "--new-tokens '<|im_end|>'" in str(caught.value.hint)
    loaded = load(tmp_path, chat_template="chatml", new_tokens="<|im_end|>")
    assert loaded.tokenizer.eos_token_id == loaded.new_token_ids[0]
    assert render(loaded.tokenizer) == RENDERED


def test_chatml_begins_with_bos_if_the_tokenizer_does(tokenizer: PreTrainedTokenizerBase) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])
    choose_chat_template(tokenizer, "chatml")
    assert render(tokenizer) == RENDERED
    backend = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    choose_chat_template(tokenizer, "chatml")
    assert render(tokenizer) == "<s>" + RENDERED


def test_a_template_of_the_tokenizer_takes_precedence_over_a_standard_one(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = {"chatml": OWN, "default": TOOLS}
    choose_chat_template(tokenizer, "chatml")
    assert tokenizer.chat_template == OWN
