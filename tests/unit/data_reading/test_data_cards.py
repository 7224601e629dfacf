"""The card of a data set assigns files to configs and splits, in every form that `datasets` reads."""

from collections.abc import Callable

import pytest

from tests.support.data.data_directories import files_of, notes_of, refusal

CARD = """---
license: mit
configs:
- config_name: en
  data_files:
  - split: train
    path: "en/part-*"
  - split: validation
    path: [en/held.jsonl, en/more.jsonl]
- config_name: de
  data_dir: de
pretty_name: A set
---
# A set
"""
PARTS = ("en/part-1.jsonl", "en/part-2.jsonl", "en/held.jsonl", "de/train.jsonl", "de/test.jsonl")


def test_the_card_assigns_files_to_splits_and_configs(make_directory: Callable[..., str]) -> None:
    path = make_directory(*PARTS, card=CARD)
    assert files_of(f"{path}:en") == ["en/part-1.jsonl", "en/part-2.jsonl"]
    assert files_of(f"{path}:en:validation") == ["en/held.jsonl"]
    assert files_of(f"{path}:de") == ["de/train.jsonl"]
    assert "validation (held.jsonl)" in notes_of(f"{path}:en")[0]


def test_one_of_several_configs_must_be_named(make_directory: Callable[..., str]) -> None:
    path = make_directory(*PARTS, card=CARD)
    problem = refusal(path)
    assert "several configs: its README.md names en, de" in str(problem)
    assert problem.hint == f"For the first one write {path}:en"
    assert "no config fr" in str(refusal(f"{path}:fr"))


@pytest.mark.parametrize("how", ["  default: true", "default"])
def test_the_default_config_is_read(make_directory: Callable[..., str], how: str) -> None:
    card = (
        CARD.replace("  data_dir: de", f"  data_dir: de\n{how}")
        if ":" in how
        else CARD.replace("name: de", f"name: {how}")
    )
    assert files_of(make_directory(*PARTS, card=card)) == ["de/train.jsonl"]


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ("a.jsonl", ["a.jsonl"]),
        ("[a.jsonl, b.jsonl]", ["a.jsonl", "b.jsonl"]),
        ("{train: b.jsonl, test: a.jsonl}", ["b.jsonl"]),
        ("[{split: train, path: sub}]", ["sub/c.jsonl"]),
        ("'*'", ["a.jsonl", "b.jsonl"]),
        ("'**/*.jsonl'", ["a.jsonl", "b.jsonl", "sub/c.jsonl"]),
    ],
)
def test_config_files_may_be_declared_in_every_form_of_datasets(
    make_directory: Callable[..., str], value: str, read: list[str]
) -> None:
    card = f"---\nconfigs:\n- config_name: default\n  data_files: {value}\n---\n"
    assert files_of(make_directory("a.jsonl", "b.jsonl", "sub/c.jsonl", card=card)) == read


@pytest.mark.parametrize(
    "value",
    [
        *("../a.jsonl", "/etc/passwd", "hf://datasets/a/b.jsonl", "[{split: train}]", "{train: 5}", "[[a], b]", "*x"),
        *("&x a.jsonl", "[" * 30 + "]" * 30, f"0x{'F' * 5000}", "5", "true", "2024-01-01", "!!set {a}", "{a: {b: c}}"),
        *("x" * 5000, f"'{'x' * 5000}*'", f"'{'*/' * 3000}*'", '"a\\0b"', '"\\ud800*"', "[null]", "!!binary eA=="),
        *('!!int ""', "!!bool x", "!!timestamp x", '{? !!float "" : x}'),
    ],
)
def test_an_invalid_card_is_an_error(make_directory: Callable[..., str], value: str) -> None:
    path = make_directory("a.jsonl", card=f"---\nconfigs:\n- config_name: default\n  data_files: {value}\n---\n")
    assert "README.md: its configs can't be read" in str(refusal(path))
    assert len(str(refusal(path))) < 400


@pytest.mark.parametrize("value", ["..", "/", "5", "[a]", "x" * 5000, '"a\\0b"', '"\\ud800"', "!!binary eA=="])
@pytest.mark.parametrize("files", ["", "\n  data_files: '*'"])
def test_an_invalid_folder_in_the_card_is_an_error(make_directory: Callable[..., str], value: str, files: str) -> None:
    path = make_directory("a.jsonl", card=f"---\nconfigs:\n- config_name: default\n  data_dir: {value}{files}\n---\n")
    assert "README.md: its configs can't be read" in str(refusal(path))


@pytest.mark.parametrize(
    "card", ["# About\n---\nconfigs: 5\n---\n", "---\nlicense: mit\n---\n", "---\nconfigs:\n---\n", "---\n"]
)
def test_a_card_without_configs_changes_nothing(make_directory: Callable[..., str], card: str) -> None:
    assert files_of(make_directory("train.jsonl", "test.jsonl", card=card)) == ["train.jsonl"]


@pytest.mark.parametrize("pattern", ["notes.txt", "notes*"])
def test_an_unsupported_file_type_in_the_card_is_an_error(make_directory: Callable[..., str], pattern: str) -> None:
    path = make_directory("notes.txt", card=f"---\nconfigs:\n- config_name: default\n  data_files: {pattern}\n---\n")
    assert "notes.txt is of a file type that is not supported" in str(refusal(path))


def test_a_split_of_the_card_without_files_is_an_error_when_it_is_read(make_directory: Callable[..., str]) -> None:
    path = make_directory("en/held.jsonl", card=CARD)
    assert files_of(f"{path}:en:validation") == ["en/held.jsonl"]
    assert "its split train is declared, but has no files" in str(refusal(f"{path}:en"))


# What datasets writes
