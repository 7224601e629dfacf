"""Damaged checkpoints are detected from the headers alone, and the message names file, tensor and remedy."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from qlora_cli.errors import ModelError
from qlora_cli.model_files.checkpoint import DTYPE_BITS, read_checkpoint, read_header

ONE, TWO, INDEX = (
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
)


def sharded(directory: Path) -> dict[str, str]:
    """Write two shards and their index; return the weight map."""
    save_file({"a": np.zeros((2, 3), np.float32), "b": np.zeros(5, np.float16)}, directory / ONE)
    save_file({"c": np.ones((4, 4), np.float32)}, directory / TWO)
    weight_map = {"a": ONE, "b": ONE, "c": TWO}
    write_index(directory, weight_map)
    return weight_map


def write_index(directory: Path, weight_map: object) -> None:
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def raw(header: object, data: bytes = b"") -> bytes:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(content)) + content + data


def message_of(directory: Path) -> str:
    with pytest.raises(ModelError) as caught:
        read_checkpoint(directory, allow_pickle=False)
    return str(caught.value)


def test_the_headers_agree_with_safetensors(base_model: Path) -> None:
    checkpoint = read_checkpoint(base_model, allow_pickle=False)
    with safe_open(base_model / "model.safetensors", framework="np") as file:
        expected = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        dtypes = {name: file.get_slice(name).get_dtype() for name in expected}
    assert len(expected) > 10
    assert {name: tensor.shape for name, tensor in checkpoint.tensors.items()} == expected
    assert {name: tensor.dtype for name, tensor in checkpoint.tensors.items()} == dtypes
    assert checkpoint.files == (base_model / "model.safetensors",)
    assert not checkpoint.is_pickle


def test_shards_are_read_as_one_checkpoint(tmp_path: Path) -> None:
    sharded(tmp_path)
    checkpoint = read_checkpoint(tmp_path, allow_pickle=False)
    assert {name: (tensor.file, tensor.num_bytes) for name, tensor in checkpoint.tensors.items()} == {
        "a": (ONE, 24),
        "b": (ONE, 10),
        "c": (TWO, 64),
    }
    assert checkpoint.total_bytes == 98
    assert [path.name for path in checkpoint.files] == [ONE, TWO]


def test_a_truncated_shard_is_an_error_that_names_the_first_incomplete_tensor(tmp_path: Path) -> None:
    sharded(tmp_path)
    content = (tmp_path / ONE).read_bytes()
    first, second = (tensor.name for tensor in read_header(tmp_path, ONE))
    (tmp_path / ONE).write_bytes(content[:-1])
    assert f"{second} is the first incomplete tensor" in message_of(tmp_path)
    (tmp_path / ONE).write_bytes(content[:-12])
    message = message_of(tmp_path)
    assert f"{tmp_path / ONE} is damaged: it is truncated: it holds 22 B of 34 B" in message
    assert f"{first} is the first incomplete tensor" in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "too few for a header"),
        (b"<!doctype html><title>Sign in</title>", "does not begin with a safetensors header"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        (struct.pack("<Q", 1000) + b"{}", "truncated in its header"),
        (raw(b"\xff\xfe not json"), "its header is not JSON"),
        (raw([1, 2]), "not a JSON object"),
        (raw({"w": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, b"0000"), "w has the unknown dtype 'F99'"),
        (raw({"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"0000"), "tensor w has no proper shape"),
        (raw({"w": "text"}), "w has the unknown dtype"),
        (
            raw({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"0000"),
            "w is F32 of shape (2,), 8 bytes",
        ),
        (raw({"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"00000000"), "w does not begin where"),
        (
            raw({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"00000000"),
            "4 B follow its last tensor",
        ),
        (raw({"w": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, b"0000"), "unknown dtype ['F32']"),
        (raw({"__metadata__": [1]}), "its metadata is not an object of strings"),
        (raw({"__metadata__": {"format": 1}}), "its metadata is not an object of strings"),
        (raw({"w": {"dtype": "F32", "shape": [2**62] * 8 + [0], "data_offsets": [0, 0]}}), "overflow"),
        (raw(b'{"w":{"dtype":"F32","shape":[' + b"9" * 5_000 + b'],"data_offsets":[0,0]}}'), "is not JSON"),
        (raw(b'{"w":{"dtype":"F32","shape":[' + b"9" * 4_000 + b'],"data_offsets":[0,0]}}'), "no proper shape"),
        (raw(b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"0000"), "invalid JSON in header"),
        (raw(b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":NaN}}', b"0000"), "invalid JSON in header"),
        (raw(b'{"w":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "is not JSON"),
        (raw({"w" * 10_000: "text"}), f"the tensor {'w' * 200}… has the unknown dtype"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_damaged_file_is_refused_with_the_reason_and_safetensors_agrees(
    tmp_path: Path, content: bytes, expected: str
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    message = message_of(tmp_path)
    assert str(path) in message
    assert expected in message
    with pytest.raises(SafetensorError), safe_open(path, framework="np"):
        pass


@pytest.mark.parametrize(("shape", "end"), [([2**63, 0], 0), ([1] * 65, 4)], ids=["size", "dimensions"])
def test_a_shape_beyond_the_limits_of_torch_is_refused(tmp_path: Path, shape: list[int], end: int) -> None:
    content = raw({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}, bytes(end))
    (tmp_path / "model.safetensors").write_bytes(content)
    assert "the tensor w has no proper shape" in message_of(tmp_path)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "FIFO"])
@pytest.mark.parametrize("name", ["model.safetensors", INDEX])
def test_a_folder_or_pipe_in_place_of_a_file_is_refused_without_waiting(
    tmp_path: Path, make: Callable[[Path], None], name: str
) -> None:
    make(tmp_path / name)
    message = message_of(tmp_path)
    assert f"{tmp_path / name} " in message
    assert "it is not a regular file" in message


NAMES = ["x" * 300, "x" * 5_000, "é" * 200, "f/" * 3_000, "\0", "\ud800", "a/" + "x" * 300, ".", "a" * 240]


@pytest.mark.parametrize("entry", [INDEX, "pytorch_model.bin.index.json"])
@pytest.mark.parametrize("name", NAMES, ids=lambda name: f"{name[:3]!a}{len(name)}")
def test_an_impossible_file_name_in_an_index_is_refused_with_a_short_message(
    tmp_path: Path, name: str, entry: str
) -> None:
    suffix = ".safetensors" if entry == INDEX else ".bin"
    (tmp_path / entry).write_text(json.dumps({"metadata": {}, "weight_map": {"t" * 9_000: f"{name}{suffix}"}}))
    with pytest.raises(ModelError) as caught:
        read_checkpoint(tmp_path, allow_pickle=True)
    assert str(tmp_path) in str(caught.value)
    assert len(f"{caught.value} {caught.value.hint}") < 1_000 + 3 * len(str(tmp_path))


def test_json_larger_than_that_of_any_model_is_not_read(tmp_path: Path) -> None:
    (tmp_path / INDEX).touch()
    os.truncate(tmp_path / INDEX, 10**9)
    assert "it is larger than 64.00 MiB" in message_of(tmp_path)


def test_every_dtype_of_the_format_is_known_by_its_size(tmp_path: Path) -> None:
    header = {}
    offset = 0
    for dtype, bits in DTYPE_BITS.items():
        if "FNUZ" in dtype:
            continue  # in the specification, not in every release of the library
        header[dtype] = {"dtype": dtype, "shape": [8], "data_offsets": [offset, offset + bits]}
        offset += bits
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw(header, bytes(offset)))
    assert {tensor.num_bytes for tensor in read_header(tmp_path, path.name)} == {4, 6, 8, 16, 32, 64}
    with safe_open(path, framework="np") as file:
        assert len(file.keys()) == len(header) >= 18


def test_a_missing_shard_is_named_with_a_tensor_it_holds(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / TWO).unlink()
    message = message_of(tmp_path)
    assert f"lacks {TWO}" in message
    assert "for c" in message


def test_an_index_that_does_not_fit_its_shards_is_refused(tmp_path: Path) -> None:
    weight_map = sharded(tmp_path)
    write_index(tmp_path, {**weight_map, "ghost": TWO})
    assert f"the tensor ghost is in {TWO}, but that file lacks it" in message_of(tmp_path)
    write_index(tmp_path, {**weight_map, "c": ONE})
    assert "is in model-00001-of-00002.safetensors, but that file lacks it" in message_of(tmp_path)
    write_index(tmp_path, {"a": ONE, "c": TWO})
    message = message_of(tmp_path)
    assert f"{tmp_path / ONE} holds the tensor b" in message
    assert "omits" in message
    write_index(tmp_path, weight_map)
    save_file({"c": np.ones(1, np.float32), "a": np.ones(1, np.float32)}, tmp_path / TWO)
    assert "the tensor a twice" in message_of(tmp_path)


@pytest.mark.parametrize(
    "file", ["../outside.safetensors", "/etc/passwd", "a/../../b", "C:\\x", "\\\\host\\x", "..\\x", "", 7]
)
def test_an_index_that_points_out_of_its_directory_is_refused(tmp_path: Path, file: object) -> None:
    sharded(tmp_path)
    write_index(tmp_path, {"a": file})
    message = message_of(tmp_path)
    assert "no file of that directory" in message
    assert "tensor a" in message


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', "[" * 100_000])
def test_an_invalid_index_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX).write_text(content)
    assert INDEX in message_of(tmp_path)


def test_a_single_file_takes_precedence_over_an_index_as_in_transformers(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_file({"only": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    assert set(read_checkpoint(tmp_path, allow_pickle=False).tensors) == {"only"}


def test_a_damaged_file_of_a_snapshot_gets_the_command_that_fetches_it_again(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--tiny" / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    sharded(snapshot)
    (snapshot / TWO).write_bytes(b"")
    with pytest.raises(ModelError) as caught:
        read_checkpoint(snapshot, allow_pickle=False)
    assert caught.value.hint == f"Run: hf download owner/tiny {TWO} --revision abc123 --force-download"


def test_pickles_are_counted_only_if_allowed_and_only_without_safetensors(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    assert "only pytorch_model.bin, a pickle" in message_of(tmp_path)
    checkpoint = read_checkpoint(tmp_path, allow_pickle=True)
    assert (checkpoint.is_pickle, checkpoint.total_bytes, dict(checkpoint.tensors)) == (True, 6, {})
    save_file({"w": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    assert not read_checkpoint(tmp_path, allow_pickle=True).is_pickle


def test_a_pickle_index_is_checked_like_one_of_safetensors(tmp_path: Path) -> None:
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.bin", "b": "two.bin"}}))
    (tmp_path / "one.bin").write_bytes(b"12345")
    with pytest.raises(ModelError, match=r"lacks two\.bin"):
        read_checkpoint(tmp_path, allow_pickle=True)
    (tmp_path / "two.bin").write_bytes(b"123")
    assert read_checkpoint(tmp_path, allow_pickle=True).total_bytes == 8


def test_safetensors_files_that_are_not_a_model_are_reported(tmp_path: Path) -> None:
    save_file({"w": np.zeros(1, np.float32)}, tmp_path / "consolidated.safetensors")
    assert "has consolidated.safetensors, but neither" in message_of(tmp_path)
