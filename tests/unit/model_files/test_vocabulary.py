"""The number of ids of a tokenizer, read from its files."""

import json
from pathlib import Path

import pytest

from qlora_cli.model_files.vocabulary import num_ids

FILES: dict[str, tuple[str, object, int]] = {
    "by token": ("tokenizer.json", {"model": {"vocab": {"a": 0, "b": 7}}, "added_tokens": []}, 8),
    "in order": ("tokenizer.json", {"model": {"vocab": [["a", 0.0], ["b", -1.0]]}}, 2),
    "added": ("tokenizer.json", {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 9, "content": "<x>"}]}, 10),
    "without a vocabulary": ("tokenizer.json", {"model": None}, 0),
    "of an older tokenizer": ("vocab.json", {"a": 0, "b": 3}, 4),
    "listed": ("added_tokens.json", {"<x>": 5, "<y>": "six"}, 6),
    "of a config": ("tokenizer_config.json", {"added_tokens_decoder": {"11": {"content": "<x>"}, "no": {}}}, 12),
}


@pytest.mark.parametrize("kind", FILES)
def test_the_number_of_ids_is_read_from_the_files(kind: str, tmp_path: Path) -> None:
    name, content, wanted = FILES[kind]
    (tmp_path / name).write_text(json.dumps(content))
    assert num_ids(tmp_path) == wanted


def test_without_a_file_the_number_of_ids_is_zero(tmp_path: Path) -> None:
    assert num_ids(tmp_path) == 0
