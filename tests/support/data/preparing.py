"""Prepare rows for training with the demo's tokenizer and a template that writes all of their values."""

import functools
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from qlora_cli.data.feeding.prepare import PreparedData, prepare_data
from qlora_cli.data.tokenizing.encode import TextTokenizer
from qlora_cli.errors import DataError
from qlora_cli.events import SilentReporter
from qlora_cli.model_files.source import ModelSource
from qlora_cli.settings.models import DataSettings, ModelSettings
from qlora_cli.tokenizing.tokenizer import load_tokenizer
from tests.conftest import ASSETS, write_jsonl

CHATML = (
    "{{ bos_token }}{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerBase:
    """Return the demo's tokenizer with a template that writes tools, calls and `enable_thinking`."""
    return deepcopy(_load())


@functools.cache
def _load() -> PreTrainedTokenizerBase:
    base = ASSETS / "base"
    source = ModelSource(name="demo", path=base, base_name="demo", tokenizer_path=base)
    tokenizer = load_tokenizer(source, ModelSettings(name="demo")).tokenizer
    tokenizer.chat_template = CHATML
    return tokenizer


def prepare_file(path: Path, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> PreparedData:
    """Return the rows of a file, prepared for training."""
    assert tokenizer.eos_token_id is not None
    text = TextTokenizer(tokenizer=tokenizer, end_ids=frozenset({tokenizer.eos_token_id}), reporter=SilentReporter())
    return prepare_data(DataSettings(dataset=str(path), **settings), text, seed=0).train


def prepare(
    directory: Path, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], **settings: Any
) -> PreparedData:
    """Return `rows`, prepared for training."""
    return prepare_file(write_jsonl(directory / "rows.jsonl", rows), tokenizer, **settings)


def whole(data: PreparedData, tokenizer: PreTrainedTokenizerBase, row: int = 0) -> str:
    """Return the text of a row."""
    return str(tokenizer.decode(data.dataset[row]["input_ids"]))


def trained(data: PreparedData, tokenizer: PreTrainedTokenizerBase, row: int = 0) -> str:
    """Return the trained text of a row."""
    return str(tokenizer.decode([label for label in data.dataset[row]["labels"] if label != -100]))


def refusal(
    directory: Path, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], **settings: Any
) -> DataError:
    """Return the error with which `rows` are refused."""
    with pytest.raises(DataError) as caught:
        prepare(directory, tokenizer, rows, **settings)
    return caught.value
