"""Small files of a model are not read if they are larger, or hold more values, than any published one."""

import json
import os
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_cli.errors import ModelError
from qlora_cli.model_files.checkpoint import read_header, read_json
from qlora_cli.model_files.file_limits import HEADER, limit_of, limited_files
from qlora_cli.model_files.given_model import check_model_name
from qlora_cli.model_files.model_config import read_config
from qlora_cli.model_files.source import find_model
from qlora_cli.settings.models import ModelSettings
from qlora_cli.tokenizing.tokenizer_limits import check_tokenizer_files
from qlora_cli.units import GIB, MIB
from tests.support.models.loading import save_model

CONFIGS = ("config.json", "generation_config.json", "adapter_config.json", "processor_config.json")
JSON_FILES = (
    *(*CONFIGS, "chat_template.json", "config.4.0.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "tokenizer.json", "tokenizer.4.0.json", "vocab.json", "tekken.json"),
    *("model.safetensors.index.json", "pytorch_model.bin.index.json"),
)
KINDS = (
    "config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "model.safetensors.index.json",
)  # one for each limit
LINES = ("merges.txt", "vocab.txt")


def empty_objects(name: str) -> bytes:
    """Return the JSON that takes the most memory for each byte, with 10% more values than are allowed."""
    limit = limit_of(name)
    assert limit is not None
    return b'{"zz":[' + b"{}," * (limit.max_values * 11 // 20) + b"1]}"


@pytest.mark.parametrize("name", KINDS)
def test_a_file_with_too_many_values_is_refused_before_parsing(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(empty_objects(name))
    tracemalloc.start()
    with pytest.raises(ModelError, match=r"it holds more than [\d,]+ values") as caught:
        read_json(tmp_path / name)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(tmp_path / name) in str(caught.value)
    assert peak_bytes < 3 * (tmp_path / name).stat().st_size


@pytest.mark.parametrize("name", KINDS)
def test_a_file_within_the_limits_takes_little_memory_and_time(tmp_path: Path, name: str) -> None:
    limit = limit_of(name)
    assert limit is not None
    num_objects = min(limit.max_values // 2 - 2, (limit.max_bytes - 20) // 3)
    (tmp_path / name).write_bytes(b'{"zz":[' + b"{}," * num_objects + b"1]}")
    assert len({limit_of(one) for one in JSON_FILES}) == len(KINDS)
    begin = time.process_time()
    assert len(read_json(tmp_path / name)["zz"]) == num_objects + 1
    assert time.process_time() - begin < 5
    assert num_objects * 80 + limit.max_bytes * 5 < GIB


@pytest.mark.parametrize("name", [*JSON_FILES, *LINES])
def test_a_file_that_is_too_large_is_refused_unread(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    os.truncate(tmp_path / name, 10**12)
    with pytest.raises(ModelError, match=r"it is larger than \d+\.00 MiB"):
        check_tokenizer_files(tmp_path)


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("separator", [b"\n", b" ", b"\t"])
def test_a_list_of_too_many_tokens_is_refused(tmp_path: Path, name: str, separator: bytes) -> None:
    (tmp_path / name).write_bytes((b"a" + separator) * 5_000_000)
    with pytest.raises(ModelError, match="it holds more than 4,000,000 values"):
        check_tokenizer_files(tmp_path)


@pytest.mark.parametrize("name", [*JSON_FILES, *LINES])
def test_no_reader_passes_such_a_file_to_a_library(tmp_path: Path, name: str) -> None:
    model = save_model(tmp_path / "model")
    content = b"a\n" * 5_000_000 if name in LINES else empty_objects(name)
    settings = ModelSettings(name=str(model))
    source = find_model(settings)
    (model / name).write_bytes(content)
    asked: list[Callable[[], object]] = [lambda: read_config(source, trust_remote_code=False)]
    asked += [lambda: check_tokenizer_files(model)]
    for ask in asked:
        with pytest.raises(ModelError, match=f"{name} can't be read.* it holds more than"):
            ask()
    if name != "adapter_config.json":  # with which the name is that of an adapter
        assert "it holds more than" in str(check_model_name(settings))


@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model", "sentencepiece.bpe.model"])
def test_a_sentencepiece_vocabulary_that_is_too_large_is_not_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    os.truncate(tmp_path / name, 64 * MIB + 1)
    with pytest.raises(ModelError, match=f"{name} can't be read: it is larger than 64"):
        check_tokenizer_files(tmp_path)
    (tmp_path / name).write_bytes(b"," * 10 * MIB)
    check_tokenizer_files(tmp_path)  # its library reports the invalid content


def test_other_files_next_to_a_model_may_have_any_size(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    for name in ("rows.json", "trainer_state.json", "README.md"):
        (model / name).touch()
        os.truncate(model / name, 10**12)
    find_model(ModelSettings(name=str(model)))


def test_a_header_with_too_many_values_is_refused_before_parsing(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"F32","shape":[' + b"{}," * HEADER.max_values + b'2],"data_offsets":[0,0]}}'
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    begin = time.process_time()
    with pytest.raises(ModelError, match="its header can't be read: it holds more than 2,000,000 values"):
        read_header(tmp_path, "model.safetensors")
    assert time.process_time() - begin < 2


def test_published_files_are_far_within_the_limits(tmp_path: Path) -> None:
    """The largest known sizes: a vocabulary of 262,144 with merges as pairs, 65,536 added tokens, 92,000 tensors."""
    vocabulary = {"model": {"vocab": {f"tok{n}": n for n in range(262_144)}, "merges": [["to", "k"]] * 514_906}}
    token = {"content": "<|audio_12345|>", "lstrip": False, "normalized": False, "rstrip": False, "special": True}
    added = {"added_tokens_decoder": {str(n): {**token, "single_word": False} for n in range(65_536)}}
    file = "model-00163-of-00163.safetensors"
    weights = {f"model.layers.60.mlp.experts.{n}.down_proj.weight_scale_inv": file for n in range(92_000)}
    for name, content in (
        ("tokenizer.json", vocabulary),
        ("tokenizer_config.json", added),
        ("model.safetensors.index.json", {"metadata": {}, "weight_map": weights}),
    ):
        (tmp_path / name).write_text(json.dumps(content, indent=2))
        limit = limit_of(name)
        assert limit is not None
        num_bytes = (tmp_path / name).stat().st_size
        assert num_bytes < limit.max_bytes
        assert read_json(tmp_path / name) == content
    assert list(limited_files(tmp_path)) == sorted(path.name for path in tmp_path.iterdir())
    assert num_bytes > MIB
