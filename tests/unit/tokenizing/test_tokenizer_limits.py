"""A tokenizer.json that takes too much memory, or makes the library panic, is an error that names it."""

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.data.rows.examples import PromptCompletion
from qlora_cli.data.tokenizing.tokens import RowTokenizer
from qlora_cli.errors import ModelError
from qlora_cli.settings.choices import LossOn
from qlora_cli.tokenizing.tokenizer import LoadedTokenizer
from tests.unit.tokenizing.test_tokenizer import load, write_tokenizer

KNOWN = {"text": 0, "a": 1, "b": 2, "Ġb": 3}  # tried before a row is read
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}


def replaced(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


def sequence(*normalizers: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(normalizers)}


def change(directory: Path, **steps: Any) -> None:
    """Write a tokenizer whose tokenizer.json has `steps` in it."""
    write_tokenizer(directory)
    path = directory / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | steps))


def template(*, times: int) -> dict[str, Any]:
    pieces = [{"Sequence": {"id": "A", "type_id": 0}}] * times
    return {"type": "TemplateProcessing", "single": pieces, "pair": [], "special_tokens": {}}


def encode(loaded: LoadedTokenizer, text: str) -> None:
    tokenizer = RowTokenizer(loaded.tokenizer, LossOn.ALL, loaded.end_ids)
    tokenizer.encode(tokenizer.render([PromptCompletion(prompt="", completion=text)]))


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ({"normalizer": replaced("e", "x" * 65)}, "a character of a text may become more than 64"),
        ({"normalizer": sequence(*[replaced("e", "e" * 5)] * 3)}, "a character of a text may become more than 64"),
        (
            {"normalizer": sequence(*[{**replaced("", "e" * 5), "pattern": {"Regex": "[a-e]"}}] * 3)},
            "a character of a text may become more than 64",
        ),
        (
            {"normalizer": sequence(replaced("a", "b" * 9), replaced("b", "c" * 9))},
            "a character of a text may become more than 64",
        ),
        ({"decoder": replaced("e", "x" * 65)}, "a character of a text may become more than 64"),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}] * 7}},
            "a character of a text may become more than 64",
        ),
        ({"normalizer": sequence(*[{"type": "NFC"}] * 101)}, "normalizer has 102 parts, more than 100"),
        (
            {"pre_tokenizer": {**SPLIT, "pattern": {"Regex": "a" * 10_001}}},
            "pre_tokenizer has a Regex of 10,001 characters",
        ),
        (
            {"decoder": {"type": "Strip", "content": "a", "start": 10**9, "stop": 0}},
            "decoder has a start of 1000000000",
        ),
        ({"padding": {"strategy": {"Fixed": 10**9}}}, "padding has a Fixed of 1000000000"),
        ({"post_processor": template(times=65)}, "post_processor repeats a text 65 times"),
        (
            {"post_processor": {"type": "Sequence", "processors": [template(times=9)] * 3}},
            "post_processor repeats a text 729 times",
        ),
        ({"post_processor": template(times=10_001)}, "post_processor lists 10,001 values under single"),
        ({"added_tokens": [{"id": 3 * 10**9, "content": "z"}]}, "the id of 'z' is 3000000000"),
        ({"model": {"type": "BPE", "merges": [], "vocab": {"z": 3 * 10**9}}}, "the id of 'z' is 3000000000"),
    ],
)
def test_a_file_that_takes_too_much_memory_is_refused_before_it_is_built(
    tmp_path: Path, steps: dict[str, Any], expected: str
) -> None:
    change(tmp_path, **steps)
    with pytest.raises(ModelError) as caught:
        load(tmp_path)
    assert str(tmp_path / "tokenizer.json") in str(caught.value)
    assert expected in str(caught.value)


def test_ids_of_an_old_vocabulary_are_limited(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({"z": 3 * 10**9}))
    with pytest.raises(ModelError, match=r"vocab\.json.*the id of 'z' is 3000000000"):
        load(tmp_path)


@pytest.mark.parametrize(
    "normalizer",
    [
        sequence({"type": "Prepend", "prepend": "▁"}, replaced(" ", "▁")),
        sequence(replaced("\n", "<newline>"), replaced("\t", "<tab>"), replaced(" ", "<space>")),
        sequence(*[{**replaced("", " "), "pattern": {"Regex": " {2,}"}}] * 10),
    ],
)
def test_insertions_of_common_normalizers_are_accepted(tmp_path: Path, normalizer: dict[str, Any]) -> None:
    change(tmp_path, normalizer=normalizer)
    assert load(tmp_path).tokenizer.is_fast


def test_a_panic_of_the_library_on_loading_names_the_tokenizer(tmp_path: Path) -> None:
    change(tmp_path, normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"})
    with pytest.raises(ModelError, match="the tokenizer of tiny fails: Precompiled"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("steps", "text", "expected"),
    [
        (
            {"pre_tokenizer": {**SPLIT, "pattern": {"Regex": "(a|a|aa)+(a|aa)+(a+)+X"}}},
            "a" * 100_000,
            "Onig: Regex search error",
        ),
        (
            {"model": {"type": "WordLevel", "vocab": KNOWN, "unk_token": "<unk>"}},
            "else",
            "WordLevel error: Missing",
        ),
    ],
)
def test_an_error_on_a_text_names_the_tokenizer(
    tmp_path: Path, steps: dict[str, Any], text: str, expected: str
) -> None:
    change(tmp_path, **steps)
    loaded = load(tmp_path)
    with pytest.raises(ModelError, match=expected) as caught:
        encode(loaded, text)
    assert f"the tokenizer of {tmp_path} fails" in str(caught.value)
