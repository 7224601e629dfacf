"""Tokenizer, chat template and added tokens, each from where it is stored; differences from the base are noted."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.errors import ModelError
from qlora_cli.model_files.given_model import has_vocabulary
from qlora_cli.model_files.source import ModelSource
from qlora_cli.settings.models import ModelSettings
from qlora_cli.tokenizing.tokenizer import LoadedTokenizer, load_tokenizer
from qlora_cli.tokenizing.tokenizer_files import faulty_config
from tests.unit.tokenizing.test_tokenizer import END, PAD, TURN, write_tokenizer

OF_BASE, OF_ADAPTER = "{{ 'base' }}", "{{ 'adapter' }}"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    directory = tmp_path / "base"
    num_ids = write_tokenizer(directory, tokens=(END, PAD), pad_token=PAD)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": num_ids + 8}))
    return directory


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    directory = tmp_path / "adapter"
    directory.mkdir()
    return directory


def load(base: Path, adapter: Path | None = None, **settings: Any) -> LoadedTokenizer:
    tokenizer_path = adapter if adapter is not None and has_vocabulary(adapter) else base
    source = ModelSource(name="tiny", path=base, base_name="tiny", adapter=adapter, tokenizer_path=tokenizer_path)
    return load_tokenizer(source, ModelSettings(name="tiny", **settings))


def put_template(directory: Path, text: str, how: str) -> None:
    if how == "jinja":
        (directory / "chat_template.jinja").write_text(text)
    elif how == "json":
        (directory / "chat_template.json").write_text(json.dumps({"chat_template": text}))
    elif how == "named":
        (directory / "additional_chat_templates").mkdir()
        (directory / "additional_chat_templates" / "default.jinja").write_text(text)
    else:
        file = directory / "tokenizer_config.json"
        content = json.loads(file.read_text()) if file.is_file() else {}
        file.write_text(json.dumps({**content, "chat_template": text}))


HOW = ["jinja", "json", "named", "config"]


@pytest.mark.parametrize("how", HOW)
def test_a_template_next_to_a_base_is_used_from_any_file(base: Path, how: str) -> None:
    put_template(base, OF_BASE, how)
    loaded = load(base)
    assert loaded.tokenizer.chat_template == OF_BASE
    assert [str(base / "chat_template.json") in note for note in loaded.notes] == ([True] if how == "json" else [])


@pytest.mark.parametrize("of_base", [*HOW, None])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("has_tokenizer", [True, False], ids=["with a tokenizer", "alone"])
def test_a_template_next_to_an_adapter_overrides_that_of_the_base_with_a_note(
    base: Path, adapter: Path, how: str, of_base: str | None, has_tokenizer: bool
) -> None:
    if of_base is not None:
        put_template(base, OF_BASE, of_base)
    if has_tokenizer:
        write_tokenizer(adapter, tokens=(END, PAD), pad_token=PAD)
    put_template(adapter, OF_ADAPTER, how)
    loaded = load(base, adapter)
    assert loaded.tokenizer.chat_template == OF_ADAPTER
    (note,) = loaded.notes
    assert note.startswith(f"chat template: the adapter's ({adapter}")
    assert note.endswith("the base has none" if of_base is None else "not that of the base")


@pytest.mark.parametrize("of_base", HOW)
def test_an_adapters_tokenizer_without_a_template_uses_that_of_the_base_with_a_note(
    base: Path, adapter: Path, of_base: str
) -> None:
    put_template(base, OF_BASE, of_base)
    write_tokenizer(adapter, tokens=(END, PAD), pad_token=PAD)
    loaded = load(base, adapter)
    assert loaded.tokenizer.chat_template == OF_BASE
    (note,) = loaded.notes
    assert note.startswith("chat template: that of the base (")
    assert note.endswith("the adapter's tokenizer has none")


@pytest.mark.parametrize("how", ["jinja", "config"])
def test_no_note_is_reported_if_adapter_and_base_agree(base: Path, adapter: Path, how: str) -> None:
    put_template(base, OF_BASE, "jinja")
    assert load(base, adapter).notes == ()  # the adapter has no tokenizer file
    write_tokenizer(adapter, tokens=(END, PAD), pad_token=PAD)
    put_template(adapter, OF_BASE, how)
    assert load(base, adapter).notes == ()


def test_a_chosen_template_overrides_others_and_is_noted(base: Path, adapter: Path) -> None:
    put_template(base, OF_BASE, "jinja")
    put_template(adapter, OF_ADAPTER, "jinja")
    (base / "own.jinja").write_text("{{ 'own' }}")
    loaded = load(base, adapter, chat_template=str(base / "own.jinja"))
    assert loaded.tokenizer.chat_template == "{{ 'own' }}"
    assert loaded.notes == (f"chat template read from {base / 'own.jinja'}",)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("place", ["base", "adapter"])
def test_an_invalid_template_is_named_with_file_and_line_unless_another_is_requested(
    base: Path, adapter: Path, place: str, how: str
) -> None:
    put_template({"base": base, "adapter": adapter}[place], "{% if messages %}\n{{ messages }", how)
    file = {"jinja": "chat_template.jinja", "json": "chat_template.json, chat_template 'default'"}
    file |= {"named": "default.jinja", "config": "tokenizer_config.json, chat_template 'default'"}
    with pytest.raises(ModelError, match=rf"/{place}/.*{re.escape(file[how])}, line 2: unexpected '}}'"):
        load(base, adapter)
    loaded = load(base, adapter, chat_template="chatml", new_tokens=("<|im_start|>", "<|im_end|>"))
    assert "im_start" in str(loaded.tokenizer.chat_template)


def test_a_broken_template_chosen_by_name_is_named(base: Path) -> None:
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "terse.jinja").write_text("{{ messages }")
    with pytest.raises(ModelError, match="the tokenizer's chat template 'terse', line 1: unexpected '}'"):
        load(base, chat_template="terse")


def test_several_templates_of_an_adapter_are_combined(base: Path, adapter: Path) -> None:
    put_template(adapter, OF_ADAPTER, "jinja")
    put_template(adapter, "{{ 'tools' }}", "named")
    (adapter / "additional_chat_templates" / "default.jinja").rename(
        adapter / "additional_chat_templates" / "tool_use.jinja"
    )
    assert load(base, adapter).tokenizer.chat_template == {"default": OF_ADAPTER, "tool_use": "{{ 'tools' }}"}


def test_special_tokens_next_to_an_adapter_extend_the_tokenizer_of_the_base(base: Path, adapter: Path) -> None:
    config = base / "tokenizer_config.json"
    decoder = {"1": {"content": PAD, "special": True, "lstrip": False, "rstrip": False, "normalized": False}}
    config.write_text(json.dumps({**json.loads(config.read_text()), "added_tokens_decoder": decoder}))
    assert load(base, adapter).tokenizer.eos_token == END
    (adapter / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": PAD}, "pad_token": END}))
    tokenizer = load(base, adapter).tokenizer
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == (PAD, 1)
    assert tokenizer.name_or_path == str(base)
    tokenizer.save_pretrained(adapter / "saved")
    assert load(adapter / "saved").tokenizer.eos_token == PAD


def test_a_config_next_to_an_adapter_is_used_with_the_vocabulary_of_the_base(base: Path, adapter: Path) -> None:
    values = json.loads((base / "tokenizer_config.json").read_text())
    (adapter / "tokenizer_config.json").write_text(json.dumps({**values, "eos_token": PAD, "pad_token": None}))
    loaded = load(base, adapter)
    assert loaded.tokenizer.eos_token == PAD
    assert loaded.tokenizer.get_vocab() == load(base).tokenizer.get_vocab()


def test_a_vocabulary_next_to_an_adapter_is_used_with_the_config_of_the_base(base: Path, adapter: Path) -> None:
    write_tokenizer(adapter, tokens=(END, PAD, TURN))
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        (adapter / file).unlink(missing_ok=True)
    loaded = load(base, adapter)
    assert loaded.tokenizer.eos_token == END
    assert loaded.tokenizer.convert_tokens_to_ids(TURN) == 2
    assert any("1 token more than the base: '<turn>' (id 2)" in note for note in loaded.notes)


@pytest.mark.parametrize("place", ["base", "adapter"])
@pytest.mark.parametrize("is_older", [True, False], ids=["a config of its age", "a newer config"])
def test_added_tokens_are_added_under_their_ids(base: Path, adapter: Path, place: str, is_older: bool) -> None:
    size = len(load(base).tokenizer.get_vocab())
    if not is_older:  # transformers reads no added_tokens.json next to such a config
        config = base / "tokenizer_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "added_tokens_decoder": {}}))
    added = {"<second>": size + 1, "<first>": size, END: 0}
    ({"base": base, "adapter": adapter}[place] / "added_tokens.json").write_text(json.dumps(added))
    loaded = load(base, adapter)
    assert loaded.tokenizer.convert_tokens_to_ids(["<first>", "<second>"]) == [size, size + 1]
    assert loaded.tokenizer("<first>")["input_ids"] == [size]
    if place == "adapter":
        note_end = f"added_tokens.json adds 2 tokens: '<first>' (id {size}), '<second>' (id {size + 1})"
        assert [note.endswith(note_end) for note in loaded.notes] == [True]


def test_added_tokens_without_a_valid_id_are_skipped_with_a_note(base: Path, adapter: Path) -> None:
    (adapter / "added_tokens.json").write_text(json.dumps({"<far>": 100_000}))
    loaded = load(base, adapter)
    assert "<far>" not in loaded.tokenizer.get_vocab()
    assert loaded.notes[0].endswith("1 token whose id does not follow the last one: '<far>' (id 100000); skipped")


def list_tokens(directory: Path, **ids: Any) -> None:
    """Write an added_tokens.json next to a config with which transformers does not read it."""
    (directory / "added_tokens.json").write_text(json.dumps({f"<{name}>": number for name, number in ids.items()}))
    config = directory / "tokenizer_config.json"
    if config.is_file():
        config.write_text(json.dumps({**json.loads(config.read_text()), "added_tokens_decoder": {}}))


def set_rows(base: Path, rows: int | None) -> int:
    """Give the embedding `rows` more rows than the tokenizer has ids, or no size if None; return the number of ids."""
    size = len(load(base).tokenizer.get_vocab())
    sizes = {} if rows is None else {"vocab_size": size + rows}
    (base / "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    return size


@pytest.mark.parametrize("rows", [0, 1, None])
@pytest.mark.parametrize("has_adapter", [True, False], ids=["with an adapter", "alone"])
def test_only_tokens_with_a_row_are_added_from_a_stale_list_next_to_the_base(
    base: Path, adapter: Path, rows: int | None, has_adapter: bool
) -> None:
    size = set_rows(base, rows)
    list_tokens(base, first=size, second=size + 1)
    loaded = load(base, adapter if has_adapter else None)
    tokens = ["<first>", "<second>"]
    added = tokens[: rows or 0]
    assert [token for token in tokens if token in loaded.tokenizer.get_vocab()] == added
    limit = size + rows if rows is not None else 0
    assert any(
        f"beyond the {limit:,} rows of the embedding: {tokens[len(added)]!r}" in note and note.endswith("; skipped")
        for note in loaded.notes
    )
    grown = load(base, adapter if has_adapter else None, resize_vocab=True)
    assert grown.tokenizer.convert_tokens_to_ids(tokens) == [size, size + 1]


def test_an_adapter_with_its_own_vocabulary_gets_no_listed_token_of_the_base(base: Path, adapter: Path) -> None:
    size = set_rows(base, 8)
    list_tokens(base, theirs=size)
    write_tokenizer(adapter, tokens=(END, PAD), pad_token=PAD)
    loaded = load(base, adapter)
    assert "<theirs>" not in loaded.tokenizer.get_vocab()
    assert loaded.notes == (f"the adapter's tokenizer lacks 1 token of the base: '<theirs>' (id {size})",)


def test_ids_listed_by_an_adapter_take_precedence_over_those_of_the_base(base: Path, adapter: Path) -> None:
    size = set_rows(base, 8)
    list_tokens(base, theirs=size, both=size + 2)
    list_tokens(adapter, ours=size, both=size + 1)
    loaded = load(base, adapter)
    assert loaded.tokenizer.convert_tokens_to_ids(["<ours>", "<both>"]) == [size, size + 1]
    assert any("whose id is given to another token: '<theirs>'" in note for note in loaded.notes)


def test_the_list_of_an_adapter_may_continue_that_of_the_base(base: Path, adapter: Path) -> None:
    size = set_rows(base, 1)
    list_tokens(base, theirs=size)
    list_tokens(adapter, ours=size + 1)
    assert load(base, adapter).tokenizer.convert_tokens_to_ids(["<theirs>", "<ours>"]) == [size, size + 1]


def test_tokens_listed_by_the_base_count_when_an_adapter_is_compared_with_it(base: Path, adapter: Path) -> None:
    size = set_rows(base, 8)
    list_tokens(base, theirs=size)
    load(base).tokenizer.save_pretrained(adapter)
    assert load(base, adapter).notes == ()


def test_no_token_is_added_under_an_id_that_the_library_would_not_assign(base: Path, adapter: Path) -> None:
    file = base / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    largest = vocabulary["z"] = max(vocabulary.values()) + 50  # a gap before it
    file.write_text(json.dumps(content))
    list_tokens(adapter, next=largest + 1)
    loaded = load(base, adapter)
    assert "<next>" not in loaded.tokenizer.get_vocab()
    assert "whose id does not follow the last one: '<next>'" in loaded.notes[0]


@pytest.mark.parametrize("number", [None, "3", 1.5, True, [7]])
def test_an_invalid_id_is_skipped_with_a_note(base: Path, adapter: Path, number: object) -> None:
    list_tokens(adapter, odd=number)
    (note,) = load(base, adapter).notes
    assert note.endswith(f"whose id is not a whole number: '<odd>' (id {json.dumps(number)}); skipped")


def test_a_token_that_the_tokenizer_rejects_is_not_reported_as_added(base: Path, adapter: Path) -> None:
    size = len(load(base).tokenizer.get_vocab())
    (adapter / "added_tokens.json").write_text(json.dumps({"": size}))
    loaded = load(base, adapter)
    assert len(loaded.tokenizer.get_vocab()) == size
    (note,) = loaded.notes
    assert note.endswith(f"names 1 token that can't be added: '' (id {size}); skipped")


def test_tokens_gained_lost_and_moved_are_noted(base: Path, adapter: Path) -> None:
    write_tokenizer(adapter, tokens=(END, TURN, "<new>"), pad_token=TURN)
    notes = load(base, adapter).notes
    assert "the adapter's tokenizer has 2 tokens more than the base: '<turn>' (id 1), '<new>' (id 2)" in notes
    assert f"the adapter's tokenizer lacks 1 token of the base: '{PAD}' (id 1)" in notes
    assert any(note.startswith("the adapter's tokenizer has 257 tokens with another id") for note in notes)
    assert all(len(note) < 200 for note in notes)


def test_a_base_without_a_tokenizer_is_noted(base: Path, adapter: Path) -> None:
    write_tokenizer(adapter)
    for path in base.glob("*token*"):
        path.unlink()
    assert "the tokenizer is the adapter's; the base has none" in load(base, adapter).notes


def test_a_template_that_is_not_text_is_named(base: Path, adapter: Path) -> None:
    (adapter / "chat_template.jinja").write_bytes(b"line\n\xff")
    with pytest.raises(ModelError, match=r"adapter/chat_template\.jinja, line 2: not UTF-8"):
        load(base, adapter)


@pytest.mark.parametrize("file", ["chat_template.json", "added_tokens.json", "special_tokens_map.json"])
def test_a_damaged_file_next_to_an_adapter_is_named(base: Path, adapter: Path, file: str) -> None:
    (adapter / file).write_text("{")
    with pytest.raises(ModelError) as caught:
        load(base, adapter)
    assert f"{adapter / file} can't be read as JSON" in caught.value.message


def test_the_assembled_directory_is_removed(base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = adapter.parent / "temporary"
    places.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(places))
    shutil.copy(base / "tokenizer_config.json", adapter)
    load(base, adapter)
    assert list(places.iterdir()) == []


BROKEN: dict[str, list[tuple[str, object]]] = {
    "special_tokens_map.json": [("additional_special_tokens", "x"), ("mask_token", {"content": 5})],
    "tokenizer_config.json": [
        *[("extra_special_tokens", "x"), ("eos_token", 5), ("added_tokens_decoder", 3)],
        # These keys are first used on a text, in a batch, and when the tokenizer is saved.
        *[("model_max_length", "x"), ("model_max_length", [5]), ("model_input_names", ["a"]), ("legacy", "\ud800")],
    ],
}


@pytest.mark.parametrize("has_both", [True, False], ids=["next to a good one", "alone"])
@pytest.mark.parametrize("place", ["base", "adapter"])
@pytest.mark.parametrize(
    ("file", "key", "value"), [(file, key, value) for file, pairs in BROKEN.items() for key, value in pairs]
)
def test_the_file_and_key_that_break_a_tokenizer_are_named(
    base: Path, adapter: Path, place: str, file: str, key: str, value: object, has_both: bool
) -> None:
    faulty = {"base": base, "adapter": adapter}[place]
    if has_both:
        (faulty / "special_tokens_map.json").write_text(json.dumps({"eos_token": END, "pad_token": PAD}))
        (faulty / "added_tokens.json").write_text(json.dumps({END: 0}))
    content = json.loads((faulty / file).read_text()) if (faulty / file).is_file() else {}
    (faulty / file).write_text(json.dumps({**content, key: value}))
    if (key, has_both, file) == ("eos_token", True, "tokenizer_config.json"):
        assert load(base, adapter).tokenizer.eos_token == END  # that of the map takes precedence
        return
    with pytest.raises(ModelError) as caught:
        load(base, adapter)
    assert caught.value.message.startswith(
        f"{faulty / file} is not a valid tokenizer file: {key} is {json.dumps(value, ensure_ascii=False)}: "
    )
    assert file in str(caught.value.hint)


@pytest.mark.parametrize("reference", ["./model--evil.X", "owner/model--evil.X", "evil.X"])
def test_the_search_for_a_faulty_key_does_not_prompt_to_run_code(
    base: Path, monkeypatch: pytest.MonkeyPatch, reference: str
) -> None:
    asked: list[str] = []

    def answer(prompt: str = "") -> str:
        asked.append(prompt)
        return "y"

    monkeypatch.setattr("builtins.input", answer)
    file = base / "tokenizer_config.json"
    code = {"auto_map": {"AutoTokenizer": [reference, reference]}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **code, "split_special_tokens": "q"}))
    ran = base.parent / "ran"
    for place in (base, base.parent / "model"):
        place.mkdir(exist_ok=True)
        (place / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass X: pass\n")
    monkeypatch.chdir(base.parent)
    with pytest.raises(ModelError):
        load(base)
    assert not asked
    assert not ran.exists()


def test_an_error_from_elsewhere_is_not_blamed_on_a_file(base: Path, adapter: Path) -> None:
    source = ModelSource(name="tiny", path=base, base_name="tiny", adapter=adapter, tokenizer_path=base)
    assert faulty_config(source, ValueError("eos_token"), trust_remote_code=False) is None


@pytest.mark.parametrize("file", ["special_tokens_map.json", "tokenizer_config.json"])
@pytest.mark.parametrize("role", ["pad_token", "eos_token", "bos_token", "unk_token", "mask_token"])
def test_a_special_token_changed_by_an_adapter_is_noted(base: Path, adapter: Path, file: str, role: str) -> None:
    before = load(base).tokenizer.special_tokens_map.get(role)
    (adapter / file).write_text(json.dumps({role: TURN}))
    loaded = load(base, adapter)
    assert loaded.tokenizer.special_tokens_map[role] == TURN
    changed = f"{role} is '{TURN}', not {'none' if before is None else repr(before)}"
    assert [changed in note and f"by the adapter's {file}, has other special" in note for note in loaded.notes].count(
        True
    ) == 1


def test_equal_special_tokens_are_not_noted(base: Path, adapter: Path) -> None:
    (adapter / "special_tokens_map.json").write_text(json.dumps(load(base).tokenizer.special_tokens_map))
    assert not load(base, adapter).notes
